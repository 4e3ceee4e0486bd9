"""Orders of reading: which token of a sample is read after which, drawn for every sequence.

An order is a permutation of the places 0..S of a sample's S+1 tokens. Each token keeps the rotary position of its
place, and attention is causal in the order of reading. Place 0 is read first, but from right to left.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron.randomness import stream


@dataclass(frozen=True)
class Orders:
    """Left to right, and what else --num-order-list, --use-predefined-order and --right-to-left-ratio ask for.

    A list of N orders is drawn once from the seed, the first of them left to right, and every sequence takes one of
    them (2507.15857). The k-th is uniform, or with `predefined` sorts the places by place + k * N(0, 1).
    """

    listed: int = 1
    predefined: bool = False
    right_to_left: float = 0.0

    def draw(self, length: int, sample_indices: np.ndarray, seed: int) -> np.ndarray | None:
        """Return the order of each sequence, [B, length], by run position; None where all read from left to right."""
        if self.right_to_left:
            backwards = [stream(seed, "direction", int(i)).random() < self.right_to_left for i in sample_indices]
            forwards = np.arange(length)
            return np.stack([forwards[::-1] if back else forwards for back in backwards])
        if self.listed == 1:
            return None
        orders = _listed(self.listed, self.predefined, length, seed)
        return np.stack([orders[stream(seed, "order", int(i)).integers(self.listed)] for i in sample_indices])


def any_order(length: int, draw: np.random.Generator) -> np.ndarray:
    """Return place 0 and then the others in a uniformly drawn order, [length]."""
    return np.concatenate(([0], 1 + draw.permutation(length - 1)))


@lru_cache(maxsize=2)
def _listed(count: int, predefined: bool, length: int, seed: int) -> np.ndarray:
    """Return the list of orders, [count, length]."""
    orders = [np.arange(length)]
    for index in range(1, count):
        draw = stream(seed, "order list", index)
        if predefined:
            shuffled = np.argsort(np.arange(length - 1) + index * draw.standard_normal(length - 1))
            orders.append(np.concatenate(([0], 1 + shuffled)))
        else:
            orders.append(any_order(length, draw))
    return np.stack(orders)
