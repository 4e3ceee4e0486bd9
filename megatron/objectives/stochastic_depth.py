"""Stochastic depth (1603.09382): a sequence skips whole blocks, the deeper ones more often."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream


@dataclass(frozen=True)
class StochasticDepth:
    """Block l of L adds nothing with probability ratio * l / L, else 1 / (1 - that) times what it computes.

    The draw is keyed by the run position, as processes that share a sequence must skip the same blocks of it.
    """

    num_layers: int
    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with the factor of each block, for the sequences at the `sample_indices` [B]."""
        kept = 1 - self.ratio * np.arange(1, self.num_layers + 1) / self.num_layers
        draws = np.stack([stream(seed, "stochastic depth", int(i)).random(self.num_layers) for i in sample_indices])
        return replace(batch, residual_scales=torch.from_numpy(((draws < kept) / kept).astype(np.float32)))
