"""The scored positions, taken out before the last block would finish the others.

Nothing reads what the last block makes of a position that is not scored, beside its keys and values. So its output
projection and its MLP, the final norm and the head act on the scored positions only: for masked diffusion, on half.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PARTS = 8  # of the positions of a batch, at most
ALIGNED = 16  # rows that matrix products of bf16 like a multiple of


class Selection(NamedTuple):
    """The scored positions and how they are cut into parts of one size, so that compiled code sees one shape only."""

    rows: Tensor  # [R] int64, distinct indices into the N positions of a batch
    size: int  # rows of a part; the last one is filled up with zeros

    @classmethod
    def of(cls, rows: Tensor, positions: int) -> "Selection | None":
        """Return the selection of `rows` out of `positions`; None where it would save nothing."""
        size = -(-positions // (PARTS * ALIGNED)) * ALIGNED
        return cls(rows, size) if len(rows) <= positions - size else None

    def take(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the parts [size, H], at least one, of the rows of states [B, S, H]."""
        count = max(1, -(-len(self.rows) // self.size))
        return _Take.apply(states.flatten(0, -2), self.rows, count * self.size).split(self.size)


class _Take(torch.autograd.Function):
    """Rows of a matrix, filled up with zeros; they are distinct, which autograd's own gradient could not count on."""

    @staticmethod
    def forward(ctx, matrix, rows, size):
        ctx.save_for_backward(rows)
        ctx.length = len(matrix)
        taken = matrix.new_zeros(size, matrix.shape[1])
        torch.index_select(matrix, 0, rows, out=taken[: len(rows)])
        return taken

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.length, gradient.shape[1])
        return whole.index_copy_(0, rows, gradient[: len(rows)]), None, None
