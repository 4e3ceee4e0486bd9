"""Any-order autoregressive model: each sequence is predicted in a random order, uniform over those that start at 0.

Unlike published permuted orders, the model is given the position of its target. The mean negative log-likelihood over
orders is an upper bound of that of their mixture; it is the masked-diffusion bound, one token at a time (2110.02037).
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
    """The any-order objective; evaluated as a bound, and exactly from left to right."""

    name = "any-order"
    exact = False
    target_offset = 1

    @property
    def likelihoods(self) -> tuple[Likelihood, ...]:
        """The bound over random orders, and the exact likelihood from left to right."""
        return (self, Autoregressive(with_target_positions=True))

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B]; every sequence counts S tokens."""
        orders = [any_order(ids.shape[1], stream(seed, "any order", int(index))) for index in sample_indices]
        return _batch(ids, np.stack(orders))

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        Each window has one order per replicate; an unscored token comes last.
        """
        stop = self.scored_tokens(ids.shape[1] - 1, alignment).stop
        purpose = f"evaluation order/{noise.set_name}"
        unscored = np.arange(stop, ids.shape[1])
        generators = [stream(noise.seed, purpose, noise.replicate, int(window)) for window in windows]
        orders = [np.concatenate((any_order(stop, generator), unscored)) for generator in generators]
        batch = _batch(ids, np.stack(orders))
        return without_last(batch) if len(unscored) else batch

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return slice(1, seq_length + (alignment == "published"))

    def target_token_positions(self, batch: Batch) -> np.ndarray:
        """Return the index 0..S in its sample of the token that each position predicts, [B, S]."""
        assert batch.target_positions is not None
        return batch.target_positions.numpy()


def _batch(ids: np.ndarray, orders: np.ndarray) -> Batch:
    return read_in_order(ids, orders, np.ones(len(ids), np.int64), with_target_positions=True)
