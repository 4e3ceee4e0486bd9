"""Orders of prediction: a permutation of the positions 0..S of each sample's S+1 tokens.

Each token keeps the position id that it has in the text, and attention is causal in the order of prediction. Position 0
comes first, except from right to left.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron.randomness import stream


@dataclass(frozen=True)
class Orders:
    """Left to right, or as --num-order-list, --use-predefined-order and --right-to-left-ratio set.

    A list of N orders is drawn once from the seed, the first of them left to right; every sequence uses one of them
    (2507.15857). The k-th is uniform, or with `predefined` sorts the positions i by i + k * N(0, 1).
    """

    num_orders: int = 1
    predefined: bool = False
    right_to_left_ratio: float = 0.0

    def draw(self, length: int, sample_indices: np.ndarray, seed: int) -> np.ndarray | None:
        """Return the order of each sequence, [B, length], keyed by sample index; None where all are left to right."""
        if self.right_to_left_ratio:
            draws = [stream(seed, "direction", int(index)).random() for index in sample_indices]
            forward = np.arange(length)
            return np.stack([forward[::-1] if draw < self.right_to_left_ratio else forward for draw in draws])
        if self.num_orders == 1:
            return None
        orders = _order_list(self.num_orders, self.predefined, length, seed)
        choices = [stream(seed, "order", int(index)).integers(self.num_orders) for index in sample_indices]
        return np.stack([orders[choice] for choice in choices])


def any_order(length: int, generator: np.random.Generator) -> np.ndarray:
    """Return position 0 and then the others in a uniformly random order, [length]."""
    return np.concatenate(([0], 1 + generator.permutation(length - 1)))


@lru_cache(maxsize=2)
def _order_list(num_orders: int, predefined: bool, length: int, seed: int) -> np.ndarray:
    """Return the list of orders, [num_orders, length]."""
    orders = [np.arange(length)]
    for index in range(1, num_orders):
        generator = stream(seed, "order list", index)
        if predefined:
            shuffled = np.argsort(np.arange(length - 1) + index * generator.standard_normal(length - 1))
            orders.append(np.concatenate(([0], 1 + shuffled)))
        else:
            orders.append(any_order(length, generator))
    return np.stack(orders)
