"""Samplers, teacher-forced: the exact likelihood of a text under an unmasking policy.

A policy chooses the next positions from the unmasked tokens alone, so the probabilities of the tokens of a text, each
given those unmasked before it, multiply to a probability distribution over texts (DUEL, 2603.01367). For masked
diffusion it is that of `tools/generate.py` at temperature 1 with the same order, steps and blocks, where the length of
a text is fixed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.config.policies import CERTAINTIES
from megatron.generation.certainty import predictions
from megatron.generation.diffusion import Filling
from megatron.generation.sampling import Sampling
from megatron.model.transformer import Transformer
from megatron.objectives.block_diffusion import two_forms

Keys = Sequence[tuple[int, int]]  # of the random draws of each text


class ForcedFilling(Filling):
    """Unmasks the tokens of given texts of masked diffusion, in place of sampled ones, and adds up their NLL.

    `masked` [B, T] says which tokens of `texts` [B, T] are unmasked, the others are context. The output at position j
    predicts token j + `offset`.
    """

    def __init__(
        self, model: Transformer, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling, offset: int = 0
    ):
        mask_id = model.vocabulary.mask_id
        inputs = torch.where(masked, mask_id, texts).tolist()
        super().__init__(model, inputs, list(keys), sampling, eod=0, open_end=False, offset=offset)
        self.truth = texts.to(self.device).gather(1, self.positions)  # [B, L]
        self.nll = torch.zeros(self.truth.shape, device=self.device)  # [B, L]

    def certainties(self, states: Tensor, reached: Tensor) -> Tensor:
        """Return the certainties of the `reached` positions, and keep the NLL of their tokens."""
        self.nll[reached], certainties = self._predictions(states, self.truth[reached])
        return certainties

    def choose(self, states: Tensor, draws: Tensor, selected: Tensor) -> Tensor:
        """Return the tokens of the texts at the `selected` positions, and keep their NLL."""
        targets = self.truth[selected]  # [N]
        if self.sampling.order not in CERTAINTIES:  # otherwise `certainties` has kept it in this step
            self.nll[selected], _ = self._predictions(states, targets)
        return targets

    def _predictions(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the NLL of targets [N], and the certainties [N], from hidden states [N, H].

        A text may contain the end of a document anywhere, so every id of the tokenizer is predicted.
        """
        chunks = zip(states.split(self.logit_positions), targets.split(self.logit_positions), strict=True)
        nll, certainties = zip(*(predictions(self.model, *chunk, self.sampling.order) for chunk in chunks), strict=True)
        return torch.cat(nll), torch.cat(certainties)

    def token_nll(self) -> Tensor:
        """Return the NLL of each token after `run`, fp32 [B, T], 0 at those that were not masked."""
        return torch.zeros(self.tokens.shape, device=self.device).scatter_(1, self.positions, self.nll)


class ForcedBlocks(ForcedFilling):
    """Unmasks all blocks of given texts of block diffusion at the same time, each after the true blocks before it.

    The masked form of a block attends to itself and to the text before it, so no block depends on how another one is
    unmasked. A block of a text is a text of `Filling`, and one forward pass of 2T positions is a step of all blocks.
    """

    def __init__(
        self, model: Transformer, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling, block_size: int
    ):
        self.block_size = block_size
        blocks = self._blocks(texts)  # [R, block]
        num_blocks = len(blocks) // len(texts)
        block_keys = [(key, index * num_blocks + block) for key, index in keys for block in range(num_blocks)]
        super().__init__(model, blocks, self._blocks(masked), keys=block_keys, sampling=sampling)
        self.text = texts.to(self.device)
        self.schedule_length = min(block_size, int(masked.sum(1).max()))  # also where each block is partly unmasked

    def _blocks(self, texts: Tensor) -> Tensor:
        """Return texts [B, T, ...] as blocks [R, block, ...], the last block of a text padded with 0."""
        padding = [0, 0] * (texts.ndim - 2) + [0, -texts.shape[1] % self.block_size]
        return torch.nn.functional.pad(texts, padding).reshape(-1, self.block_size, *texts.shape[2:])

    def _texts(self, blocks: Tensor) -> Tensor:
        """Return what `_blocks` was given, [B, T], of its result."""
        return blocks.view(len(self.text), -1)[:, : self.text.shape[1]]

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the head's input at `positions` [R, L] of the blocks `tokens` [R, block], [R, L, H]."""
        batch = two_forms(self._texts(tokens), self.text, self.block_size)
        hidden = self._blocks(self.model.hidden_states(batch)[:, : self.text.shape[1]])  # [R, block, H]
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def token_nll(self) -> Tensor:
        """Return the NLL of each token after `run`, fp32 [B, T], 0 at those that were not masked."""
        return self._texts(super().token_nll())


class ForcedAnyOrder(ForcedFilling):
    """Reads the tokens of given texts with an any-order model, in an order that its predictions decide.

    The input that predicts the next token is the last one read, given the position of its target. One forward pass of a
    step reads it as often as there are positions left, each time with another target, next to all inputs before it. The
    context is read first, from left to right, as are the tokens of one step. All texts have equally many masked tokens.
    """

    def __init__(self, model: Transformer, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling):
        super().__init__(model, texts, masked, keys=keys, sampling=sampling)
        self.order = (
            (~masked).nonzero()[:, 1].view(len(texts), -1).to(self.device)
        )  # [B, M], positions in reading order

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the head's input that predicts the masked ones of `positions` [B, L], [B, L, H]; 0 at the others."""
        masked = tokens.gather(1, positions) == self.mask_id  # [B, L]
        targets = positions[masked].view(len(tokens), -1)  # [B, N]
        inputs = torch.cat([self.order[:, :-1], self.order[:, -1:].expand_as(targets)], dim=1)  # [B, M - 1 + N]
        is_query = torch.arange(inputs.shape[1], device=self.device) >= self.order.shape[1] - 1
        other_queries = is_query[:, None] & is_query & ~torch.eye(len(is_query), dtype=torch.bool, device=self.device)
        batch = replace(
            Batch.unscored(tokens.gather(1, inputs), causal=True, position_ids=inputs),
            target_positions=torch.cat([self.order[:, 1:], targets], dim=1),
            blocked=other_queries[None],
        )
        hidden = self.model.hidden_states(batch)[:, is_query]  # [B, N, H]
        if (
            self.order.shape[1] == 1
        ):  # one token attends to itself alone, wherever its target is: a tie, but for rounding
            hidden = hidden[:, :1].expand_as(hidden)
        states = hidden.new_zeros(*positions.shape, hidden.shape[-1])
        states[masked] = hidden.flatten(0, 1)
        return states

    def choose(self, states: Tensor, draws: Tensor, selected: Tensor) -> Tensor:
        """Return the tokens of the texts at the `selected` positions, keep their NLL and append them to the order."""
        read = self.positions[selected].view(len(self.order), -1)
        self.order = torch.cat([self.order, read], dim=1)
        return super().choose(states, draws, selected)
