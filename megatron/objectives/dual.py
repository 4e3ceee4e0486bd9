"""One model for two objectives: a share of the samples trains next-token prediction, the others masked diffusion.

Masked diffusion is shifted, so that an output predicts the next token in both (2512.14549; GPT-BERT, 2410.24159). Both
are evaluated: the model is an autoregressive and a masked-diffusion model at once.
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
        """The exact likelihood of next-token prediction, and the bound of masked diffusion."""
        return (self.causal, self.masked)

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B].

        Raises: ValueError where a micro-batch mixes samples of both objectives.
        """
        causal = sample_indices % self.time_block < self.causal_samples  # [B]
        if causal.any() != causal.all():
            raise ValueError(f"sample indices {sample_indices} belong to both objectives")
        return (self.causal if causal.all() else self.masked).prepare(ids, sample_indices, seed)
