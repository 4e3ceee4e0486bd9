"""Any-order prediction: every sequence is read in an order of its own, uniform over all orders that begin at place 0.

The model is told the place of the token it must say next (target positions), which published permuted orders are not.
The mean over orders of the negative log-likelihood is an upper bound of that of their mixture, and it is the bound of
masked diffusion, one token at a time (2110.02037).
"""

from dataclasses import dataclass

import numpy as np

from megatron.batch import Batch
from megatron.objectives.autoregressive import Autoregressive, read_in_order, without_last
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.orders import any_order
from megatron.randomness import stream


@dataclass(frozen=True)
class AnyOrder(Likelihood):
    """The any-order objective; evaluated as the bound, and exactly from left to right."""

    name = "any-order"
    exact = False
    target_offset = 1

    @property
    def likelihoods(self) -> tuple[Likelihood, ...]:
        return (self, Autoregressive(told_targets=True))

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B]; every sequence counts S tokens."""
        places = [any_order(ids.shape[1], stream(seed, "any order", int(i))) for i in sample_indices]
        return _read(ids, np.stack(places))

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        Each window and replicate has one order; a token that is not scored is read last.
        """
        last = self.scored_tokens(ids.shape[1] - 1, alignment).stop
        purpose, rest = f"evaluation order/{noise.set_name}", np.arange(last, ids.shape[1])
        draws = [stream(noise.seed, purpose, noise.replicate, int(window)) for window in windows]
        batch = _read(ids, np.stack([np.concatenate((any_order(last, draw), rest)) for draw in draws]))
        return without_last(batch) if len(rest) else batch

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return slice(1, seq_length + (alignment == "published"))

    def target_token_positions(self, batch: Batch) -> np.ndarray:
        return batch.target_positions.numpy()


def _read(ids: np.ndarray, places: np.ndarray) -> Batch:
    return read_in_order(ids, places, np.ones(len(ids), np.int64), told_targets=True)
