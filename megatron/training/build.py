"""Builds a run: a configuration becomes the parts that the trainer works with.

resolve_run   data, vocabulary and plan; checks that need no device
dry_run       prints them, and makes the checks that a start would make
build_run     joins the ranks, opens the run folder, restores the checkpoint and assembles the parts
"""

import json
import os
from dataclasses import asdict, dataclass

import torch

from megatron import stop_signals
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import Plan, resolve
from megatron.config.sections import Config
from megatron.config.sizes import flops_per_token
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.base import Objective
from megatron.objectives.documents import DocumentRules
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, capabilities, document_rules
from megatron.parallel.engine import Engine
from megatron.parallel.float8 import check_float8
from megatron.parallel.launch import rank, world_size
from megatron.parallel.mesh import ParallelContext, initialize_parallel
from megatron.stop_signals import StopRequested
from megatron.training.averaging import Average, start_average
from megatron.training.build_engine import check_engine, start_engine
from megatron.training.checkpoint_store import load_checkpoint
from megatron.training.datasets import Sources, open_sources
from megatron.training.environment import (
    check_kernels,
    choose_compile,
    choose_precision,
    describe,
    prepare_device,
    stated_precision,
)
from megatron.training.exit_conditions import on_any_rank, signal_reason
from megatron.training.microbatches import MicroBatches
from megatron.training.progress import Progress
from megatron.training.resume import Origin, check_run, open_run
from megatron.training.run_folder import RunFolder
from megatron.training.teachers import attach_teachers, check_same_teachers, describe_teachers, open_teachers
from megatron.training.trackers.base import TrackedRun
from megatron.training.trackers.registry import Trackers, check_packages, start_trackers
from megatron.validation.evaluate import ValidationSet


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A configuration with its data and plan, before any device is used."""

    config: Config
    sources: Sources
    vocabulary: Vocabulary
    plan: Plan
    documents: DocumentRules | None

    def objective(self, time_block: int) -> Objective:
        """Return the objective; the times of `time_block` samples are stratified together."""
        return build_objective(self.config.objective, self.vocabulary, time_block, documents=self.documents)


@dataclass(frozen=True, kw_only=True)
class Device:
    """The ranks of a run and how this rank computes."""

    ranks: ParallelContext
    precision: str  # "bf16" or "fp32"
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The model of this rank, its optimizer and averaged weights, and how far the run has come."""

    engine: Engine
    optimizer: torch.optim.Optimizer
    average: Average | None
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run consists of; `Trainer` puts it to work."""

    run: ResolvedRun
    device: Device
    state: TrainingState
    data: MicroBatches
    folder: RunFolder | None  # on rank 0, with --save
    origin: Origin | None  # the checkpoint that the run resumes from
    trackers: Trackers
    description: dict  # contents of config.json; also in every checkpoint's meta.json
    validated: dict[int, float]  # loss on the first validation set by iteration

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.run.config

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.run.plan

    @property
    def ranks(self) -> ParallelContext:
        """The ranks."""
        return self.device.ranks

    @property
    def progress(self) -> Progress:
        """The progress, which training updates."""
        return self.state.progress

    @property
    def objective(self) -> Objective:
        """The objective."""
        return self.data.objective

    @property
    def validation_sets(self) -> list[ValidationSet]:
        """The held-out sets; the loss on the first one selects the best checkpoint."""
        return self.run.sources.validation

    def epoch(self, samples: int) -> float:
        """Return the epoch after `samples` consumed samples."""
        return samples * self.config.data.seq_length / self.plan.unique_tokens


def resolve_run(config: Config) -> ResolvedRun:
    """Return a run with its data open and its plan, after the checks that need no device.

    Raises: ConfigurationError for user errors.
    """
    check_packages(config)
    sources = open_sources(config)
    if config.validation.skip_train and not sources.validation:
        raise ConfigurationError("--skip-train: there is nothing to evaluate; give --valid-data-path")
    vocabulary = Vocabulary(sources.tokenizer.vocabulary_size)
    plan = resolve(config, vocabulary, sources.train.unique_tokens, capabilities(config.objective.objective))
    documents = document_rules(config.data, config.objective, sources.tokenizer.eod)
    run = ResolvedRun(config=config, sources=sources, vocabulary=vocabulary, plan=plan, documents=documents)
    run.objective(config.training.global_batch_size)  # rejects invalid settings before anything is started
    size = _known_world_size(config) or config.parallel.fewest_ranks
    check_layout(config, size)
    if not config.validation.skip_train:
        check_batch(config, size, capabilities(config.objective.objective))
    return run


def _known_world_size(config: Config) -> int | None:
    """Return the world size, or None for a dry run without a launcher."""
    return world_size() if "WORLD_SIZE" in os.environ or not config.training.dry_run else None


def dry_run(run: ResolvedRun) -> None:
    """Make the checks of a start without a device, and print the resolved configuration on rank 0.

    Raises: ConfigurationError for user errors.
    """
    config = run.config
    check_float8(config, None)
    check_kernels(config)
    precision = stated_precision(config)
    check_engine(config, _known_world_size(config), None if precision is None else precision == "bf16")
    origin = check_run(config, run.plan, run.sources, precision)
    world_size = _known_world_size(config) or config.parallel.fewest_ranks
    opened = open_teachers(config, run.vocabulary, world_size, tokenizer=run.sources.tokenizer)
    teachers = describe_teachers(opened, config, run.plan)
    check_same_teachers(origin, teachers, config)
    if rank() == 0:
        resolved = {"objective_name": config.objective.objective, "plan": amounts(run), **asdict(config)}
        resolved |= {"teachers": teachers}
        print(json.dumps(resolved, indent=1))


def amounts(run: ResolvedRun) -> dict:
    """Return the plan and the run's totals: tokens, epochs and FLOPs by every convention.

    Members of a blend have separate epochs; those of the run count the tokens of all members together.
    """
    config, plan, sources = run.config, run.plan, run.sources
    tokens = plan.train_samples * config.data.seq_length
    flops = flops_per_token(config.model, run.vocabulary, config.data.seq_length)
    return asdict(plan) | {
        "train_tokens": tokens,
        "epochs": tokens / plan.unique_tokens,
        "unique_tokens_by_data_set": sources.unique_tokens(),
        "epochs_by_data_set": dict(zip(sources.train_prefixes, sources.train.epochs(plan.train_samples))),
        "flops": {convention: per_token * tokens * plan.passes for convention, per_token in flops.items()},
    }


def build_run(run: ResolvedRun, command: str) -> RunParts:
    """Return the parts of a run that is ready to train or evaluate; `command` is its command line. A collective call.

    Raises: StopRequested if a signal arrived before the first step; LockError if another process writes the run
    folder; ConfigurationError for user errors.
    """
    config, skip_train = run.config, run.config.validation.skip_train
    device = _join(run)
    if not skip_train:
        stop_signals.defer()  # from here on all ranks stop together: rank 0 is about to lock the run folder
        device.ranks.sum(0)  # a barrier: no rank exits alone after it
    folder, origin = open_run(config, run.plan, run.sources, precision=device.precision, ranks=device.ranks)
    tokenizer = run.sources.tokenizer
    opened = device.ranks.from_rank_0(
        lambda: open_teachers(config, run.vocabulary, device.ranks.size, tokenizer=tokenizer)
    )
    teachers = describe_teachers(opened, config, run.plan)
    check_same_teachers(origin, teachers, config)
    state = _restore(run, device, origin)
    attach_teachers(state.engine, opened, config, bf16=device.precision == "bf16")
    past_records = origin.records if origin else []
    description = describe(
        config,
        run.plan,
        run.sources,
        vocabulary=run.vocabulary,
        ranks=device.ranks,
        precision=device.precision,
        compiled=device.compiled,
        command=command,
    )
    description["branched_from"] = origin.branched_from if origin else None
    description["teachers"] = teachers
    data = _micro_batches(run, device.ranks, state.progress)
    _stop_before_training(data, device.ranks, folder, state.progress)
    if folder:
        folder.start(description, past_records, origin.run if origin else folder.path)
    is_first = device.ranks.rank == 0
    tracked = TrackedRun(folder, description, past_records)
    trackers = start_trackers(config, tracked) if is_first else Trackers({})
    return RunParts(
        run=run,
        device=device,
        state=state,
        data=data,
        folder=folder,
        origin=origin,
        trackers=trackers,
        description=description,
        validated={record["iteration"]: record["loss"] for record in past_records if _selects(record, run.sources)},
    )


def _join(run: ResolvedRun) -> Device:
    """Join the ranks in the configured layout and prepare this rank's device. A collective call."""
    config, parallel = run.config, run.config.parallel
    ranks = initialize_parallel(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(world_size())),
        minutes=parallel.distributed_timeout_minutes,
    )
    prepare_device(config, ranks.device)
    if not config.validation.skip_train:
        run.sources.train.request(run.plan.train_samples)
    # nodes may differ in native bf16 support
    precision = ranks.from_rank_0(lambda: choose_precision(config, ranks.device))
    return Device(ranks=ranks, precision=precision, compiled=choose_compile(config, run.plan, ranks))


