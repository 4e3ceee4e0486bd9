"""The points of a plan, and the sweep folder that holds them.

DIR/sweep.yaml      a copy of the sweep file
DIR/plan.jsonl      one line per point
DIR/choices.json    the best trials that later stages took
DIR/runs/ID/        run folders; points with equal ids share one
DIR/logs/           output of the runs
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron.errors import ConfigurationError
from megatron.training.run_folder import writing

PLAN, SWEEP_COPY, CHOICES = "plan.jsonl", "sweep.yaml", "choices.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep: how it is named, the command of its run, and what that run costs."""

    id: str
    stage: str
    variant: str
    axes: dict[str, Any]
    tuned: dict[str, Any]
    seed: int
    trial: int | None
    script: str
    arguments: list[str]
    nodes: int
    world_size: int
    minutes: float | None
    parameters: int
    unique_tokens: int
    train_samples: int
    tokens: int
    epochs: float
    flops: float
    memory_bytes: int | None  # peak of the rank that needs most, on a CUDA device; None where no formula holds
    disk_bytes: int
    seconds: float | None = None  # of the whole budget, at the given throughput
    trunk: str | None = None  # id of the run whose checkpoint this one continues from
    trunk_iteration: int = 0
    trunk_samples: int = 0  # consumed there
    keep_iterations: list[int] = field(default_factory=list)  # of its flags, and those that others branch from
    teachers: list[str] = field(default_factory=list)  # ids of runs of an earlier stage

    @property
    def label(self) -> str:
        """The point as a person reads it."""
        return readable_name(self.stage, self.variant, self.axes, trial=self.trial, seed=self.seed)

    @property
    def own_flops(self) -> float:
        """The FLOPs that this run computes itself, without those of its trunk."""
        return self.flops * self.own_share

    @property
    def own_seconds(self) -> float | None:
        """The time of this run itself, without that of its trunk."""
        return None if self.seconds is None else self.seconds * self.own_share

    @property
    def own_share(self) -> float:
        """The share of the budget that this run trains itself; the trunk has trained the rest."""
        return 1 - self.trunk_samples / self.train_samples

    def trunk_checkpoint(self, sweep: Path) -> Path | None:
        """Return the folder of the checkpoint to continue from, whether or not it exists yet."""
        return None if self.trunk is None else _checkpoint(sweep, self.trunk, self.trunk_iteration)

    def checkpoint(self, sweep: Path, iteration: int) -> Path:
        """Return the folder of a checkpoint of the point's run, whether or not it exists."""
        return _checkpoint(sweep, self.id, iteration)

    def folder(self, sweep: Path) -> Path:
        """Return the run folder of the point in the sweep folder."""
        return sweep / "runs" / self.id


def _checkpoint(sweep: Path, run_id: str, iteration: int) -> Path:
    from megatron.training.saver import folder_name  # imports torch, which readers of plans do not need

    return sweep / "runs" / run_id / "checkpoints" / folder_name(iteration)


def readable_name(stage: str, variant: str, axes: dict[str, Any], *, trial: int | None, seed: int) -> str:
    """Return the name of a point: `mdm, train-epochs 16, seed 1`; a stage is named where the file has several."""
    words = [stage] if stage != "main" else []
    words += [variant, *(f"{name} {text(value)}" for name, value in axes.items())]
    words += [f"trial {trial}"] if trial is not None else []
    return ", ".join([*words, f"seed {seed}"])


def same_value(first: Any, second: Any) -> bool:
    """Return whether two values of a sweep file are the same flag value: 4, 4.0 and "4" are."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    try:
        return float(first) == float(second)
    except (TypeError, ValueError):
        return text(first) == text(second)


def text(value: Any) -> str:
    """Return a value of a sweep file as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def unique_runs(points: Sequence[Point]) -> list[Point]:
    """Return one point for each run, the first of those that share it."""
    runs: dict[str, Point] = {}
    for point in points:
        runs.setdefault(point.id, point)
    return list(runs.values())


def write_plan(folder: Path, content: str, points: Sequence[Point]) -> None:
    """Write the plan of a sweep, and the content of the file that was planned, atomically.

    Raises: OSError where the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / SWEEP_COPY, content)
    replace_file(folder / PLAN, "".join(json.dumps(asdict(point)) + "\n" for point in points))


def replace_file(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises: OSError where it cannot be written.
    """
    with replacing(path) as file:
        file.write(content.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` at the end; after an error `path` is as it was.

    Raises: OSError where it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_plan(folder: Path) -> list[Point]:
    """Return the points of a sweep folder.

    Raises: ConfigurationError where the folder holds no sweep or its plan is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise ConfigurationError(f"{folder}: holds no sweep (no {PLAN}); name a folder that tools/sweep.py plan wrote")
    try:
        points = [Point(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path}: is damaged ({error}); plan the sweep file again") from None
    if not points:
        raise ConfigurationError(f"{path}: is empty; plan the sweep file again")
    return points


def identity(settings: dict) -> str:
    """Return the id of a run: a hash of the settings that decide its result."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
