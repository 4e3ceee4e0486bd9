"""What a report is made of: run folders, and sweep folders with the names of their plans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron.errors import ConfigurationError
from megatron.reporting.runs import (
    Run,
    SweepPoint,
    distinguishing_names,
    load_runs,
    refuse_duplicates,
    validated_run,
)
from megatron.sweeps.points import PLAN, read_plan, unique_runs


@dataclass(frozen=True)
class Source:
    """The runs of a report."""

    runs: list[Run]
    title: str  # names of the sweeps; empty without any
    notes: list[str]  # how many runs are missing


def load(folders: Sequence[str | Path], progress: bool = False) -> Source:
    """Return the runs of run folders and sweep folders.

    Raises: ConfigurationError for a folder that is neither, a run given twice, and where no run has a validation.
    """
    sweeps = [Path(folder) for folder in folders if (Path(folder) / PLAN).exists()]
    runs: list[Run] = []
    notes: list[str] = []
    names = distinguishing_names(sweeps)
    for sweep, name in zip(sweeps, names, strict=True):
        points, waiting = load_sweep(sweep, progress)
        if not points:
            raise ConfigurationError(f"{sweep}: no run was validated yet; see tools/sweep.py status {sweep}")
        if waiting:
            notes.append(f"{name}: {waiting} of {waiting + len(points)} runs have no validation yet.")
        if len(sweeps) > 1:
            points = [_prefixed(run, name) for run in points]
        runs += points
    plain = [folder for folder in folders if not (Path(folder) / PLAN).exists()]
    runs += load_runs(plain, progress) if plain else []
    refuse_duplicates([run.folder for run in runs])
    return Source(runs=runs, title=", ".join(names), notes=notes)


def load_sweep(folder: Path, progress: bool = False) -> tuple[list[Run], int]:
    """Return the validated runs of a sweep, named by its plan, and the number of the others.

    A run that several points share has the name of the first.
    """
    points = unique_runs(read_plan(folder))
    has_stages = len({point.stage for point in points}) > 1
    runs = []
    for point in tqdm(points, desc=folder.name, disable=not progress, leave=False):
        run = validated_run(point.folder(folder))
        if run is None:
            continue
        label = point.label.removesuffix(f", seed {point.seed}")
        method = f"{point.stage}, {point.variant}" if has_stages else point.variant
        runs.append(replace(run, name=point.label, point=SweepPoint(method, label)))
    return runs, len(points) - len(runs)


def _prefixed(run: Run, sweep: str) -> Run:
    """Return a run whose names begin with that of its sweep."""
    assert run.point is not None
    point = SweepPoint(method=f"{sweep}: {run.point.method}", label=f"{sweep}: {run.point.label}")
    return replace(run, name=f"{sweep}: {run.name}", point=point)
