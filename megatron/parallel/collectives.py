"""The two conjugate operations that carry all of tensor parallelism: each is the other's gradient.

Between blocks every process of a tensor-parallel group holds its part of the sequence, [B, S/tp, H]. A layer whose
columns are split reads the whole sequence; a layer whose rows are split leaves a part of the sum for all of it.
Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2205.05198), section 4.2.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sequence(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/tp, H] -> [B, S, H]; the gradient is summed over the group and scattered."""
    return _GatherSequence.apply(part, group)


def scatter_sequence(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, H], summed over the group -> this process's [B, S/tp, H]; the gradient is gathered."""
    return _ScatterSequence.apply(whole, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        return _gather(part, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, group):
        ctx.group = group
        return _reduce_scatter(whole, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.group), None


# The functional operators return new tensors: collectives that fill a given one lose its gradient in code compiled by
# torch 2.11, without a word. Python's functions for them have other names in 2.13.
COLLECTIVES = torch.ops._c10d_functional


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = COLLECTIVES.all_gather_into_tensor(part.contiguous(), group.size(), group.group_name)
    return COLLECTIVES.wait_tensor(parts).unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = whole.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1).contiguous()
    return COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name))
