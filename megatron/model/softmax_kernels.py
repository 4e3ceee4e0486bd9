"""Triton kernels of the head's loss for a chunk of logits: one pass reads them, one overwrites them.

Logits keep their dtype in memory and are fp32 in registers, so no fp32 copy is allocated. `linear_cross_entropy` has
the same computation in plain PyTorch.
"""

# Triton comes with CUDA builds of torch only
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # columns of a row that a program holds at a time


def statistics(logits: Tensor, index: Tensor, num_ids: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return maximum, sum of exp(logit - maximum), logit at `index`, and sum of each row's first `num_ids` columns.

    logits [C, V], contiguous; index int64 [C, 1]; all results fp32 [C, 1]. With `num_ids` 0 they are -inf, 0, the
    logit at `index`, 0.
    """
    rows, columns = logits.shape
    maximum, sum_exp, logit_at_index, sum_logits = torch.empty(4, rows, 1, device=logits.device)
    _statistics[(rows,)](logits, index, maximum, sum_exp, logit_at_index, sum_logits, num_ids, columns, COLUMNS=COLUMNS)
    return maximum, sum_exp, logit_at_index, sum_logits


def write_gradient_(
    logits: Tensor,
    index: Tensor,
    *,
    max_logit: Tensor,
    scale: Tensor,
    at_index: Tensor,
    everywhere: Tensor,
    num_ids: int,
) -> None:
    """Overwrite logits [C, V] with scale * exp(logit - max_logit) + everywhere, + at_index at `index`.

    The columns from `num_ids` on become 0. max_logit, scale, at_index and everywhere are fp32 [C, 1].
    """
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, COLUMNS))
    _write_gradient[grid](logits, index, max_logit, scale, at_index, everywhere, num_ids, columns, COLUMNS=COLUMNS)


@triton.jit
def _statistics(logits, index, max_logit, sum_exp, logit_at_index, sum_logits, num_ids, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    lane = tl.arange(0, COLUMNS)
    running_max = tl.full((), float("-inf"), tl.float32)
    running_exp = tl.full((), 0.0, tl.float32)
    running_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, num_ids, COLUMNS):
        is_id = start + lane < num_ids
        # the mask is a multiple of 128, so that loads are vectorised
        values = tl.load(logits + start + lane, mask=start + lane < columns, other=0.0).to(tl.float32)
        values = tl.where(is_id, values, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(values, 0))
        running_exp = running_exp * tl.exp(running_max - new_max) + tl.sum(tl.exp(values - new_max), 0)
        running_sum += tl.sum(tl.where(is_id, values, 0.0), 0)
        running_max = new_max
    tl.store(max_logit + row, running_max)
    tl.store(sum_exp + row, running_exp)
    tl.store(logit_at_index + row, tl.load(logits + tl.load(index + row)).to(tl.float32))
    tl.store(sum_logits + row, running_sum)


@triton.jit
def _write_gradient(logits, index, max_logit, scale, at_index, everywhere, num_ids, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(max_logit + row)) * tl.load(scale + row) + tl.load(everywhere + row)
    gradient += tl.where(column == tl.load(index + row), tl.load(at_index + row), 0.0)
    gradient = tl.where(column < num_ids, gradient, 0.0)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
