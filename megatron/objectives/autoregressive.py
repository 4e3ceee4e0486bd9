"""Next-token prediction: a position sees itself and what stands before it, and says what comes next.

What comes next may be decided otherwise than by the text: see orders.py, and --target-offset-max.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.orders import Orders
from megatron.randomness import stream


@dataclass(frozen=True)
class Autoregressive(Likelihood):
    """The autoregressive objective: training batches and the exact likelihood of a window.

    Training may read a sample in other orders and ask for a token further ahead (2606.16246: i ~ U{1, ..., max});
    evaluation reads from left to right and asks for the next one.
    """

    orders: Orders = Orders()
    offset_max: int = 1
    told_targets: bool = False  # whether the model is told the place of the token it must say

    name = "ar"
    exact = True  # one evaluation pass is the likelihood itself, so there is no noise to replicate
    target_offset = 1  # the output at position j speaks of token j + 1

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B]; every sequence counts S tokens."""
        places = self.orders.draw(ids.shape[1], sample_indices, seed)
        offsets = np.ones(len(ids), np.int64)
        if self.offset_max > 1:
            offsets = np.array(
                [stream(seed, "offset", int(i)).integers(1, self.offset_max + 1) for i in sample_indices]
            )
        return read_in_order(ids, places, offsets, self.told_targets)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the batch whose weighted nll is the exact likelihood of the scored tokens of `ids` [B, S+1]."""
        batch = read_in_order(ids, None, np.ones(len(ids), np.int64), self.told_targets)
        return batch if alignment == "published" else without_last(batch)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return slice(1, seq_length + (alignment == "published"))


def read_in_order(ids: np.ndarray, places: np.ndarray | None, offsets: np.ndarray, told_targets: bool) -> Batch:
    """Return the causal batch that reads `ids` [B, S+1] in the order `places` [B, S+1], None from left to right.

    Each position is asked for the token `offsets` [B] further on in that order. What a sequence then lacks at its end
    is made up for by the weight of the rest, so that all sequences weigh the same.
    """
    length = ids.shape[1] - 1
    order = np.broadcast_to(np.arange(length + 1), ids.shape) if places is None else places
    asked = np.arange(length) + offsets[:, None]  # [B, S], the turn of the token asked for
    weights = np.where(asked <= length, length / (length + 1 - offsets[:, None]), 0)
    asked = np.take_along_axis(order, np.minimum(asked, length), axis=1)
    read = order[:, :-1]
    return Batch(
        tokens=torch.from_numpy(np.take_along_axis(ids, read, axis=1)),
        targets=torch.from_numpy(np.take_along_axis(ids, asked, axis=1)),
        weights=torch.from_numpy(weights.astype(np.float32)),
        counts=np.full(len(ids), length),
        causal=True,
        position_ids=None if places is None else torch.from_numpy(read.copy()),
        target_positions=torch.from_numpy(asked) if told_targets else None,
    )


def without_last(batch: Batch) -> Batch:
    """Return a batch that is not asked for the last token it reads towards."""
    weights = batch.weights.clone()
    weights[:, -1] = 0
    return replace(batch, weights=weights, counts=batch.counts - 1, scored_positions=None)
