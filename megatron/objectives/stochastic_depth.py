"""Stochastic depth (1603.09382): a sequence skips whole blocks, deeper ones with higher probability."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream


@dataclass(frozen=True)
class StochasticDepth:
    """Skip block l of L with probability ratio * l / L; else divide its output by the probability of keeping it.

    The draw is keyed by the sample index, as ranks that share a sequence must skip the same blocks.
    """

    num_layers: int  # L, each use in a loop counted
    ratio: float

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the batch with `residual_scales` [B, L] for the sequences at the `sample_indices` [B]."""
        keep_prob = 1 - self.ratio * np.arange(1, self.num_layers + 1) / self.num_layers  # [L]
        generators = [stream(seed, "stochastic depth", int(index)) for index in sample_indices]
        draws = np.stack([generator.random(self.num_layers) for generator in generators])  # [B, L]
        scales = np.where(draws < keep_prob, 1 / keep_prob, 0)
        return replace(batch, residual_scales=torch.from_numpy(scales.astype(np.float32)))