def _restore(run: ResolvedRun, device: Device, origin: Origin | None) -> TrainingState:
    """Return the model at its initial weights, or at those of the checkpoint `origin`. A collective call."""
    config = run.config
    steps = origin.meta["iteration"] if origin else 0
    bf16 = device.precision == "bf16"
    engine, optimizer = start_engine(
        config, run.vocabulary, device.ranks, bf16=bf16, compile=device.compiled, steps=steps
    )
    progress = Progress(time_block=config.training.global_batch_size)
    if origin:
        tensors = engine.tensors(optimizer)
        load_checkpoint(origin.checkpoint, tensors)
        engine.load(tensors, steps)
        progress = Progress.from_meta(origin.meta)
    average = start_average(engine, config.optimizer, origin)
    return TrainingState(engine=engine, optimizer=optimizer, average=average, progress=progress)


def _micro_batches(run: ResolvedRun, ranks: ParallelContext, progress: Progress) -> MicroBatches:
    """Return this rank's training data from `progress` on."""
    config = run.config
    return MicroBatches(
        run.sources.train,
        run.objective(progress.time_block),
        build_input_noise(config.objective, run.vocabulary, config.model.depth),
        seed=config.training.seed,
        first_sample=progress.consumed_samples,
        train_samples=run.plan.train_samples,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        rank=ranks.data_rank,
        size=ranks.data_size,
    )


def _stop_before_training(
    data: MicroBatches, ranks: ParallelContext, folder: RunFolder | None, progress: Progress
) -> None:
    """Raise StopRequested if a signal has reached any rank and there are steps to train. A collective call.

    Raises: StopRequested then.
    """
    reason = on_any_rank(signal_reason(), ranks)
    if reason and data.steps:
        if folder:
            folder.status("stopped", reason, progress.iteration, progress.consumed_samples)
        raise StopRequested(reason)


def _selects(record: dict, sources: Sources) -> bool:
    """Return whether a record belongs to the first validation set, whose loss selects the best checkpoint."""
    return record["kind"] == "valid" and record["set"] in [data.name for data in sources.validation[:1]]
