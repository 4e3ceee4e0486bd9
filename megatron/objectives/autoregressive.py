"""Next-token prediction: a position sees itself and what stands before it, and says what comes next."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.noise import EvaluationNoise


@dataclass(frozen=True)
class Autoregressive:
    """The autoregressive objective: training batches and the exact likelihood of a window."""

    name = "ar"
    exact = True  # one evaluation pass is the likelihood itself, so there is no noise to replicate
    target_offset = 1  # the output at position j speaks of token j + 1

    def prepare(self, ids: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the run `positions` [B]; it holds no noise."""
        weights = np.ones_like(ids[:, 1:], dtype=np.float32)
        return _batch(ids, weights)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the batch whose weighted nll is the exact likelihood of the scored tokens of `ids` [B, S+1]."""
        weights = np.ones_like(ids[:, 1:], dtype=np.float32)
        if alignment == "common":
            weights[:, -1] = 0
        return _batch(ids, weights)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return slice(1, seq_length + (alignment == "published"))


def _batch(ids: np.ndarray, weights: np.ndarray) -> Batch:
    return Batch(
        tokens=torch.from_numpy(ids[:, :-1].copy()),
        targets=torch.from_numpy(ids[:, 1:].copy()),
        weights=torch.from_numpy(weights),
        count=int(weights.sum()),
        causal=True,
    )
