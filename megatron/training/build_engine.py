"""Builds the engine of a run, FSDP2's or DeepSpeed's, and its optimizer."""

from importlib.util import find_spec

import torch

from megatron.config.flags import require
from megatron.config.parametrization import Parametrization
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.apply import build_engine
from megatron.parallel.deepspeed import DeepSpeedEngine
from megatron.parallel.deepspeed_config import deepspeed_config
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.recompute import recompute
from megatron.training.optimizer import build_optimizer, start_state


def check_engine(config: Config, world_size: int | None, bf16: bool | None) -> dict | None:
    """Return DeepSpeed's settings, or None for FSDP2; `world_size` and `bf16` are None while they are unknown.

    Raises: ConfigurationError if DeepSpeed is not installed or its file contradicts the flags.
    """
    parallel = config.parallel
    if not parallel.deepspeed:
        return None
    message = "needs the package deepspeed; bash install.sh --with-deepspeed installs it"
    require(find_spec("deepspeed") is not None, "deepspeed", True, message)
    return deepspeed_config(
        parallel.deepspeed_config,
        config.training,
        config.optimizer,
        world_size=world_size,
        bf16=bf16,
        zero_stage=parallel.zero_stage,
        cpu_offload=parallel.cpu_offload,
    )


def start_engine(
    config: Config, vocabulary: Vocabulary, ranks: ParallelContext, *, bf16: bool, compile: bool, steps: int
) -> tuple[Engine, torch.optim.Optimizer]:
    """Return the configured engine at its initial weights, and its optimizer.

    Optimizer moments are zero and the step count is `steps`, so that a checkpoint of that step can be loaded into them.

    Raises: ConfigurationError if DeepSpeed is not installed or its file contradicts the flags.
    """
    parallel = config.parallel
    seed = config.training.seed
    parametrization = Parametrization.of(config.model)
    settings = check_engine(config, ranks.size, bf16)
    if settings is None:
        engine = build_engine(
            config.model,
            vocabulary,
            seed=seed,
            ranks=ranks,
            parallel=parallel,
            bf16=bf16,
            fp8_recipe=config.training.fp8_recipe,
            compile=compile,
        )
        optimizer = build_optimizer(engine, config.optimizer, parametrization)
        start_state(optimizer, steps)
        return engine, optimizer
    model = Transformer(config.model, vocabulary)
    initialise(model, config.model, seed)
    recompute(model.to(ranks.device), parallel)
    optimizer = build_optimizer(model, config.optimizer, parametrization)
    assert isinstance(optimizer, torch.optim.AdamW)
    return DeepSpeedEngine(model, optimizer, settings, ranks, compile=compile), optimizer
