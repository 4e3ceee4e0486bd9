"""Selection of the scored positions of a batch, as chunks of one size; the last block uses it."""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_CHUNKS = 8  # a chunk holds at least 1/8 of a batch's positions
ALIGNMENT = 16  # positions; bf16 matrix products are fastest with a multiple of it


class Selection(NamedTuple):
    """The scored positions, split into chunks of one size, so that compiled code sees one shape only."""

    positions: Tensor  # [R] int64, distinct flat indices into the B * S positions of a batch
    size: int  # positions of a chunk; the last chunk is padded with zeros

    @classmethod
    def of(cls, positions: Tensor, total: int) -> "Selection | None":
        """Return the selection of `positions` out of `total`; None where it would save less than one chunk."""
        size = -(-total // (MAX_CHUNKS * ALIGNMENT)) * ALIGNMENT
        return cls(positions, size) if len(positions) <= total - size else None

    def take(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the selected positions of states [B, S, H] as one or more chunks [size, H]."""
        chunks = max(1, -(-len(self.positions) // self.size))
        return _Take.apply(states.flatten(0, -2), self.positions, chunks * self.size).split(self.size)


class _Take(torch.autograd.Function):
    """Rows of a matrix, padded with zeros. Indices are distinct, so the backward pass copies instead of adding."""

    @staticmethod
    def forward(ctx, matrix, indices, padded_size):
        ctx.save_for_backward(indices)
        ctx.length = len(matrix)
        selected = matrix.new_zeros(padded_size, matrix.shape[1])
        torch.index_select(matrix, 0, indices, out=selected[: len(indices)])
        return selected

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        grad_matrix = grad_output.new_zeros(ctx.length, grad_output.shape[1])
        return grad_matrix.index_copy_(0, indices, grad_output[: len(indices)]), None, None
