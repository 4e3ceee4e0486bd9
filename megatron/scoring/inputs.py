"""What a model that predicts masked tokens reads for a mask of a continuation, and its predictions there.

`MaskedInputs` are of masked diffusion: context and partly masked continuation in one bidirectional sequence.
`BlockInputs` are of block diffusion, and score one block of the continuation at a time: the text before the block, and
the block in its masked form. Both have `sequence` and `predict`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.model.transformer import Transformer
from megatron.objectives.block_diffusion import attended
from megatron.scoring.batched_forward import (
    Limits,
    MaskedSequence,
    Prediction,
    batches,
    pad,
    predict,
    predict_sequences,
    select,
    split,
)
from megatron.scoring.pending import PendingRequest

COPIES = 256  # positions of masked forms in a row, or as many as it has of text where those are more


class Inputs(Protocol):
    """How a model reads masks of a continuation; the type of its sequences is its own."""

    def sequence(self, request: PendingRequest, mask: np.ndarray, targets: np.ndarray | None = None) -> Any:
        """Return the model's input for one `mask` [n] of a continuation of n tokens.

        It has the attribute `targets`: the ids at the indices `targets`, by default at all masked tokens.
        """
        ...

    def schedule_length(self, request: PendingRequest) -> int:
        """Return the number of tokens over which a policy spreads its steps; a continuation may have fewer."""
        ...

    def predict(self, sequences: Sequence[Any], order: str | None = None) -> list[Prediction]:
        """Return the predictions of each sequence; `order` is of `predict_sequences`."""
        ...


@dataclass(frozen=True)
class MaskedInputs:
    """Sequences of masked diffusion; the output at position j predicts token j + `offset`."""

    model: Transformer
    limits: Limits
    offset: int = 0
    guidance: float = 0.0

    def sequence(self, request: PendingRequest, mask: np.ndarray, targets: np.ndarray | None = None) -> MaskedSequence:
        """Return the model's input for one `mask` [n] of a continuation of n tokens.

        `targets` are indices in [0, n), by default all masked tokens. A context of three tokens and a continuation of
        four, two of them masked:

            index in the sequence    0    1    2  |  3     4     5     6
            sequence                c0   c1   c2  |  x0    x1    x2    x3
            mask                                  |  0     1     0     1
            tokens                  c0   c1   c2  |  x0  [MASK]  x2  [MASK]
            positions, targets                    |      4: x1       6: x3
            unconditional (--cfg)    M    M    M  |  x0  [MASK]  x2  [MASK]     M = [MASK]
        """
        masked_positions = request.start + mask.nonzero()[0]
        positions = masked_positions if targets is None else request.start + targets
        mask_id = self.model.vocabulary.mask_id
        tokens = request.sequence.copy()
        tokens[masked_positions] = mask_id
        unconditional = None
        if self.guidance:
            unconditional = tokens.copy()
            unconditional[: request.start] = mask_id
        return MaskedSequence(tokens, positions - self.offset, request.sequence[positions], unconditional)

    def schedule_length(self, request: PendingRequest) -> int:
        """Return the number of tokens of the continuation."""
        return request.size

    def predict(self, sequences: Sequence[MaskedSequence], order: str | None = None) -> list[Prediction]:
        """Return the predictions of each sequence; `order` is of `predict_sequences`."""
        return predict_sequences(self.model, sequences, self.limits, guidance=self.guidance, order=order)


@dataclass(frozen=True)
class BlockSequence:
    """A block in its masked form after the text before it, and the positions in the block that predict targets."""

    text: np.ndarray  # [k * block size] ids
    block: np.ndarray  # [at most the block size] ids
    positions: np.ndarray  # [A], in [0, len(block))
    targets: np.ndarray  # [A] ids


@dataclass(frozen=True)
class BlockInputs:
    """Masked forms of blocks of block diffusion, many of them in a row with the text that they share.

    A masked form attends to itself and to the text before its block, as in training, where each block has one masked
    form and its text is read twice. A row has the text once and any number of masked forms of its blocks: those of one
    continuation under several masks, of all its blocks, and of choices after the same text.
    """

    model: Transformer
    limits: Limits
    block_size: int
    seq_length: int  # where the last block of a text may end early, as in training

    def sequence(self, request: PendingRequest, mask: np.ndarray, targets: np.ndarray | None = None) -> BlockSequence:
        """Return the model's input for one `mask` [n] of a continuation that lies within one block.

        The block is that of the model's grid. It begins with the last tokens of the context, and tokens after the
        continuation are [MASK]: they are never unmasked, which leaves the likelihood of the continuation unchanged.
        """
        first = request.start // self.block_size * self.block_size  # index of the first token of the block
        size = min(self.block_size, self.seq_length - first)
        mask_id = self.model.vocabulary.mask_id
        block = np.full(size, mask_id)
        block[: len(request.sequence) - first] = request.sequence[first:]
        block[request.start - first + mask.nonzero()[0]] = mask_id
        positions = request.start - first + (mask.nonzero()[0] if targets is None else targets)
        return BlockSequence(request.sequence[:first], block, positions, request.sequence[first + positions])

    def schedule_length(self, request: PendingRequest) -> int:
        """Return the number of tokens of a block, or of a window after its first token where these are fewer."""
        return min(self.block_size, self.seq_length - 1)

    @torch.no_grad()
    def predict(self, sequences: Sequence[BlockSequence], order: str | None = None) -> list[Prediction]:
        """Return the predictions of each sequence; `order` is of `predict_sequences`."""
        rows = self._rows(sequences)
        lengths = [self._length(sequences, row) for row in rows]
        predictions: dict[int, Prediction] = {}
        for batch in batches(lengths, self.limits):
            members = [rows[index] for index in batch]
            hidden, starts = self._hidden_states(sequences, members)
            positions = [
                np.concatenate([start + sequences[index].positions for index, start in zip(row, row_starts)])
                for row, row_starts in zip(members, starts)
            ]
            indices = [index for row in members for index in row]
            targets = np.concatenate([sequences[index].targets for index in indices])
            prediction = predict(self.model, select(hidden, positions), targets, order=order)
            shares = [lengths[number] / len(rows[number]) for number in batch for _ in rows[number]]
            chunks = split(prediction, [len(sequences[index].positions) for index in indices])
            for index, chunk, share in zip(indices, chunks, shares, strict=True):
                predictions[index] = replace(chunk, forward_tokens=share)
        return [predictions[index] for index in range(len(sequences))]

    def _rows(self, sequences: Sequence[BlockSequence]) -> list[list[int]]:
        """Return the indices of the sequences of each row: their texts begin that of the first one."""
        groups: list[list[int]] = []
        by_text: dict[bytes, list[int]] = {}
        for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index].text)):
            text = sequences[index].text
            if text.tobytes() not in by_text:
                groups.append([])
                for end in range(0, len(text) + 1, self.block_size):
                    by_text.setdefault(text[:end].tobytes(), groups[-1])
            by_text[text.tobytes()].append(index)
        rows = []
        for group in groups:
            size = max(1, max(COPIES, len(sequences[group[0]].text)) // self.block_size)
            rows += [group[start : start + size] for start in range(0, len(group), size)]
        return rows

    def _length(self, sequences: Sequence[BlockSequence], row: list[int]) -> int:
        return len(sequences[row[0]].text) + sum(len(sequences[index].block) for index in row)

    def _hidden_states(self, sequences: Sequence[BlockSequence], rows: list[list[int]]) -> tuple[Tensor, list[list]]:
        """Return the hidden states of rows, [B, T, H], and the position at which each masked form of a row begins."""
        tokens, copies, position_ids, starts = [], [], [], []
        for row in rows:
            members = [sequences[index] for index in row]
            text = members[0].text
            sizes = [len(member.block) for member in members]
            tokens.append(np.concatenate([text, *(member.block for member in members)]))
            copies.append(np.concatenate([np.zeros(len(text), int), np.repeat(1 + np.arange(len(row)), sizes)]))
            blocks = [len(member.text) + np.arange(size) for member, size in zip(members, sizes)]
            position_ids.append(np.concatenate([np.arange(len(text)), *blocks]))
            starts.append((len(text) + np.cumsum([0, *sizes[:-1]])).tolist())
        device = self.model.embed_tokens.weight.device
        ids, positions = (torch.from_numpy(pad(arrays)).to(device) for arrays in (tokens, position_ids))
        numbers = torch.from_numpy(pad([copy + 1 for copy in copies]) - 1).to(device)  # -1 at padding
        batch = Batch.unscored(ids, causal=False, position_ids=positions)
        blocked = ~attended(numbers, positions // self.block_size)
        return self.model.hidden_states(replace(batch, blocked=blocked)), starts
