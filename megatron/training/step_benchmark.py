"""Benchmarks a few training steps on random text: speed and peak memory of a configuration on this machine."""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from megatron.batch import Batch
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.documents import DocumentRules
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, capabilities, document_rules
from megatron.parallel.launch import world_size
from megatron.parallel.mesh import ParallelContext, initialize_parallel
from megatron.parallel.meta_gradient import MetaGradient
from megatron.torch_private import forget_compiled_code
from megatron.training.build_engine import start_engine
from megatron.training.device_info import peak_memory
from megatron.training.environment import choose_precision, prepare_device
from megatron.training.load_run import Trained
from megatron.training.microbatches import MicroBatches
from megatron.training.step import train_step
from megatron.training.teachers import attach_teachers, open_teachers

WARM_UP = 3  # untimed steps: the first compiles, the next two fill caches


@dataclass(frozen=True)
class Trial:
    """Measurements of a configuration over some steps; times are wall-clock seconds."""

    seconds_per_step: float
    tokens_per_second: float  # over all ranks
    first_step_seconds: float
    memory_bytes: int  # peak of this rank: allocated on the GPU, or resident on the CPU
    loss: float  # of the last step, as is the gradient norm
    grad_norm: float


@dataclass(frozen=True)
class RandomText:
    """Random samples [S + 1] by sample index, in the form that training reads."""

    vocabulary_size: int
    seq_length: int

    def __getitem__(self, sample_index: int) -> np.ndarray:
        return np.random.default_rng(sample_index).integers(0, self.vocabulary_size, self.seq_length + 1)


def random_batches(
    config: Config, vocabulary: Vocabulary, ranks: ParallelContext, *, documents: DocumentRules | None, steps: int
) -> MicroBatches:
    """Return this rank's micro-batches of `steps` steps on random text, as training prepares them."""
    training = config.training
    return MicroBatches(
        RandomText(vocabulary.size, config.data.seq_length),
        build_objective(config.objective, vocabulary, training.global_batch_size, documents),
        build_input_noise(config.objective, vocabulary, config.model.depth),
        seed=training.seed,
        first_sample=0,
        train_samples=steps * training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        rank=ranks.data_rank,
        size=ranks.data_size,
    )


def batches_by_step(data: MicroBatches, device: torch.device) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step, on CUDA in pinned memory, as the training loader does."""
    for step in range(data.steps):
        batches = [batch for index in range(data.per_step) for batch in data[step * data.per_step + index]]
        yield [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


def attempt(config: Config, vocabulary: Vocabulary, steps: int) -> Trial | str:
    """Run `steps` timed steps after `WARM_UP` untimed ones; return the measurements, or one line on why it failed.

    A collective call. It initialises the process group and does not destroy it.

    Raises: torch.OutOfMemoryError on the rank that runs out of memory, if there are several ranks.
    """
    try:
        # id 0 serves as the end-of-document token
        documents = document_rules(config.data, config.objective, eod=0)
        ranks = _join(config)
        teachers = ranks.from_rank_0(lambda: open_teachers(config, vocabulary, ranks.size))
    except ConfigurationError as error:
        return f"refused: {error}"
    forget_compiled_code()
    gc.collect()  # sharded modules contain reference cycles
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return _measure(config, vocabulary, ranks, documents=documents, teachers=teachers, steps=steps)
    except torch.OutOfMemoryError as error:
        if ranks.size > 1:
            raise  # other ranks wait in a collective; the launcher ends them
        return f"out of memory: {str(error).splitlines()[0]}"


def _join(config: Config) -> ParallelContext:
    """Return the ranks of the configured layout; a collective call. Raises: ConfigurationError if it does not fit."""
    parallel = config.parallel
    check_layout(config, world_size())
    check_batch(config, world_size(), capabilities(config.objective.objective))
    ranks = initialize_parallel(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(world_size())),
    )
    prepare_device(config, ranks.device)
    return ranks


def _measure(
    config: Config,
    vocabulary: Vocabulary,
    ranks: ParallelContext,
    *,
    documents: DocumentRules | None,
    teachers: Sequence[Trained],
    steps: int,
) -> Trial:
    """Return the measurements of `steps` steps after `WARM_UP` untimed ones."""
    bf16, compile = choose_precision(config, ranks.device) == "bf16", bool(config.training.compile)
    engine, optimizer = start_engine(config, vocabulary, ranks, bf16=bf16, compile=compile, steps=0)
    attach_teachers(engine, teachers, config, bf16=bf16)
    data = random_batches(config, vocabulary, ranks, documents=documents, steps=WARM_UP + steps)
    meta_gradient = MetaGradient.at(config.optimizer, config.optimizer.lr)
    seconds = []
    for batches in batches_by_step(data, ranks.device):
        start = time.perf_counter()
        rates = {"learning_rate": 1e-4, "weight_decay": 0.1, "meta_gradient": meta_gradient}
        result = train_step(engine, optimizer, batches, **rates, clip_grad=1.0)
        (loss,) = ranks.sum(float(result.loss))  # synchronises with the device
        seconds.append(time.perf_counter() - start)
    seconds_per_step = ranks.from_rank_0(lambda: median(seconds[WARM_UP:]))  # so that all ranks decide alike
    return Trial(
        seconds_per_step=seconds_per_step,
        tokens_per_second=config.training.global_batch_size * config.data.seq_length / seconds_per_step,
        first_step_seconds=seconds[0],
        memory_bytes=peak_memory(ranks.device),
        loss=loss,
        grad_norm=float(result.grad_norm),
    )
