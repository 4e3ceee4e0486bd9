"""Turns a plain model into a parallel one; the order of the steps is in `build_engine`."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megatron.config.sections import ModelConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.compiled import compile_blocks
from megatron.parallel.engine import Engine
from megatron.parallel.float8 import convert_to_float8
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline import Pipeline, Stage, extract_stage
from megatron.parallel.recompute import recompute
from megatron.parallel.tensor import apply_tensor_parallel


def build_engine(
    config: ModelConfig,
    vocabulary: Vocabulary,
    ranks: ParallelContext,
    parallel: ParallelConfig,
    *,
    seed: int,
    bf16: bool,
    compile: bool,
    fp8_recipe: str | None = None,
) -> Engine:
    """Return the engine of this rank's part of a freshly initialised model.

    1. Keep the pipeline stages of this rank (on the meta device).
    2. Initialise; weights depend on the seed and their names, not on the layout.
    3. Replace layers by tensor-parallel ones.
    4. Compute the matrix products of the blocks in float8.
    5. Apply activation checkpointing.
    6. Compile the blocks: as one graph where step 7 makes them one group.
    7. Shard with FSDP2 as the ZeRO stage says.

    Master weights are fp32, computation runs in bf16 or fp32, gradients are reduced in fp32. World size 1 takes the
    same path, so parameters are DTensors everywhere and checkpoints have one format.
    """
    with torch.device("meta"):
        model = Transformer(config, vocabulary)
    compute_dtype = torch.bfloat16 if bf16 else torch.float32
    one_group = is_one_group(sum(parameter.numel() for parameter in model.parameters()), ranks.size, parallel)
    pp_rank, pp_size = ranks.along("pp")
    _, tp_size = ranks.along("tp")
    num_chunks = parallel.chunks(len(model.layers))
    models = [extract_stage(model, pp_rank + chunk * pp_size, pp_size * num_chunks) for chunk in range(num_chunks)]
    for chunk in models:
        chunk.to_empty(device="cpu")
        initialise(chunk, config, seed)
        if tp_size > 1:
            apply_tensor_parallel(chunk, ranks.mesh["tp"])
        if not parallel.cpu_offload:
            chunk.to(ranks.device)
        if fp8_recipe:
            convert_to_float8(chunk, fp8_recipe, ranks.device)
        recompute(chunk, parallel)
        # With tensor parallelism the sequence is sharded and scored positions differ between ranks; activation
        # checkpointing wraps a block as one function.
        chunk.selects_scored_positions = tp_size == 1 and parallel.recompute_granularity is None
        if compile:
            compile_blocks(chunk, ranks.device, compute_dtype, as_one_graph=one_group)
    stages = [Stage(chunk) for chunk in models] if pp_size > 1 else []
    for root, chunk in zip(stages or models, models, strict=True):
        _shard(root, () if one_group else chunk.layers.values(), ranks, parallel, dtype=compute_dtype)
    if stages:
        return Pipeline(stages, models, ranks, zero_stage=parallel.fsdp_stage, dtype=compute_dtype)
    return Engine(models, models, ranks, zero_stage=parallel.fsdp_stage, skips_hooks=one_group)


# the largest models that are one group: a single rank has 1 GB of gradients in fp32, several reduce them at once
ONE_GROUP_PARAMETERS = {"one rank": 250_000_000, "several ranks": 50_000_000}


def is_one_group(parameters: int, world_size: int, parallel: ParallelConfig) -> bool:
    """Return whether all parameters are one group of FSDP2: of small models with data parallelism only.

    The hooks of the blocks take the host longer than the blocks of such models take a device, and one group lets the
    blocks be one graph. Its gradients are reduced at once, in 4 bytes per parameter, and not while blocks are computed:
    there is nothing to overlap on a single rank, and little on several. ZeRO 2 reduces them at every micro-batch.
    """
    is_single = world_size == 1
    limit = ONE_GROUP_PARAMETERS["one rank" if is_single else "several ranks"]
    is_split = parallel.tensor_model_parallel_size > 1 or parallel.pipeline_model_parallel_size > 1
    highest_stage = 2 if is_single else 1
    return parameters <= limit and not is_split and parallel.fsdp_stage <= highest_stage and not parallel.cpu_offload


def _shard(
    root: nn.Module,
    groups: Iterable[nn.Module],
    ranks: ParallelContext,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
) -> None:
    """Shard parameters, gradients and optimizer state over the data-parallel ranks with FSDP2.

    ZeRO stage 0 has shards of size 1 and as many replicas as data-parallel ranks; stages 1 and 2 keep parameters
    gathered from the forward pass to the end of the step; stage 3 frees them after each use. The parameters of each of
    `groups`, and the others of `root`, are one group of FSDP2.
    """
    is_replicated = ranks.along("replicate")[1] > 1
    options = {
        "mesh": ranks.mesh["replicate", "shard"] if is_replicated else ranks.mesh["shard"],
        "reshard_after_forward": parallel.fsdp_stage == 3,
        # inputs keep their dtype: the rotary table stays in fp32
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy(),
    }
    for group in groups:
        fully_shard(group, **options)
    fully_shard(root, **options)
