"""Token dropout: some input tokens become [MASK], the targets stay (random input masking of 2510.04071)."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.randomness import stream


@dataclass(frozen=True)
class TokenDropout:
    """Replace a fixed share of the inputs, or a share r ~ U(0, maximum) drawn for every sequence."""

    mask_id: int
    ratio: float = 0.0
    maximum: float = 0.0

    def __call__(self, batch: Batch, positions: np.ndarray, seed: int) -> Batch:
        """Return the batch with inputs dropped; the noise is keyed by the run `positions` [B]."""
        if not (self.ratio or self.maximum):
            return batch
        dropped = np.stack([self._dropped(batch.tokens.shape[1], int(i), seed) for i in positions])
        return replace(batch, tokens=batch.tokens.masked_fill(torch.from_numpy(dropped), self.mask_id))

    def _dropped(self, seq_length: int, position: int, seed: int) -> np.ndarray:
        draw = stream(seed, "token dropout", position)
        ratio = draw.uniform(0, self.maximum) if self.maximum else self.ratio
        return draw.random(seq_length) < ratio
