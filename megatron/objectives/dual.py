"""One network for two objectives: a share of the samples trains next-token prediction, the rest masked diffusion.

Masked diffusion is shifted, so that in both the output at a position speaks of the next token (2512.14549; GPT-BERT,
2410.24159). Both are evaluated: the network is at once an autoregressive model and a masked-diffusion model.
"""

from dataclasses import dataclass

import numpy as np

from megatron.batch import Batch
from megatron.objectives.base import Likelihood, Objective


@dataclass(frozen=True)
class Dual(Objective):
    """The dual objective. In each block of K sample indices the first `causal_samples` predict the next token."""

    causal: Likelihood
    masked: Likelihood
    causal_samples: int
    time_block: int  # K

    name = "dual"

    @property
    def likelihoods(self) -> tuple[Likelihood, ...]:
        return (self.causal, self.masked)

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1]; all `sample_indices` [B] of a micro-batch are of one kind."""
        causal = sample_indices % self.time_block < self.causal_samples
        if causal.any() != causal.all():
            raise ValueError(f"sample indices {sample_indices} are of both kinds")
        return (self.causal if causal.all() else self.masked).prepare(ids, sample_indices, seed)
