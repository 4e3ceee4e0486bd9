"""Unmasking policies: which of the masked positions a step unmasks, given a score of each, blocks and a number."""

from itertools import pairwise

import torch
from torch import Tensor


def candidates(masked: Tensor, counts: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return which positions a step may unmask, and which of these are in blocks that it finishes; both bool [R, L].

    A step unmasks `counts` [R] of the `masked` [R, L] positions, and blocks from left to right, `blocks` [L].
    """
    ordinal = masked.cumsum(1)
    # [R], the last block that the next `counts` positions reach
    last_block = torch.where(masked & (ordinal <= counts[:, None]), blocks, -1).amax(1)
    reached = masked & (blocks <= last_block[:, None])
    return reached, reached & (blocks < last_block[:, None])


def select_highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Return which elements of each row of `scores` [R, L] are its `counts` [R] highest; ties go to the left."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    return ranks < counts[:, None]


def step_sizes(num_tokens: int, tokens_per_step: int, length: int | None = None) -> list[int]:
    """Return how many of `num_tokens` positions each step unmasks, as evenly as whole numbers allow.

    A text of `length` positions that is partly unmasked already has the same steps as a masked one, and fewer of them.
    """
    length = length or num_tokens
    steps = -(-length // tokens_per_step)
    ends = [min(length * count // steps, num_tokens) for count in range(steps + 1)]
    return [after - before for before, after in pairwise(ends) if after > before]
