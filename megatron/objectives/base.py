"""The interface of objectives: each makes training batches and has one or more likelihoods to evaluate."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron.batch import Batch


@dataclass(frozen=True)
class EvaluationNoise:
    """Key of one replicate of an evaluation's noise; independent of training seed, batch size and iteration."""

    seed: int
    set_name: str
    replicate: int


class Objective(ABC):
    """Makes training batches. Its `likelihoods` are evaluated; the first one decides which checkpoint is best."""

    name: str
    likelihoods: tuple["Likelihood", ...]

    def evaluations(self, set_name: str) -> Iterator[tuple[str, "Likelihood"]]:
        """Yield (record name, likelihood) for a validation set: SET for the first likelihood, else SET.NAME."""
        for likelihood in self.likelihoods:
            yield (set_name if likelihood is self.likelihoods[0] else f"{set_name}.{likelihood.name}"), likelihood

    @abstractmethod
    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1]; all noise is keyed by `seed` and the `sample_indices` [B]."""


class Likelihood(Objective):
    """An objective with a likelihood of its own, exact or bounded."""

    exact: bool  # True: one pass gives the likelihood; False: replicates of noise estimate an upper bound of the nll
    target_offset: int  # the output at position j predicts token j + target_offset

    @property
    def likelihoods(self) -> tuple["Likelihood", ...]:
        """The likelihoods that are evaluated: by default, this one."""
        return (self,)

    @abstractmethod
    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll is, or estimates, that of the scored tokens of `ids` [B, S+1].

        The rows of `ids` are windows of a validation set with the indices `windows` [B].
        """

    @abstractmethod
    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored.

        With the alignment "common" they are 1..S-1 for all objectives, with "published" all that the objective trains.
        """

    def scored(self, ids: np.ndarray, alignment: str) -> np.ndarray:
        """Return which tokens of `ids` are scored, bool [B, S+1]."""
        mask = np.zeros(ids.shape, bool)
        mask[:, self.scored_tokens(ids.shape[1] - 1, alignment)] = True
        return mask

    def target_token_positions(self, batch: Batch) -> np.ndarray:
        """Return the index 0..S in its sample of the token that each position predicts, [B, S]."""
        length = batch.tokens.shape[1]
        return np.broadcast_to(np.arange(length) + self.target_offset, batch.tokens.shape)
