"""The order in which a plain model becomes a parallel one, and nothing else: compile each block, then shard."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from megatron.parallel.mesh import Processes


def parallelise(model: nn.Module, processes: Processes, *, bf16: bool, compile: bool) -> nn.Module:
    """Shard `model` over the processes: fp32 master weights, compute in bf16 or fp32, gradients reduced in fp32.

    One process takes the same path, so parameters are DTensors everywhere and checkpoints look alike.
    """
    model.to(processes.device)
    if compile:
        for block in model.layers.values():
            block.compile(fullgraph=True, dynamic=False)
    compute = torch.bfloat16 if bf16 else torch.float32
    # inputs keep their type: the rotary table stays in fp32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers.values():
        fully_shard(block, mesh=processes.mesh, mp_policy=policy)
    return fully_shard(model, mesh=processes.mesh, mp_policy=policy)
