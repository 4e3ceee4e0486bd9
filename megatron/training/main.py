"""Entry point of a training run: parse, resolve, build, train, and report errors."""

import os

# libgomp reads this when torch is loaded: spinning threads slow a busy machine down by a large factor
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from megatron import stop_signals
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import Plan, no_op_flags, resolve
from megatron.config.sections import Config
from megatron.config.sizes import flops_per_token
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, capabilities, document_rules
from megatron.parallel.failure_detector import PATIENCE, FailureDetector, RankError
from megatron.parallel.float8 import check_float8
from megatron.parallel.launch import adopt_launcher, join, local_rank, rank, world_size
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.stop_signals import StopRequested
from megatron.training import checkpoint
from megatron.training.averaging import start_average
from megatron.training.build_engine import check_engine, start_engine
from megatron.training.command_line import parse_run
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
from megatron.training.optimizer import parameter_table
from megatron.training.resume import check_run, open_run
from megatron.training.run_folder import LockError
from megatron.training.trackers import Trackers, check_packages, start_trackers
from megatron.training.trainer import DivergedError, Progress, Trainer

logger = logging.getLogger(__name__)

SILENCE = 5.0  # seconds that other local ranks wait before they repeat the error of local rank 0


def main(objective: str, arguments: list[str] | None = None) -> None:
    """Start a training run from the command line; `objective` is the default of --objective.

    Exit codes: 0 finished, --exit-code-when-stopped stopped on request, 2 user error, 75 another process writes the
    run, 1 anything else.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join([sys.argv[0], *arguments])
    try:
        start(lambda: parse_run(objective, arguments), lambda config, detector: run(config, command, detector))
    finally:
        stop_signals.ignore()


def start(read: Callable[[], Config], work: Callable[[Config, FailureDetector | None], int | None]) -> None:
    """Join the ranks of the job, do its `work` and exit with the codes of `main`.

    `read` returns the configuration and `work` the exit code, where None means 0.
    """
    detector, code = None, 0
    try:
        adopt_launcher()
        configure_logging()
        config = read()
        minutes = config.parallel.distributed_timeout_minutes
        if not config.training.dry_run:
            detector = join(minutes)
        code = work(config, detector) or 0
        if detector:
            detector.leave(minutes)
            destroy_parallel()
    except (ConfigurationError, DivergedError, RankError) as error:
        code = say(error, 2 if isinstance(error, ConfigurationError) else 1, detector)
    except LockError as error:
        code = say(error, os.EX_TEMPFAIL, detector)
    except OSError as error:
        code = say(error, 1, detector, PATIENCE)
    except BaseException as error:
        if detector is None:
            raise
        time.sleep(PATIENCE)  # if another rank's death made a collective fail, the detector ends this process meanwhile
        traceback.print_exc()
        detector.report(_describe_failure(error, detector.rank, minutes), 1)
    finally:
        if detector is None:
            destroy_parallel()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # a gloo thread may outlive its group and abort the interpreter at exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _describe_failure(error: BaseException, rank: int, minutes: float) -> str:
    first_line = str(error).strip().partition("\n")[0]
    if "Timed out waiting" in first_line:  # message of gloo
        return (
            f"--distributed-timeout-minutes {minutes:g}: rank {rank} waited that long for another rank; one hangs, "
            "or the timeout is too short for its work"
        )
    return f"rank {rank} failed with {type(error).__name__}: {first_line}"


def say(error: BaseException, code: int, detector: FailureDetector | None = None, patience: float = 0.0) -> int:
    """Print an error once per node and return the exit code; with a `detector`, end all ranks instead."""
    if detector:
        time.sleep(patience)
        detector.report(str(error), code)
    with suppress(ConfigurationError):  # the launcher's variables may be the error
        if isinstance(error, ConfigurationError) and local_rank() > 0:
            time.sleep(SILENCE)  # if local rank 0 prints the same error, the launcher ends this process meanwhile
    print(f"error: {error}", file=sys.stderr)
    return code


def run(config: Config, command: str, detector: FailureDetector | None) -> int:
    """Build a run and train it; return the exit code."""
    try:
        finished = train(config, command, detector)
    except StopRequested as request:  # on every rank
        finished = False
        if rank() == 0:
            logger.info("stopped by %s before the first step: nothing was trained", request)
    return 0 if finished else config.training.exit_code_when_stopped


def train(config: Config, command: str, detector: FailureDetector | None) -> bool:
    """Build a run and train or evaluate it; return whether it finished.

    Raises: StopRequested if a signal arrived before the first step; ConfigurationError for user errors.
    """
    objective = config.objective.objective
    check_packages(config)
    sources = open_sources(config)
    if config.validation.skip_train and not sources.validation:
        raise ConfigurationError("--skip-train: there is nothing to evaluate; give --valid-data-path")
    vocabulary = Vocabulary(sources.tokenizer.vocabulary_size)
    plan = resolve(config, vocabulary, sources.train.unique_tokens, capabilities(objective))
    documents = document_rules(config.data, config.objective, sources.tokenizer.eod)
    objective_for = partial(build_objective, config.objective, vocabulary, documents=documents)
    objective_for(config.training.global_batch_size)  # rejects invalid settings before anything is started
    parallel = config.parallel
    size_known = "WORLD_SIZE" in os.environ or not config.training.dry_run
    size = world_size() if size_known else parallel.fewest_ranks
    check_layout(config, size)
    if not config.validation.skip_train:
        check_batch(config, size, capabilities(objective))
    if config.training.dry_run:
        check_float8(config, None)
        check_kernels(config)
        precision = stated_precision(config)
        check_engine(config, size if size_known else None, None if precision is None else precision == "bf16")
        check_run(config, plan, objective, sources, precision)
        if rank() == 0:
            print(json.dumps(resolved(config, plan, vocabulary, sources), indent=1))
        return True
    ranks = initialize_parallel(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(world_size())),
        minutes=parallel.distributed_timeout_minutes,
    )
    prepare_device(config, ranks.device)
    if not config.validation.skip_train:
        sources.train.request(plan.train_samples)
    # nodes may differ in native bf16 support
    precision = ranks.from_rank_0(lambda: choose_precision(config, ranks.device))
    compiled = choose_compile(config, plan, ranks)
    if not config.validation.skip_train:
        stop_signals.defer()  # from here on all ranks stop together: rank 0 is about to lock the run folder
        ranks.sum(0)  # a barrier: no rank exits alone after it
    folder, origin = open_run(config, plan, objective, sources, precision, ranks)

    steps = origin.meta["iteration"] if origin else 0
    bf16 = precision == "bf16"
    engine, optimizer = start_engine(config, vocabulary, ranks, bf16=bf16, compile=compiled, steps=steps)
    progress = Progress(time_block=config.training.global_batch_size)
    if origin:
        state = engine.tensors(optimizer)
        checkpoint.load(origin.checkpoint, state)
        engine.load(state, steps)
        fields = ("iteration", "consumed_samples", "seconds", "time_block")
        progress = Progress(*(origin.meta[name] for name in fields))
    average = start_average(engine, config.optimizer, origin)
    past_records = origin.records if origin else []
    description = describe(objective, config, plan, sources, vocabulary, ranks, precision, compiled, command)
    description["branched_from"] = origin.branched_from if origin else None
    data = MicroBatches(
        sources.train,
        objective_for(progress.time_block),
        build_input_noise(config.objective, vocabulary, config.model.num_layers),
        config.training.seed,
        progress.consumed_samples,
        plan.train_samples,
        config.training.micro_batch_size,
        config.training.global_batch_size,
        ranks.data_rank,
        ranks.data_size,
    )
    reason = on_any_rank(signal_reason(), ranks)
    if reason and data.steps:
        if folder:
            folder.status("stopped", reason, progress.iteration, progress.consumed_samples)
        raise StopRequested(reason)
    if folder:
        folder.start(description, past_records, origin.run if origin else folder.path)
    validated = {record["iteration"]: record["loss"] for record in past_records if _selects(record, sources)}
    trackers = start_trackers(config, folder, description, past_records) if ranks.rank == 0 else Trackers({})
    trainer = Trainer(
        config,
        plan,
        ranks,
        engine,
        optimizer,
        average,
        data,
        sources.validation,
        folder,
        trackers,
        progress,
        description,
        validated,
    )
    if ranks.rank == 0:
        _announce(config, plan, vocabulary, trainer, precision, compiled, origin)
    if config.validation.skip_train:
        results = trainer.evaluate()
        stop_signals.defer()  # nothing is left to stop
        for record in results if ranks.rank == 0 else ():
            print(json.dumps(record))
        return True

    def failed(reason: str) -> None:
        assert folder is not None
        with suppress(LockError):  # status.json belongs to another process now
            folder.status("failed", reason, progress.iteration, progress.consumed_samples)

    if detector and folder:
        detector.on_failure = failed
    with trackers:
        try:
            reason = trainer.train()
        except BaseException as error:
            if detector is None and folder:
                failed(str(error) or type(error).__name__)
            raise
    if detector:
        detector.on_failure = None
    if ranks.rank == 0:
        logger.info("%s at step %d of %d", reason, progress.iteration, trainer.steps)
    return reason == "finished"


def resolved(config: Config, plan: Plan, vocabulary: Vocabulary, sources: Sources) -> dict:
    """Return the resolved configuration that --dry-run prints."""
    objective = config.objective.objective
    return {"objective_name": objective, "plan": amounts(config, plan, vocabulary, sources), **asdict(config)}


def amounts(config: Config, plan: Plan, vocabulary: Vocabulary, sources: Sources) -> dict:
    """Return the plan and the run's totals: tokens, epochs and FLOPs by every convention.

    Members of a blend have separate epochs; those of the run count the tokens of all members together.
    """
    tokens = plan.train_samples * config.data.seq_length
    flops = flops_per_token(config.model, vocabulary, config.data.seq_length)
    return asdict(plan) | {
        "train_tokens": tokens,
        "epochs": tokens / plan.unique_tokens,
        "epochs_by_data_set": dict(zip(sources.train_prefixes, sources.train.epochs(plan.train_samples))),
        "flops": {convention: per_token * tokens * plan.passes for convention, per_token in flops.items()},
    }


def _selects(record: dict, sources: Sources) -> bool:
    """Return whether a record belongs to the first validation set, whose loss selects the best checkpoint."""
    return record["kind"] == "valid" and record["set"] in [data.name for data in sources.validation[:1]]


def _announce(config, plan, vocabulary, trainer, precision, compiled, origin) -> None:
    objective, engine = trainer.objective, trainer.engine
    ranks, fp8_recipe = engine.ranks, config.training.fp8_recipe
    for line in no_op_flags(config, exact=all(likelihood.exact for likelihood in objective.likelihoods)):
        logger.info(line)
    if not config.checkpoint.save and not config.validation.skip_train:
        logger.info("nothing is saved: no --save names a run folder")
    if origin:
        logger.info("continuing from %s at step %d", origin.checkpoint, origin.meta["iteration"])
        recorded, model = origin.meta["config"], config.model
        dropout = (model.attention_dropout, model.hidden_dropout, model.mlp_dropout, model.embedding_dropout)
        layout_changed = (recorded["processes"], recorded.get("parallel")) != (ranks.size, asdict(config.parallel))
        if layout_changed and any(dropout):
            logger.info("the parallel layout changed: dropout masks differ, and losses agree statistically")
    axes = {"tensor": "tp", "pipeline": "pp", "replicas": "replicate", "shards": "shard"}
    layout = [f"{ranks.along(axis)[1]} {name}" for name, axis in axes.items() if ranks.along(axis)[1] > 1]
    zero_stage = f"{'DeepSpeed ' if config.parallel.deepspeed else ''}ZeRO {engine.zero_stage}"
    logger.info(
        "%s: %.2fM parameters, %s unique tokens, %d samples of %d tokens in %d steps (%.1f epochs), %s%s on %s x%d%s",
        objective.name, plan.parameters / 1e6, f"{plan.unique_tokens:,}", plan.train_samples, config.data.seq_length,
        plan.steps, plan.train_samples * config.data.seq_length / plan.unique_tokens,
        f"{precision} and {fp8_recipe} fp8" if fp8_recipe else precision, ", compiled" if compiled else "",
        ranks.device.type, ranks.size,
        f" ({', '.join([*layout, zero_stage])})" if ranks.size > 1 else "",
    )  # fmt: skip
    for line in () if config.validation.skip_train else parameter_table(config, vocabulary):
        logger.info(line)
