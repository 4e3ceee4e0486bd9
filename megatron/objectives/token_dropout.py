"""Noise on the input tokens; targets are unchanged.

Token dropout replaces inputs by [MASK] (random input masking of 2510.04071), random replacement by random tokens
(2606.16246). Masked-input regularisation adds a second pass on masked inputs to the clean one (2606.06888).
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
        """Return the batch with inputs masked; the noise is keyed by the `sample_indices` [B]."""
        if not (self.ratio or self.maximum):
            return batch
        masked = np.stack([self._masked(batch.tokens.shape[1], int(index), seed) for index in sample_indices])  # [B, T]
        return replace(batch, tokens=batch.tokens.masked_fill(torch.from_numpy(masked), self.mask_id))

    def _masked(self, seq_length: int, sample_index: int, seed: int) -> np.ndarray:
        generator = stream(seed, self.purpose, sample_index)
        ratio = generator.uniform(0, self.maximum) if self.maximum else self.ratio
        return generator.random(seq_length) < ratio


@dataclass(frozen=True)
class RandomReplacement:
    """Replace a share of the inputs by tokens drawn uniformly from the vocabulary."""

    vocabulary_size: int
    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with inputs replaced; the noise is keyed by the `sample_indices` [B]."""
        tokens = batch.tokens.clone()
        length = tokens.shape[1]
        for row, index in enumerate(sample_indices):
            generator = stream(seed, "random replacement", int(index))
            replaced = torch.from_numpy(generator.random(length) < self.ratio)  # [T]
            random_tokens = torch.from_numpy(generator.integers(self.vocabulary_size, size=length))  # [T]
            tokens[row, replaced] = random_tokens[replaced]
        return replace(batch, tokens=tokens)


@dataclass(frozen=True)
class MaskedInput(TokenDropout):
    """The second pass of masked-input regularisation: the same batch with masked inputs, its loss times `weight`.

    It adds to the loss but not to its denominator: NTP(x) + weight * NTP(masked x).
    """

    weight: float = 0.0

    purpose = "masked input"

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch of the second pass; the noise is keyed by the `sample_indices` [B]."""
        masked = super().__call__(batch, sample_indices, seed)
        return replace(
            masked, weights=batch.weights * self.weight, counts=np.zeros_like(batch.counts), scored_positions=None
        )
