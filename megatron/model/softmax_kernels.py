"""What the head's loss does to a chunk of logits, in Triton: one pass that reads them, one that overwrites them.

Logits stay in their dtype in memory and are fp32 in registers, so that no fp32 copy is made of them. The plain twin
of both is in `linear_cross_entropy`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of a row that a program holds at a time


def statistics(logits: Tensor, index: Tensor, ids: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of each row, over its first `ids` columns: maximum, sum of exp(logit - maximum), logit at `index`, sum.

    logits [C, columns], contiguous; index int64 [C]; all results fp32 [C, 1]. Without a column they are -inf, 0, what
    stands there, 0.
    """
    rows, columns = logits.shape
    results = torch.empty(4, rows, 1, device=logits.device)
    _statistics[(rows,)](logits, index, *results, ids, columns, COLUMNS=COLUMNS)
    return tuple(results)


def write_gradient_(
    logits: Tensor, index: Tensor, highest: Tensor, scale: Tensor, at_index: Tensor, everywhere: Tensor, ids: int
) -> None:
    """Overwrite logits [C, columns] by scale * exp(logit - highest) + everywhere, and + at_index at `index`.

    The columns from `ids` on become 0. highest, scale, at_index and everywhere are fp32, one a row.
    """
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, COLUMNS))
    _write_gradient[grid](logits, index, highest, scale, at_index, everywhere, ids, columns, COLUMNS=COLUMNS)


@triton.jit
def _statistics(logits, index, highest, total, at_index, added, ids, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    lane = tl.arange(0, COLUMNS)
    top = tl.full((), float("-inf"), tl.float32)
    powers = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, ids, COLUMNS):
        here = start + lane < ids
        # masked by a multiple of 128, so that loads are wide
        values = tl.load(logits + start + lane, mask=start + lane < columns, other=0.0).to(tl.float32)
        values = tl.where(here, values, float("-inf"))
        new_top = tl.maximum(top, tl.max(values, 0))
        powers = powers * tl.exp(top - new_top) + tl.sum(tl.exp(values - new_top), 0)
        plain += tl.sum(tl.where(here, values, 0.0), 0)
        top = new_top
    tl.store(highest + row, top)
    tl.store(total + row, powers)
    tl.store(at_index + row, tl.load(logits + tl.load(index + row)).to(tl.float32))
    tl.store(added + row, plain)


@triton.jit
def _write_gradient(logits, index, highest, scale, at_index, everywhere, ids, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(highest + row)) * tl.load(scale + row) + tl.load(everywhere + row)
    gradient += tl.where(column == tl.load(index + row), tl.load(at_index + row), 0.0)
    gradient = tl.where(column < ids, gradient, 0.0)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
