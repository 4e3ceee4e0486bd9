"""Frozen models that a training run only reads: the teachers of a distillation."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from megatron.config.sections import ModelConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.tensor import apply_tensor_parallel


def build_teacher(
    config: ModelConfig,
    vocabulary: Vocabulary,
    ranks: ParallelContext,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
) -> Transformer:
    """Return this rank's part of a frozen model in `dtype`, in evaluation mode, whose weights are still to be loaded.

    It is tensor-parallel as the student is. At ZeRO stage 3 its blocks are sharded over the data-parallel ranks too;
    its embedding and head are gathered once and stay, since the student's loss reads the head after the teacher's
    forward pass. At lower stages every data-parallel rank holds it whole, as it does the student's gathered weights.
    Blocks run uncompiled.
    """
    with torch.device("meta"):
        model = Transformer(config, vocabulary)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.to(dtype)
    _, tp_size = ranks.along("tp")
    if tp_size > 1:
        apply_tensor_parallel(model, ranks.mesh["tp"])
    model.to(ranks.device).requires_grad_(False).eval()
    model.selects_scored_positions = tp_size == 1
    if parallel.fsdp_stage == 3 and not parallel.deepspeed:
        _shard(model, ranks)
    return model


def _shard(model: Transformer, ranks: ParallelContext) -> None:
    """Shard a frozen model with FSDP2; blocks are freed after use, what is outside them stays gathered."""
    is_replicated = ranks.along("replicate")[1] > 1
    mesh = ranks.mesh["replicate", "shard"] if is_replicated else ranks.mesh["shard"]
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "teacher_states")
