"""The language model: one plain decoder for training, scoring, generation, conversion and tests.

Parameters carry Hugging Face's names, so that conversion is a rename. Parallelism is applied from outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, Vocabulary
from megatron.model.attention import AttentionContext, block_mask, dense_mask
from megatron.model.block import Block
from megatron.model.kv_cache import KVCache
from megatron.model.linear_cross_entropy import PLAIN, WHOLE, Terms, linear_cross_entropy, linear_nll
from megatron.model.norm import normalisation
from megatron.model.rotary import rotary_table
from megatron.model.scored_positions import Selection


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head; causal or bidirectional by the batch.

    The head is applied inside `forward`, at the scored positions only, so that sharding hooks and tied
    weights work and no [B, S, V] tensor is made. `initialise` draws the weights.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.softmax_size = vocabulary.padded_size if config.softmax_over_padding else vocabulary.size
        self.embed_tokens = nn.Embedding(vocabulary.padded_size, config.hidden_size)
        # keyed by name: a pipeline stage deletes entries, and those it keeps are not renumbered
        self.layers = nn.ModuleDict({str(index): Block(config) for index in range(config.num_layers)})
        self.norm = normalisation(config, config.hidden_size)
        if config.untie_embeddings_and_output_weights:
            self.lm_head = nn.Linear(config.hidden_size, vocabulary.padded_size, bias=False)
        # what parallelism changes from outside: which stage of a pipeline this is, which rows of the head are here
        self.is_first_stage = self.is_last_stage = True
        self.head_shard = WHOLE
        self.selects_scored_positions = True  # whether the last block may finish the scored positions only
        self.uses_block_mask = False  # whether attention under a mask is FlexAttention, which must be compiled

    def forward(self, batch: Batch, hidden: Tensor | None = None, per_position: bool = False) -> Tensor:
        """Return the sum of weights * nll over the scored positions, fp32 [1]; in training with the terms of the loss.

        With `per_position` return the unweighted nll, fp32 [B, S], 0 where nothing is asked; the head then
        leaves no graph. A pipeline stage reads `hidden`, which the stage before it returned, unless it is the first,
        and returns its hidden states unless it is the last.
        """
        rows, targets, weights = batch.scored_positions, batch.targets.flatten(), batch.weights.flatten()
        selection = Selection.of(rows, len(targets)) if self.is_last_stage and self.selects_scored_positions else None
        hidden = self.hidden_states(batch, hidden, selection)
        if not self.is_last_stage:
            return hidden
        if selection is not None:
            targets, weights = targets[rows], weights[rows]
            rows = torch.arange(len(rows), device=rows.device)
        hidden, head, part = hidden.flatten(0, -2), self.head_shard.local(self.lm_weight()), self.head_shard
        if per_position:
            nll = linear_nll(hidden, head, targets, rows, self.softmax_size, part)
            if selection is not None:
                nll = nll.new_zeros(batch.weights.numel()).index_copy_(0, batch.scored_positions, nll[: len(rows)])
            return nll.view_as(batch.weights)
        terms = Terms(self.config.label_smoothing, self.config.z_loss) if self.training else PLAIN
        return linear_cross_entropy(hidden, head, targets, weights, rows, self.softmax_size, part, terms)

    def hidden_states(self, batch: Batch, hidden: Tensor | None = None, selection: Selection | None = None) -> Tensor:
        """Return what the head reads, [B, T, H], or of a `selection` alone, [rows of all parts, H]."""
        branches = [None] * len(self.layers)
        if batch.residual_scales is not None:
            branches = [batch.residual_scales[:, int(index), None, None] for index in self.layers]
        if self.is_first_stage:
            hidden = F.dropout(self.embed_tokens(batch.tokens), self.config.embedding_dropout, self.training)
        sight = self._sight(batch, hidden.dtype)
        last = len(branches) - 1
        for index, (block, branch) in enumerate(zip(self.layers.values(), branches, strict=True)):
            hidden = block(hidden, sight, branch, selection if index == last else None)
        return self.norm(hidden) if self.is_last_stage else hidden

    def _sight(self, batch: Batch, dtype: torch.dtype) -> AttentionContext:
        """Return where the tokens stand and what each may see.

        A model that is told which token it must say next to what it reads has its queries stand at the place of that
        token and its keys at their own, so that attention goes by the distance from what is asked to what is known.
        """
        length, positions = batch.tokens.shape[1], batch.position_ids
        if positions is None:
            positions = torch.arange(length, device=batch.tokens.device)[None]
        keys = rotary_table(positions, self.config.head_size, self.config.rotary_base)
        queries, visible = keys, batch.visible()
        if batch.target_positions is not None:
            queries = rotary_table(batch.target_positions, self.config.head_size, self.config.rotary_base)
        if visible is None:
            return AttentionContext(queries, keys, batch.causal)
        mask = block_mask(visible) if self.uses_block_mask else dense_mask(visible, dtype)
        return AttentionContext(queries, keys, False, mask)

    def read(self, tokens: Tensor, past: KVCache, present: Tensor | None = None) -> Tensor:
        """Read [B, T] tokens behind those in `past`, and add them to it; return what the head reads, [B, T, H].

        Each token sees itself and all before it. `present` [B, T] is false where a row holds no token.
        """
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        places, visible = past.append(present)
        table = rotary_table(places, self.config.head_size, self.config.rotary_base)
        hidden = self.embed_tokens(tokens)
        mask = None if visible is None else dense_mask(visible, hidden.dtype)
        causal = mask is None and tokens.shape[1] > 1  # then nothing was read before
        for name, block in self.layers.items():
            hidden = block(hidden, AttentionContext(table, table, causal, mask, past.block(name)))
        return self.norm(hidden)

    def logits(self, tokens: Tensor, causal: bool, positions: Tensor | None = None) -> Tensor:
        """Return fp32 logits [B, S, V] over the tokenizer's ids: for scoring, generation and tests."""
        return self.head(self.hidden_states(Batch.unscored(tokens, causal, positions)))

    def head(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [..., V] over the tokenizer's ids of what the head reads, [..., H]."""
        return F.linear(hidden, self.lm_weight()[: self.vocabulary.size]).float()

    def lm_weight(self) -> Tensor:
        """Return the head's matrix [padded vocabulary, H], the embedding's own where the two are tied."""
        untied = self.config.untie_embeddings_and_output_weights
        return self.lm_head.weight if untied else self.embed_tokens.weight
