"""What every objective is: a way to make training batches, and one or more likelihoods to evaluate."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron.batch import Batch


@dataclass(frozen=True)
class EvaluationNoise:
    """The key of one replicate of an evaluation's noise; training seed, batch size and step have no part in it."""

    seed: int
    set_name: str
    replicate: int


class Objective(ABC):
    """Makes the training batches; its `likelihoods` are evaluated, and the first decides which checkpoint is best."""

    name: str
    likelihoods: tuple["Likelihood", ...]

    def evaluations(self, set_name: str) -> Iterator[tuple[str, "Likelihood"]]:
        """Yield what a validation set is evaluated by, each under its name; the first bears that of the set."""
        for likelihood in self.likelihoods:
            yield (set_name if likelihood is self.likelihoods[0] else f"{set_name}.{likelihood.name}"), likelihood

    @abstractmethod
    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1]; all noise is keyed by `seed` and the `sample_indices` [B]."""


class Likelihood(Objective):
    """An objective that is evaluated by its own likelihood, or by a bound of it."""

    exact: bool  # one evaluation pass is the likelihood itself; else replicates of noise estimate an upper bound
    target_offset: int  # the output at position j speaks of token j + target_offset

    @property
    def likelihoods(self) -> tuple["Likelihood", ...]:
        return (self,)

    @abstractmethod
    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll is, or estimates, that of the scored tokens of `ids` [B, S+1]."""

    @abstractmethod
    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored: "common" is 1..S-1 for all; "published" trains on all."""

    def scored(self, ids: np.ndarray, alignment: str) -> np.ndarray:
        """Return which of the tokens `ids` [B, S+1] are scored."""
        mask = np.zeros(ids.shape, bool)
        mask[:, self.scored_tokens(ids.shape[1] - 1, alignment)] = True
        return mask

    def target_token_positions(self, batch: Batch) -> np.ndarray:
        """Return the place 0..S in its sample of the token that each position speaks of, [B, S]."""
        length = batch.tokens.shape[1]
        return np.broadcast_to(np.arange(length) + self.target_offset, batch.tokens.shape)
