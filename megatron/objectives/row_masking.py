"""Attention row masking (2507.15857, --randmask-ratio): queries at random positions miss a random share of the keys."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream

EPS = 1e-3  # smallest probability of masking a key, as in masked diffusion


@dataclass(frozen=True)
class RowMasking:
    """Select each query with probability `ratio`; mask each of its keys but its own with probability p ~ U(EPS, 1)."""

    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with blocked keys, the same in all layers; keyed by the `sample_indices` [B]."""
        length = batch.tokens.shape[1]
        blocked = np.zeros((len(sample_indices), length, length), bool)  # [B, T, T]
        for row, index in enumerate(sample_indices):
            generator = stream(seed, "row masking", int(index))
            queries = np.flatnonzero(generator.random(length) < self.ratio)
            mask_prob = (1 - EPS) * generator.random((len(queries), 1)) + EPS  # [queries, 1]
            blocked[row, queries] = generator.random((len(queries), length), dtype=np.float32) < mask_prob
        blocked[:, range(length), range(length)] = False
        return replace(batch, blocked=torch.from_numpy(blocked))
