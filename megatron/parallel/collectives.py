"""The two conjugate operations that carry all of tensor parallelism: each is the other's gradient.

Between blocks every process of a tensor-parallel group holds its part of the sequence, [B, S/tp, H]. A layer whose
columns are split reads the whole sequence; a layer whose rows are split leaves a part of the sum for all of it.
Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2205.05198), section 4.2.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames what 2.11 has under the older names only
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    batch, length, width = part.shape
    parts = part.new_empty(group.size() * batch, length, width)
    all_gather(parts, part.contiguous(), group=group)
    return parts.unflatten(0, (group.size(), batch)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = whole.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    part = torch.empty_like(parts[0])
    reduce_scatter(part, parts.flatten(0, 1), group=group)
    return part
