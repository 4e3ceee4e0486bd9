"""Noise on input tokens; the targets stay.

Token dropout replaces inputs by [MASK] (random input masking of 2510.04071), random replacement by random tokens
(2606.16246). Masked-input regularisation keeps the clean pass and adds a second one on masked inputs (2606.06888).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream


@dataclass(frozen=True)
class TokenDropout:
    """Replace a fixed share of the inputs by [MASK], or a share r ~ U(0, maximum) drawn for every sequence."""

    mask_id: int
    ratio: float = 0.0
    maximum: float = 0.0

    purpose = "token dropout"

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with inputs dropped; the noise is keyed by the `sample_indices` [B]."""
        if not (self.ratio or self.maximum):
            return batch
        dropped = np.stack([self._dropped(batch.tokens.shape[1], int(i), seed) for i in sample_indices])
        return replace(batch, tokens=batch.tokens.masked_fill(torch.from_numpy(dropped), self.mask_id))

    def _dropped(self, seq_length: int, position: int, seed: int) -> np.ndarray:
        draw = stream(seed, self.purpose, position)
        ratio = draw.uniform(0, self.maximum) if self.maximum else self.ratio
        return draw.random(seq_length) < ratio


@dataclass(frozen=True)
class RandomReplacement:
    """Replace a share of the inputs by tokens drawn evenly from the vocabulary."""

    vocabulary_size: int
    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with inputs replaced; the noise is keyed by the `sample_indices` [B]."""
        tokens = batch.tokens.clone()
        for row, position in enumerate(sample_indices):
            draw = stream(seed, "random replacement", int(position))
            hit = torch.from_numpy(draw.random(tokens.shape[1]) < self.ratio)
            tokens[row, hit] = torch.from_numpy(draw.integers(self.vocabulary_size, size=tokens.shape[1]))[hit]
        return replace(batch, tokens=tokens)


@dataclass(frozen=True)
class MaskedInput(TokenDropout):
    """The second pass of masked-input regularisation: the same batch, inputs masked, its loss times `weight`.

    It adds to the loss and not to what the loss is divided by: NTP(x) + weight * NTP(masked x).
    """

    weight: float = 0.0

    purpose = "masked input"

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the second pass beside `batch`; the noise is keyed by the `sample_indices` [B]."""
        masked = super().__call__(batch, sample_indices, seed)
        return replace(
            masked, weights=batch.weights * self.weight, counts=np.zeros_like(batch.counts), scored_positions=None
        )
