"""Entry point of a training run: join the ranks, build and train, exit with a code and one line per error."""

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

from megatron import stop_signals
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.parallel.failure_detector import PATIENCE, FailureDetector, RankError
from megatron.parallel.launch import adopt_launcher, join, local_rank, rank
from megatron.parallel.mesh import destroy_parallel
from megatron.stop_signals import Interrupted, StopRequested
from megatron.training.announce import announce
from megatron.training.build import build_run, dry_run, resolve_run
from megatron.training.command_line import parse_run
from megatron.training.run_folder import LockError
from megatron.training.trainer import DivergedError, Trainer

logger = logging.getLogger(__name__)

SILENCE = 5.0  # seconds that other local ranks wait before they repeat the error of local rank 0

Evaluate = Callable[[Trainer], list[dict]]


def main(objective: str, arguments: list[str] | None = None, evaluate: Evaluate = Trainer.evaluate) -> None:
    """Start a training run from the command line; `objective` is the default of --objective.

    `evaluate` does the work of --skip-train and returns its records.

    Exit codes: 0 finished, --exit-code-when-stopped stopped on request, 2 user error, 75 another process writes the
    run, 1 anything else.
    """
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join([sys.argv[0], *arguments])

    def work(config: Config, detector: FailureDetector | None) -> int:
        return run(config, command, detector, evaluate, started=started)

    try:
        launch(lambda: parse_run(objective, arguments), work)
    finally:
        stop_signals.ignore()


def launch(read: Callable[[], Config], work: Callable[[Config, FailureDetector | None], int | None]) -> None:
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
        code = report_error(error, 2 if isinstance(error, ConfigurationError) else 1, detector)
    except LockError as error:
        code = report_error(error, os.EX_TEMPFAIL, detector)
    except OSError as error:
        code = report_error(error, 1, detector, PATIENCE)
    except Interrupted as request:  # of a tool; a training run stops between two steps
        code = report_error(request, request.exit_code, detector)
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


def report_error(
    error: BaseException, code: int, detector: FailureDetector | None = None, patience: float = 0.0
) -> int:
    """Print an error once per node and return the exit code; with a `detector`, end all ranks instead."""
    if detector:
        time.sleep(patience)
        detector.report(str(error), code)
    with suppress(ConfigurationError):  # the launcher's variables may be the error
        if isinstance(error, ConfigurationError) and local_rank() > 0:
            time.sleep(SILENCE)  # if local rank 0 prints the same error, the launcher ends this process meanwhile
    print(f"error: {error}", file=sys.stderr)
    return code


def run(config: Config, command: str, detector: FailureDetector | None, evaluate: Evaluate, *, started: float) -> int:
    """Build a run and train or evaluate it; return the exit code. Its time limit counts from `started`."""
    try:
        resolved = resolve_run(config)
        if config.training.dry_run:
            dry_run(resolved)
            return 0
        parts = build_run(resolved, command)
    except StopRequested as request:  # on every rank
        if rank() == 0:
            logger.info("stopped by %s before the first step: nothing was trained", request)
        return config.training.exit_code_when_stopped
    trainer = Trainer(parts)
    if parts.ranks.rank == 0:
        announce(parts)
    if config.validation.skip_train:
        _evaluate(trainer, evaluate)
        return 0
    return 0 if _train(trainer, detector, started) else config.training.exit_code_when_stopped


def _evaluate(trainer: Trainer, evaluate: Evaluate) -> None:
    """Evaluate a run and print its records on rank 0, one line each."""
    results = evaluate(trainer)
    stop_signals.defer()  # nothing is left to stop
    for record in results if trainer.ranks.rank == 0 else ():
        print(json.dumps(record))


def _train(trainer: Trainer, detector: FailureDetector | None, started: float) -> bool:
    """Train a run and return whether it finished; if it fails, status.json says so, and how."""
    parts, recorder = trainer.parts, trainer.recorder
    if detector and parts.folder:
        detector.on_failure = recorder.failed
    with parts.trackers:
        try:
            reason = trainer.train(started)
        except BaseException as error:
            if detector is None:
                recorder.failed(str(error) or type(error).__name__)
            raise
    if detector:
        detector.on_failure = None
    if parts.ranks.rank == 0:
        logger.info("%s at step %d of %d", reason, parts.progress.iteration, trainer.steps)
    return reason == "finished"
