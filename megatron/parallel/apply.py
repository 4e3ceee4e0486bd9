"""The order in which a plain model becomes a parallel one, and nothing else."""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megatron.config.sections import ModelConfig, ParallelConfig, Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.compiled import compile_blocks
from megatron.parallel.engine import Engine
from megatron.parallel.float8 import round_products
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline import Pipeline, Stage, keep_stage
from megatron.parallel.recompute import recompute
from megatron.parallel.tensor import split_layers


def build_engine(
    config: ModelConfig,
    vocabulary: Vocabulary,
    seed: int,
    ranks: ParallelContext,
    parallel: ParallelConfig,
    *,
    bf16: bool,
    compile: bool,
    fp8_recipe: str | None = None,
) -> Engine:
    """Keep this process's stages -> initialise -> split layers -> 8-bit products -> recompute -> compile -> shard.

    Master weights are fp32, computation runs in bf16 or fp32, gradients are reduced in fp32. One process takes the
    same path, so parameters are DTensors everywhere and checkpoints look alike.
    """
    with torch.device("meta"):
        model = Transformer(config, vocabulary)
    compute = torch.bfloat16 if bf16 else torch.float32
    place, length = ranks.along("pp")
    chunks = parallel.chunks(len(model.layers))
    models = [keep_stage(model, place + chunk * length, length * chunks) for chunk in range(chunks)]
    for piece in models:
        piece.to_empty(device="cpu")
        initialise(piece, config, seed)
        if ranks.along("tp")[1] > 1:
            split_layers(piece, ranks.mesh["tp"])
        if not parallel.cpu_offload:
            piece.to(ranks.device)
        if fp8_recipe:
            round_products(piece, fp8_recipe, ranks.device)
        recompute(piece, parallel)
        # rows of sequences that are split differ between processes; a block that is recomputed is one function
        piece.selects_scored_positions = ranks.along("tp")[1] == 1 and parallel.recompute_granularity is None
        if compile:
            compile_blocks(piece, ranks.device)
    roots = models if length == 1 else [Stage(piece) for piece in models]
    for root, piece in zip(roots, models, strict=True):
        _shard(root, piece, ranks, parallel, compute)
    if length == 1:
        return Engine(roots, models, ranks, parallel.fsdp_stage)
    return Pipeline(roots, models, ranks, parallel.fsdp_stage, compute)


def _shard(root, model: Transformer, ranks: ParallelContext, parallel: ParallelConfig, compute: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state over the data-parallel processes.

    ZeRO 0 has one shard and as many replicas as there are processes; 1 and 2 keep parameters whole from the forward
    pass to the end of the step; 3 frees them after each use.
    """
    replicated = ranks.along("replicate")[1] > 1
    options = {
        "mesh": ranks.mesh["replicate", "shard"] if replicated else ranks.mesh["shard"],
        "reshard_after_forward": parallel.fsdp_stage == 3,
        # inputs keep their type: the rotary table stays in fp32
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy(),
    }
    for block in model.layers.values():
        fully_shard(block, **options)
    fully_shard(root, **options)
