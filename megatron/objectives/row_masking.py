"""Attention row masking (2507.15857, --randmask-ratio): some positions see a random part of what stands before them."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream

EPS = 1e-3  # of the share of keys that a chosen row does not see, as in masked diffusion


@dataclass(frozen=True)
class RowMasking:
    """Choose each query with probability `ratio`; it misses each key but itself with probability p, p ~ U(EPS, 1)."""

    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with keys blocked, the same in all layers; keyed by the `sample_indices` [B]."""
        length = batch.tokens.shape[1]
        blocked = np.zeros((len(sample_indices), length, length), bool)
        for row, position in enumerate(sample_indices):
            draw = stream(seed, "row masking", int(position))
            chosen = np.flatnonzero(draw.random(length) < self.ratio)
            shares = (1 - EPS) * draw.random((len(chosen), 1)) + EPS
            blocked[row, chosen] = draw.random((len(chosen), length), dtype=np.float32) < shares
        blocked[:, range(length), range(length)] = False
        return replace(batch, blocked=torch.from_numpy(blocked))
