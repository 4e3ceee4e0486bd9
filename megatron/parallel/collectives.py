"""The two collectives of tensor parallelism with sequence parallelism; each is the other's gradient.

Between blocks every rank of a tensor-parallel group holds its shard of the sequence, [B, S/tp, H]. A column-parallel
layer reads the whole sequence; a row-parallel layer produces a partial sum for all of it.
Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2205.05198), section 4.2.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.torch_private import COLLECTIVES


def gather_sequence(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather along the sequence, [B, S/tp, H] -> [B, S, H]; the backward pass is a reduce-scatter."""
    return _GatherSequence.apply(shard, group)


def scatter_sequence(partial_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter along the sequence, [B, S, H] -> [B, S/tp, H]; the backward pass is an all-gather."""
    return _ScatterSequence.apply(partial_sum, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard, group):
        ctx.group = group
        return _all_gather(shard, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_sum, group):
        ctx.group = group
        return _reduce_scatter(partial_sum, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group), None


def _all_gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    shards = COLLECTIVES.all_gather_into_tensor(shard.contiguous(), group.size(), group.group_name)  # [tp * B, S/tp, H]
    return COLLECTIVES.wait_tensor(shards).unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(partial_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    shards = partial_sum.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1).contiguous()
    return COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(shards, "sum", group.size(), group.group_name))
