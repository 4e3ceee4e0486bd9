"""What a report is made of: run folders, and sweep folders with the names of their plans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron.errors import ConfigurationError
from megatron.reporting.runs import (
    Run,
    SweepPoint,
    distinct_runs,
    distinguishing_names,
    load_runs,
    refuse_duplicates,
    validated_run,
)
from megatron.sweeps.points import PLAN, read_plan, unique_runs


@dataclass(frozen=True)
class Source:
    """The runs of a report."""

    runs: list[Run]  # of a sweep one for each point; points may share a folder
    title: str  # names of the sweeps; empty without any
    notes: list[str]  # how many runs are missing


def load(
    folders: Sequence[str | Path], sets: Sequence[str] = ("tuning", "validation"), progress: bool = False
) -> Source:
    """Return the runs of run folders and sweep folders; of sweeps those with a step that was evaluated on all `sets`.

    Raises: ConfigurationError for a folder that is neither, a run given twice, and where no run has a validation.
    """
    sweeps = [Path(folder) for folder in folders if (Path(folder) / PLAN).exists()]
    runs: list[Run] = []
    notes: list[str] = []
    names = distinguishing_names(sweeps)
    validated_on = " and ".join(dict.fromkeys(sets))
    for sweep, name in zip(sweeps, names, strict=True):
        points, waiting = load_sweep(sweep, sets, progress)
        if not points:
            others = ", ".join(dict.fromkeys(name for run in load_sweep(sweep)[0] for name in run.valid))
            raise ConfigurationError(
                f"{sweep}: no run was validated on {validated_on} yet (sets so far: {others or 'none'}); "
                f"see tools/sweep.py status {sweep}"
            )
        if waiting:
            total = waiting + len(distinct_runs(points))
            notes.append(f"{name}: {waiting} of {total} runs were not validated on {validated_on} yet.")
        if len(sweeps) > 1:
            points = [_prefixed(run, name) for run in points]
        runs += points
    plain = [folder for folder in folders if not (Path(folder) / PLAN).exists()]
    refuse_duplicates([*(run.folder for run in distinct_runs(runs)), *plain])
    runs += load_runs(plain, progress) if plain else []
    return Source(runs=runs, title=", ".join(names), notes=notes)


def load_sweep(folder: Path, sets: Sequence[str] = (), progress: bool = False) -> tuple[list[Run], int]:
    """Return the validated runs of a sweep, one for each point and named by it, and the number of the other runs.

    Runs are validated once a step was evaluated on all `sets`.
    """
    points = read_plan(folder)
    has_stages = len({point.stage for point in points}) > 1
    unique = tqdm(unique_runs(points), desc=folder.name, disable=not progress, leave=False)
    by_id = {point.id: validated_run(point.folder(folder), sets) for point in unique}
    runs = []
    for point in points:
        run = by_id[point.id]
        if run is None:
            continue
        label = point.label.removesuffix(f", seed {point.seed}")
        method = f"{point.stage}, {point.variant}" if has_stages else point.variant
        runs.append(replace(run, name=point.label, point=SweepPoint(method, label)))
    return runs, sum(run is None for run in by_id.values())


def _prefixed(run: Run, sweep: str) -> Run:
    """Return a run whose names begin with that of its sweep."""
    assert run.point is not None
    point = SweepPoint(method=f"{sweep}: {run.point.method}", label=f"{sweep}: {run.point.label}")
    return replace(run, name=f"{sweep}: {run.name}", point=point)
