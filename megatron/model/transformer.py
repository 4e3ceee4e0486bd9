"""The language model: a plain decoder for training, scoring, generation, conversion and tests.

Parameters have Hugging Face's names, so that conversion is a rename. Parallelism is applied from outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.batch import Batch
from megatron.config.parametrization import Parametrization
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.attention import AttentionContext, block_mask, dense_mask
from megatron.model.block import Block
from megatron.model.distillation import Distillation, TeacherStates
from megatron.model.head_shard import WHOLE
from megatron.model.kv_cache import KVCache
from megatron.model.last_block import LastBlock
from megatron.model.linear_cross_entropy import PLAIN, Terms, linear_cross_entropy, linear_nll
from megatron.model.norm import normalisation
from megatron.model.rotary import RotaryTable, rotary_table
from megatron.model.scored_positions import Selection


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head; the batch says whether attention is causal or bidirectional.

    `forward` applies the head itself, at the scored positions only, so that sharding hooks and tied weights work and
    no [B, S, V] tensor is allocated. `initialise` sets the initial weights.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.softmax_size = vocabulary.padded_size if config.softmax_over_padding else vocabulary.size
        self.embed_tokens = nn.Embedding(vocabulary.padded_size, config.hidden_size)
        # keyed by name, so that a pipeline stage can delete layers without renumbering the others
        self.layers = nn.ModuleDict({str(index): Block(config) for index in range(config.num_layers - 1)})
        self.layers[str(config.num_layers - 1)] = LastBlock(config)
        # every use of a block: its position in the depth of the whole model, and the name of the block
        self.schedule = [(position, str(layer)) for position, layer in enumerate(config.schedule)]
        self.norm = normalisation(config, config.hidden_size)
        self.logit_multiplier = Parametrization.of(config).logits
        if config.untie_embeddings_and_output_weights:
            self.lm_head = nn.Linear(config.hidden_size, vocabulary.padded_size, bias=False)
        # set from outside: by megatron/parallel
        self.is_first_stage = True  # of a pipeline; has the embedding
        self.is_last_stage = True  # of a pipeline; has the final norm and the head
        self.head_shard = WHOLE  # the vocabulary rows of the head on this tensor-parallel rank
        self.selects_scored_positions = True  # the last block computes o_proj and the MLP at scored positions only
        self.uses_block_mask = False  # masked attention is FlexAttention, which must be compiled
        self.distillation: Distillation | None = None  # soft targets of the training loss
        self._kept_table: tuple[int, torch.device, RotaryTable] | None = None  # of `_shared_table`

    def forward(self, batch: Batch, hidden: Tensor | None = None, per_position: bool = False) -> Tensor:
        """Return the sum of weight * nll over the scored positions, fp32 [1]; plus the loss terms in training mode.

        With `per_position` return the unweighted nll, fp32 [B, S], 0 at positions without a score; the head then adds
        nothing to the autograd graph. A pipeline stage other than the first takes `hidden` from the stage before it;
        a stage other than the last returns its hidden states, [B, S, H].
        """
        positions = batch.scored_positions  # [R]
        targets = batch.targets.flatten()  # [N]
        weights = batch.weights.flatten()  # [N]
        soft_targets = None
        if self.distillation and self.training and not per_position:
            soft_targets = self.distillation.soft_targets(batch)
        selection = self._selection(batch)
        hidden = self.hidden_states(batch, hidden, selection)
        if not self.is_last_stage:
            return hidden
        if selection is not None:  # N is now R plus padding
            targets = targets[positions]
            weights = weights[positions]
            positions = torch.arange(len(positions), device=positions.device)
        hidden = hidden.flatten(0, -2)  # [N, H]
        head = self.head_shard.local(self.lm_weight())  # [V, H]
        softmax = {"vocab_size": self.softmax_size, "shard": self.head_shard}
        if per_position:
            nll = linear_nll(hidden, head, targets, positions, **softmax)
            if selection is not None:
                zeros = nll.new_zeros(batch.weights.numel())
                nll = zeros.index_copy_(0, batch.scored_positions, nll[: len(positions)])
            return nll.view_as(batch.weights)
        terms = Terms(self.config.label_smoothing, self.config.z_loss) if self.training else PLAIN
        options = {"weights": weights, "terms": terms, "soft_targets": soft_targets, **softmax}
        return linear_cross_entropy(hidden, head, targets, positions, **options)

    def teacher_states(self, batch: Batch) -> TeacherStates:
        """Return what a student needs of this model: the head's input at the scored positions, [R, H], and the head."""
        selection, positions = self._selection(batch), batch.scored_positions
        hidden = self.hidden_states(batch, selection=selection).flatten(0, -2)
        hidden = hidden[positions] if selection is None else hidden[: len(positions)]
        return TeacherStates(hidden, self.head_shard.local(self.lm_weight()))

    def _selection(self, batch: Batch) -> Selection | None:
        """Return the positions at which the last block computes o_proj and the MLP; None for all."""
        # a causal batch scores nearly all positions; a short one would compile another graph for its last step
        selects = self.is_last_stage and self.selects_scored_positions and not batch.causal
        return Selection.of(batch.scored_positions, batch.targets.numel()) if selects else None

    def hidden_states(self, batch: Batch, hidden: Tensor | None = None, selection: Selection | None = None) -> Tensor:
        """Return the input of the head, [B, T, H], or of a `selection` only, [chunks * size, H]."""
        if self.is_first_stage:
            states = F.dropout(self.embed_tokens(batch.tokens), self.config.embedding_dropout, self.training)
        else:
            assert hidden is not None
            states = hidden
        context = self._attention_context(batch, states.dtype)
        scales = batch.residual_scales
        if selection is None:
            return self.run_blocks(states, context, scales, len(self.schedule))
        states = self.run_blocks(states, context, scales, len(self.schedule) - 1)
        position, last = self.schedule[-1]
        return self._head_input(self.layers[last](states, context, _scale(scales, position), selection))

    def run_blocks(self, states: Tensor, context: AttentionContext, scales: Tensor | None, num_uses: int) -> Tensor:
        """Apply the first `num_uses` uses of blocks to `states` [B, T, H]; all of the last stage end with the norm.

        `scales` [B, depth] are the residual scales of every use. All arguments are tensors, flags and a constant, so
        that it compiles as one graph.
        """
        for position, name in self.schedule[:num_uses]:
            states = self.layers[name](states, context, _scale(scales, position))
        is_head_input = self.is_last_stage and num_uses == len(self.schedule)
        return self._head_input(states) if is_head_input else states

    def _head_input(self, states: Tensor) -> Tensor:
        """Return the normalised states [..., H], with the multiplier of the logits."""
        hidden = self.norm(states)
        return hidden if self.logit_multiplier == 1 else hidden * self.logit_multiplier

    def _attention_context(self, batch: Batch, dtype: torch.dtype) -> AttentionContext:
        """Return rotary tables and attention mask of a batch.

        Where the batch has target positions, queries are rotated to the position of their target and keys to their own
        position, so that attention depends on the distance between the target and the tokens in context.
        """
        length, device = batch.tokens.shape[1], batch.tokens.device
        position_ids = batch.position_ids
        key_rotary = self._shared_table(length, device) if position_ids is None else self._rotary_table(position_ids)
        query_rotary = key_rotary if batch.target_positions is None else self._rotary_table(batch.target_positions)
        visible = batch.visible()
        if visible is None:
            return AttentionContext(query_rotary, key_rotary, batch.causal)
        mask = block_mask(visible) if self.uses_block_mask else dense_mask(visible, dtype)
        return AttentionContext(query_rotary, key_rotary, causal=False, mask=mask)

    def _shared_table(self, length: int, device: torch.device) -> RotaryTable:
        """Return the table of positions 0 to `length` - 1; the last one is kept, as it takes the host ten operators."""
        if self._kept_table is None or self._kept_table[:2] != (length, device):
            table = self._rotary_table(torch.arange(length, device=device)[None])
            self._kept_table = (length, device, table)
        return self._kept_table[2]

    def _rotary_table(self, position_ids: Tensor) -> RotaryTable:
        return rotary_table(position_ids, self.config.head_size, self.config.rotary_base)

    def read(
        self, tokens: Tensor, cache: KVCache, present: Tensor | None = None, target_positions: bool = False
    ) -> Tensor:
        """Process [B, T] tokens that follow those in `cache`, and append them to it; return the head's input [B, T, H].

        Attention is causal. `present` [B, T] is False at padding. With `target_positions` each position is given that
        of its target, the next token.
        """
        whole = present is None
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        position_ids, visible = cache.append(present, whole)
        rotary = self._rotary_table(position_ids)
        query_rotary = self._rotary_table(position_ids + 1) if target_positions else rotary
        hidden = self.embed_tokens(tokens)
        mask = None if visible is None else dense_mask(visible, hidden.dtype)
        causal = mask is None and tokens.shape[1] > 1  # several tokens need no mask only where the cache was empty
        for position, name in self.schedule:
            context = AttentionContext(query_rotary, rotary, causal, mask=mask, kv_cache=cache.block(position))
            hidden = self.layers[name](hidden, context)
        return self._head_input(hidden)

    def logits(self, tokens: Tensor, causal: bool, position_ids: Tensor | None = None) -> Tensor:
        """Return fp32 logits [B, S, V] over the tokenizer's ids: for scoring, generation and tests."""
        return self.head(self.hidden_states(Batch.unscored(tokens, causal, position_ids)))

    def head(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [..., V] over the tokenizer's ids for the head's input [..., H]."""
        # with the padding rows, so that rows of logits are aligned, which fast kernels need
        return F.linear(hidden, self.lm_weight())[..., : self.vocabulary.size].float()

    def lm_weight(self) -> Tensor:
        """Return the weight of the head, [padded vocabulary, H]: the embedding's where the two are tied."""
        untied = self.config.untie_embeddings_and_output_weights
        return self.lm_head.weight if untied else self.embed_tokens.weight


def _scale(scales: Tensor | None, position: int) -> Tensor | None:
    """Return the residual scales of a use of a block, [B, 1, 1], out of those of all uses, [B, depth]."""
    return None if scales is None else scales[:, position, None, None]
