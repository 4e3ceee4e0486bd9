"""The command and the environment of one run of a sweep."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.sweeps.points import Point
from megatron.training.checkpoint_store import CheckpointStore, damage

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = Path(__file__).resolve().with_name("torchrun.py")
STOPPED = 85  # exit code of a run that was stopped on request
LOCKED = os.EX_TEMPFAIL  # exit code of a run that another process writes
# torchrun's defaults lack SIGUSR1 and SIGUSR2: it would die of them, and its ranks before they save
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SAVE_SECONDS = 120  # that torchrun gives its ranks to save after a signal, from torch 2.13 on; 30 before


def training_command(point: Point, sweep: Path) -> list[str]:
    """Return the command that trains the run of a point in one process, or as one rank of several."""
    words = [*point.arguments, "--save", str(point.folder(sweep))]
    if point.teachers:
        words += ["--teacher", *(str(sweep / "runs" / teacher) for teacher in point.teachers)]
    if point.keep_iterations:
        words += ["--keep-iterations", *map(str, point.keep_iterations)]
    checkpoint = point.trunk_checkpoint(sweep)
    resumes = CheckpointStore.of_run(point.folder(sweep)).has_any()  # from its own, without reading its trunk again
    if checkpoint is not None and checkpoint.is_dir() and not resumes:  # without it, this run trains all
        fault = damage(checkpoint)
        if fault is None:
            words += ["--load", str(checkpoint), "--exact-branch"]
        else:
            logger.warning("%s: %s is damaged (%s); trains in full", point.label, checkpoint, fault)
    return [sys.executable, str(ROOT / point.script), *words]


def local_command(point: Point, sweep: Path) -> list[str]:
    """Return the command that trains the run of a point on this node."""
    python, *words = training_command(point, sweep)
    if point.world_size == 1:
        return [python, *words, "--exit-code-when-stopped", str(STOPPED)]
    # by path: with -m the working directory comes first, which may be another clone
    torchrun = [str(TORCHRUN), "--standalone", "--nproc-per-node", str(point.world_size)]
    return [python, *torchrun, "--signals-to-handle", FORWARDED, *words]


def local_environment(devices: Sequence[str], slots: int) -> dict[str, str]:
    """Return the environment of a run on these CUDA devices, none for the CPU, where `slots` runs share the cores."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // slots)))
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment
