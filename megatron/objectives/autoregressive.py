"""Autoregressive objective: causal attention, each position predicts the next token.

orders.py and --target-offset-max change which token is the next one in training.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.orders import Orders
from megatron.randomness import stream


@dataclass(frozen=True)
class Autoregressive(Likelihood):
    """The autoregressive objective: training batches and the exact likelihood of a window.

    Training may permute the tokens of a sample and predict tokens further ahead (2606.16246: i ~ U{1, ..., max});
    evaluation reads from left to right and predicts the next token.
    """

    orders: Orders = field(default_factory=Orders)
    offset_max: int = 1
    with_target_positions: bool = False  # whether the model is given the position of its target

    name = "ar"
    exact = True  # one evaluation pass gives the likelihood, so there is no noise to replicate
    target_offset = 1  # the output at position j predicts token j + 1

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B]; every sequence counts S tokens."""
        orders = self.orders.draw(ids.shape[1], sample_indices, seed)  # [B, S+1]
        offsets = np.ones(len(ids), np.int64)  # [B]
        if self.offset_max > 1:
            generators = [stream(seed, "offset", int(index)) for index in sample_indices]
            offsets = np.array([generator.integers(1, self.offset_max + 1) for generator in generators])
        return read_in_order(ids, orders, offsets, self.with_target_positions)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the batch whose weighted nll is the exact likelihood of the scored tokens of `ids` [B, S+1]."""
        batch = read_in_order(ids, None, np.ones(len(ids), np.int64), self.with_target_positions)
        return batch if alignment == "published" else without_last(batch)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return slice(1, seq_length + (alignment == "published"))


def read_in_order(
    ids: np.ndarray, orders: np.ndarray | None, offsets: np.ndarray, with_target_positions: bool
) -> Batch:
    """Return the causal batch that reads `ids` [B, S+1] in `orders` [B, S+1]; None means from left to right.

    The target of step j is the token of step j + `offsets` [B]. With an offset i > 1 the last i - 1 steps have no
    target; the weights of the others are scaled so that all sequences weigh the same.
    """
    length = ids.shape[1] - 1
    position_ids = np.broadcast_to(np.arange(length + 1), ids.shape) if orders is None else orders  # [B, S+1]
    input_positions = position_ids[:, :-1]  # [B, S]
    target_steps = np.arange(length) + offsets[:, None]  # [B, S]
    weights = np.where(target_steps <= length, length / (length + 1 - offsets[:, None]), 0)  # [B, S]
    target_positions = np.take_along_axis(position_ids, np.minimum(target_steps, length), axis=1)  # [B, S]
    if orders is None and (offsets == 1).all():  # as below, in less time
        tokens, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    else:
        tokens = np.take_along_axis(ids, input_positions, axis=1)
        targets = np.take_along_axis(ids, target_positions, axis=1)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights.astype(np.float32)),
        counts=np.full(len(ids), length),
        causal=True,
        position_ids=None if orders is None else torch.from_numpy(input_positions.copy()),
        target_positions=torch.from_numpy(target_positions) if with_target_positions else None,
    )


def without_last(batch: Batch) -> Batch:
    """Return the batch without the target of its last position."""
    weights = batch.weights.clone()
    weights[:, -1] = 0
    return replace(batch, weights=weights, counts=batch.counts - 1, scored_positions=None)
