"""SLURM job arrays: one or several per resource class, one point per task. SLURM is the scheduler.

`submit` writes SWEEP/slurm/CLASS-N.{sh,tasks}; a task calls `tools/sweep.py run-task` (`array_task`).
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigurationError
from megatron.sweeps.launch import ROOT
from megatron.sweeps.points import Point, replace_file, unique_runs
from megatron.sweeps.yaml_file import YamlFile

DEFAULT_MINUTES = 24 * 60.0
MINIMA = {"ranks_per_node": 1, "cores_per_rank": 1, "array_size": 1, "throttle": 0, "signal_seconds": 1, "retries": 0}


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a cluster needs, from a YAML file or the environment (SITE_PARTITION=gpu, ...)."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: bool = True  # a GPU for each rank (--gpus-per-node)
    ranks_per_node: int = 8
    cores_per_rank: int = 8
    sbatch: tuple[str, ...] = ()  # further options of sbatch, such as --constraint=h100
    setup: str = ""  # shell lines before a run: modules, container variables
    python: str = sys.executable  # on the compute nodes, from the clone
    array_size: int = 1000  # tasks of an array, at most SLURM's MaxArraySize (default 1001)
    throttle: int = 0  # tasks of an array that run at a time; 0: no limit
    signal_seconds: int = 300  # before the time limit, to save
    wait_for_lock_minutes: float = 10.0  # for a predecessor on a node that was lost
    hang_minutes: float = 30.0  # without any output, after which a run is ended and counts as failed
    retries: int = 2  # after passing failures


@dataclass(frozen=True)
class Array:
    """One job array: its script, its task list, and the points of the tasks; branches wait for the arrays of trunks."""

    script: Path
    tasks: Path
    points: list[Point]
    are_branches: bool

    @property
    def job_file(self) -> Path:
        """The file with the id of the submitted job."""
        return self.script.with_suffix(".job")


def read_site(path: Path | None) -> Site:
    """Return the site of a file, with the values of the environment on top.

    Raises: ConfigurationError for unknown keys, wrong types and values that contradict each other.
    """
    names = [field.name for field in fields(Site)]
    values: dict[str, Any] = {}
    file = _SiteReader(path or Path("environment"))
    if path is not None:
        given = file.mapping("", file.load(), names)
        values = {name: file.value(name, name, value) for name, value in given.items()}
    environment = _SiteReader(Path("environment"))
    for name in names:
        key = f"SITE_{name.upper()}"
        if key in os.environ:
            values[name] = environment.value(key, name, _of_environment(name, os.environ[key]))
    site = Site(**values)
    if site.wait_for_lock_minutes >= site.hang_minutes:
        raise file.error(
            "wait_for_lock_minutes",
            f"{site.wait_for_lock_minutes:g}: must be less than hang_minutes ({site.hang_minutes:g}), or a run that "
            "waits for its lock is taken for one that hangs; change one",
        )
    return site


def _of_environment(name: str, value: str) -> Any:
    if isinstance(getattr(Site(), name), (str, type(None))):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # of a wrong type, which is named later


class _SiteReader(YamlFile):
    """Reads the values of a site."""

    def value(self, key: str, name: str, given: Any) -> Any:
        """Return the value of the field `name` of a site, which the user gives as `key`."""
        default = getattr(Site(), name)
        if isinstance(default, bool):
            return self.switch(key, given)
        if isinstance(default, int):
            return self.whole(key, given, MINIMA[name])
        if isinstance(default, float):
            minutes = self.number(key, given)
            if minutes < 0:
                raise self.error(key, f"{given}: must not be negative; correct it")
            return minutes
        if isinstance(default, tuple):
            return tuple(self._line(f"{key}[{index}]", item) for index, item in enumerate(self.sequence(key, given)))
        if given is None or given == "":
            return default
        if name == "setup" and isinstance(given, str):
            return given
        text = self._line(key, given)
        if name != "python" and re.search(r"\s", text):
            raise self.error(key, f"{text}: is not a single name; correct it")
        return text

    def _line(self, key: str, given: Any) -> str:
        """Return a value that stands in one line of a batch script."""
        if type(given) not in (str, int):
            raise self.error(key, f"{given}: is not text; correct it")
        text = str(given).strip()
        if not text or not text.isprintable():
            raise self.error(key, f"{text!r}: is not one line of text; correct it")
        return text


def _new_file(slurm: Path, name: str) -> Path:
    """Create the task list of a new array; submitted ones never change."""
    for number in itertools.count():
        path = slurm / f"{name}-{number}.tasks"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError


def write_arrays(folder: Path, points: Sequence[Point], site: Site, *, retry_failed: bool = False) -> list[Array]:
    """Write a script and a frozen list of tasks for each resource class of the points, WSD branches last.

    An array has at most the site's `array_size` of tasks.

    Raises: ConfigurationError if a point does not fit the site.
    """
    classes: dict[tuple, list[Point]] = defaultdict(list)
    for point in unique_runs(points):
        if point.minutes and 60 * point.minutes < 2 * site.signal_seconds:
            raise ConfigurationError(
                f"{point.label}: has minutes {point.minutes:g}, and the site's signal_seconds {site.signal_seconds} "
                "leave no time to train; raise one or lower the other"
            )
        per_node = point.world_size // point.nodes
        if per_node > site.ranks_per_node:
            raise ConfigurationError(
                f"{point.label}: needs {per_node} ranks on a node, and the site has ranks_per_node "
                f"{site.ranks_per_node}; give it more `nodes` under `resources`"
            )
        classes[point.trunk is not None, point.nodes, per_node, point.minutes].append(point)
    slurm = folder / "slurm"
    slurm.mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    arrays = []
    for (are_branches, nodes, per_node, minutes), members in sorted(classes.items(), key=lambda item: item[0][0]):
        members = sorted(members, key=lambda point: -point.own_flops)
        name = f"{nodes}x{per_node}" + (f"-{minutes:g}min" if minutes else "") + ("-branches" if are_branches else "")
        for start in range(0, len(members), site.array_size):
            chunk = members[start : start + site.array_size]
            tasks = _new_file(slurm, name)
            script = tasks.with_suffix(".sh")
            replace_file(tasks, "".join(f"{point.id}\n" for point in chunk))
            replace_file(script, _script(folder.resolve(), tasks.resolve(), chunk, site, retry_failed=retry_failed))
            arrays.append(Array(script, tasks, chunk, are_branches))
    return arrays


def _script(folder: Path, tasks: Path, points: list[Point], site: Site, *, retry_failed: bool) -> str:
    point = points[0]
    per_node, minutes = point.world_size // point.nodes, point.minutes or DEFAULT_MINUTES
    throttle = f"%{site.throttle}" if site.throttle else ""
    options = [
        f"--job-name {re.sub(r'[^A-Za-z0-9_.-]', '_', folder.name)}",
        f"--array 0-{len(points) - 1}{throttle}",
        f"--nodes {point.nodes} --ntasks-per-node {per_node} --cpus-per-task {site.cores_per_rank}",
        f"--time {max(1, round(minutes))} --signal USR1@{site.signal_seconds} --requeue --open-mode append",
        f"--output {shlex.quote(str(folder / 'logs'))}/slurm-%A_%a.log",
    ]
    options += [f"--gpus-per-node {per_node}"] if site.gpus else []
    options += [f"--{name} {value}" for name in ("partition", "account", "qos") if (value := getattr(site, name))]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in [*options, *site.sbatch])]
    settings = f"--retries {site.retries} --wait-for-lock {site.wait_for_lock_minutes:g}"
    settings += f" --hang-minutes {site.hang_minutes:g}"
    settings += " --retry-failed" if retry_failed else ""
    python = ROOT / site.python if (ROOT / site.python).exists() else site.python
    return "\n".join(
        [
            *lines,
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *([site.setup.rstrip()] if site.setup.strip() else []),
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            # exec: SLURM's signals reach the process that waits for srun, not a shell that dies of them
            f"exec {shlex.quote(str(python))} {shlex.quote(str(ROOT / 'tools' / 'sweep.py'))} "
            f"run-task {shlex.quote(str(folder))} "
            f"--tasks {shlex.quote(str(tasks))} {settings}",
            "",
        ]
    )


def submit_array(array: Array, after: Sequence[str] = ()) -> str:
    """Submit a script, to start when the jobs `after` have ended; return the id of the job.

    Raises: ConfigurationError with sbatch's message.
    """
    # afterany: without its trunk's checkpoint a branch trains in full
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    try:
        done = subprocess.run(["sbatch", "--parsable", *dependency, str(array.script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{array.script}: there is no sbatch on this machine; submit it on a login node, or use `run`"
        ) from None
    if done.returncode:
        raise ConfigurationError(f"{array.script}: sbatch refused it: {done.stderr.strip()}; correct the site file")
    job = done.stdout.strip().partition(";")[0]
    replace_file(array.job_file, f"{job}\n")
    return job


def queued_runs(folder: Path) -> dict[str, str]:
    """Return the job of each run whose task is pending or running in SLURM's queue; none without SLURM.

    Raises: ConfigurationError if the queue cannot be read.
    """
    queued: dict[str, str] = {}
    for path in (folder / "slurm").glob("*.job"):
        job = path.read_text().strip()
        command = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%K"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return {}
        if done.returncode and "Invalid job id" not in done.stderr:  # SLURM forgets jobs that have ended
            raise ConfigurationError(f"squeue: {done.stderr.strip()}; try again when the controller answers")
        ids = path.with_suffix(".tasks").read_text().split()
        tasks = [int(task) for task in done.stdout.split() if task.isdecimal()]
        queued |= {ids[task]: job for task in tasks if task < len(ids)}  # a later job may have the same id
    return queued
