"""The commands of tools/sweep.py. Each takes the parsed options and returns an exit code."""

import json
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.errors import ConfigurationError
from megatron.sweeps import archive as archives
from megatron.sweeps import array_task, results, slurm
from megatron.sweeps import compare as differences
from megatron.sweeps.branches import needs_trunk
from megatron.sweeps.local_queue import LocalQueue, Outcome, QueueOptions
from megatron.sweeps.plan import Planned, plan_sweep
from megatron.sweeps.points import CHOICES, PLAN, SWEEP_COPY, Point, read_plan, replace_file, unique_runs, write_plan
from megatron.sweeps.states import run_state
from megatron.sweeps.status import sweep_status, table, write_page
from megatron.sweeps.sweep_file import read_sweep

logger = logging.getLogger(__name__)

GIB = 2.0**30


def plan(options: Namespace) -> int:
    """Plan the sweep, write the plan and print it."""
    folder, planned = _planned(options)
    print(costs(planned.points))
    for stage, reason in planned.waiting.items():
        print(f"stage {stage}: {reason}; plan again then")
    for note in planned.notes:
        print(note)
    print(f"\nplan: {folder / PLAN}")
    return 0


def run(options: Namespace) -> int:
    """Run all points on this machine, stage by stage; print the status at the end."""
    devices = _devices()
    slots = options.slots
    if slots is None:
        slots = len(devices) or len(os.sched_getaffinity(0))
    settings = QueueOptions(
        slots=slots,
        devices=devices,
        retries=options.retries,
        retry_failed=options.retry_failed,
        hang_minutes=options.hang_minutes,
    )
    waiting: dict[str, str] | None = None
    outcome = Outcome({}, {})
    while True:
        folder, planned = _planned(options)
        points, now_waiting = _of_stages(planned, options.stages)
        outcome = LocalQueue(folder, points, settings, outcome).run()
        if outcome.stopped_by or not now_waiting or now_waiting == waiting:
            break
        waiting = now_waiting  # the runs of earlier stages have ended: their best trials are known now
    final = sweep_status(folder, planned.points)
    write_page(final)
    print(table(final) if len(final.runs) <= 40 else final.line())
    for stage, reason in now_waiting.items():
        print(f"stage {stage}: {reason}")
    if outcome.stopped_by:
        return 128 + outcome.stopped_by
    return 1 if outcome.failures or outcome.stopped or now_waiting else 0


def status(options: Namespace) -> int:
    """Print the table of all runs and write the page."""
    folder = _folder(options)
    current = sweep_status(folder, read_plan(folder))
    print(table(current))
    print(f"page: {write_page(current)}")
    return 0


def collect(options: Namespace) -> int:
    """Write the table of all validations."""
    folder = _folder(options)
    rows = results.collect(folder, read_plan(folder), progress=True)
    for path in results.write_table(rows, folder):
        print(f"{rows.num_rows} rows: {path}")
    return 0


def archive(options: Namespace) -> int:
    """Write the records of all finished runs to one file."""
    folder = _folder(options)
    count = archives.write_archive(options.file, folder, read_plan(folder))
    print(f"{count} runs: {options.file}")
    return 0


def restore(options: Namespace) -> int:
    """Make the finished runs of a sweep from such a file, stage by stage."""
    restored = 0
    while True:
        folder, planned = _planned(options)
        count, of_others = archives.restore(options.file, folder, planned.points)
        restored += count
        if not (count and planned.waiting):  # else the best trials of an earlier stage may be known now
            break
    print(f"{restored} runs of {options.file}: {folder}")
    if of_others:
        print(f"{of_others} runs were left out: the data on this machine are of another corpus")
    return 0


def compare(options: Namespace) -> int:
    """Print every point next to the baseline."""
    selection = differences.Selection(
        tuning=options.tuning,
        validation=options.validation,
        variants=options.variants,
        where=_settings("--where", options.where),
        best_over=options.best_over,
    )
    rows = differences.read_table(options.table)
    print(differences.markdown(differences.compare(rows, _settings("--baseline", options.baseline), selection)))
    for line in differences.unfinished(rows, selection):
        print(f"\n{line}")
    return 0


def _settings(flag: str, words: Sequence[str]) -> dict[str, str]:
    """Return COLUMN=VALUE words as a dictionary.

    Raises: ConfigurationError for another word.
    """
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigurationError(f"{flag} {word}: is not COLUMN=VALUE; give such as {flag} variant=NAME")
        settings[name] = value
    return settings


def submit(options: Namespace) -> int:
    """Submit every run that is not finished, running, in the queue, or failed for a reason of its own."""
    return _submit(options, retry_failed=False)


def resubmit(options: Namespace) -> int:
    """Submit again what is neither finished, running nor in the queue, whatever it failed of."""
    return _submit(options, retry_failed=True)


def run_task(options: Namespace) -> int:
    """Train the point of this SLURM array task."""
    ids = options.tasks.read_text().split()
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not index.isdecimal() or int(index) >= len(ids):
        raise ConfigurationError(
            f"SLURM_ARRAY_TASK_ID={index or 'unset'}: names none of the {len(ids)} tasks of {options.tasks}; "
            "tools/sweep.py submit starts tasks"
        )
    points = read_plan(options.sweep)
    settings = {name: getattr(options, name) for name in ("retries", "wait_for_lock", "hang_minutes", "retry_failed")}
    return array_task.run_task(options.sweep, points, ids[int(index)], array_task.TaskOptions(**settings))


def _submit(options: Namespace, *, retry_failed: bool) -> int:
    folder, planned = _planned(options)  # the file may have changed, such as its minutes
    points, waiting = _of_stages(planned, options.stages)
    for stage, reason in waiting.items():
        print(f"stage {stage}: {reason}; submit again then")
    site = slurm.read_site(options.site)
    queued = slurm.queued_runs(folder)
    states = {point.id: run_state(point.folder(folder)) for point in points if point.id not in queued}
    chosen = [
        point
        for point in points
        if point.id in states
        and states[point.id].name not in ("finished", "running")
        and (retry_failed or not states[point.id].has_own_fault)
    ]
    if queued:
        print(f"{len(queued)} runs are in the queue already")
    if not chosen:
        print("nothing to submit" + (f": {sweep_status(folder, points).line()}" if points else ""))
        return 0
    groups: dict[bool, list[Point]] = {False: [], True: []}  # by whether they wait for a trunk
    for point in chosen:
        groups[needs_trunk(point, folder)].append(point)
    jobs = sorted({queued[str(point.trunk)] for point in groups[True] if point.trunk in queued})
    for waits, members in groups.items():
        after = tuple(jobs) if waits else ()
        for array in slurm.write_arrays(folder, members, site, retry_failed=retry_failed):
            print(f"{array.script}: {len(array.points)} tasks")
            if options.dry_run:
                print(array.script.read_text())
                continue
            job = slurm.submit_array(array, after=after)
            jobs.append(job)
            print(f"submitted: job {job}; `scancel {job}` ends it, `scancel --signal=USR1 {job}` saves and requeues")
    return 0


# -------------------------------------------------------------------------------------------------- the folder


def _folder(options: Namespace) -> Path:
    if options.sweep.is_dir():
        if options.output is not None:
            raise ConfigurationError(
                f"--output {options.output}: is for a sweep file, and {options.sweep} is a sweep folder already; "
                "leave out --output, or name the sweep file"
            )
        return options.sweep
    return options.output or Path("runs") / read_sweep(options.sweep).name


def _of_stages(planned: Planned, names: Sequence[str] | None) -> tuple[list[Point], dict[str, str]]:
    """Return the points of some stages with the trunks that they continue from, and which of them wait (None: of all).

    Raises: ConfigurationError for a stage that the sweep does not have.
    """
    if names is None:
        return planned.points, planned.waiting
    known = dict.fromkeys([*(point.stage for point in planned.points), *planned.waiting])
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--stages {name}: is no stage of the sweep; it has {', '.join(known)}")
    chosen = [point for point in planned.points if point.stage in names]
    needed = {point.id for point in chosen}
    while trunks := {point.trunk for point in planned.points if point.id in needed and point.trunk} - needed:
        needed |= trunks
    points = [point for point in planned.points if point.id in needed]
    return points, {stage: reason for stage, reason in planned.waiting.items() if stage in names}


def _planned(options: Namespace) -> tuple[Path, Planned]:
    """Return the folder and the plan, written to it.

    Raises: ConfigurationError if a run of the plan before, which the new one lacks, is running.
    """
    folder = _folder(options)
    path = folder / SWEEP_COPY if options.sweep.is_dir() else options.sweep
    before = read_plan(folder) if options.sweep.is_dir() else _plan_before(folder)
    sweep = read_sweep(path)
    planned = plan_sweep(sweep, folder, progress=True)
    ids = {point.id for point in planned.points}
    for point in unique_runs(before):
        if point.id not in ids and run_state(point.folder(folder)).name == "running":
            raise ConfigurationError(
                f"{path}: the run {point.id} ({point.label}) is running, and the changed file no longer has it; stop "
                "it first, or put it back"
            )
    write_plan(folder, sweep.content, planned.points)
    if planned.choices:
        replace_file(folder / CHOICES, json.dumps(planned.choices, indent=1) + "\n")
    return folder, planned


def _plan_before(folder: Path) -> list[Point]:
    """Return the points of the plan that a new one replaces; none if it is damaged or of an older version."""
    if not (folder / PLAN).exists():
        return []
    try:
        return read_plan(folder)
    except ConfigurationError as error:
        logger.warning("%s; it is replaced", error)
        return []


def _devices() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return ()
    return tuple(visible.split(",")) if visible else tuple(map(str, range(torch.cuda.device_count())))


def costs(points: Sequence[Point]) -> str:
    """Return the plan as a table: one line per run, then the sums; runs that several points share are named."""
    header = ("run", "parameters", "tokens", "epochs", "FLOPs", "GB/GPU", "ranks", "hours", "point")
    rows: list[tuple[str, ...]] = [header]
    runs = unique_runs(points)
    for point in runs:
        memory = "-" if point.memory_bytes is None else f"{point.memory_bytes / GIB:.1f}"
        hours = "-" if point.own_seconds is None else f"{point.own_seconds / 3600:.3g}"
        amounts = (f"{point.parameters / 1e6:.2f}M", f"{point.tokens:.3g}", f"{point.epochs:.4g}")
        amounts += (f"{point.own_flops:.2e}",)
        rows.append((point.id, *amounts, memory, str(point.world_size), hours, point.label))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths)) + f"  {row[-1]}" for row in rows]
    first = {point.id: point for point in runs}
    shared = [point for point in points if point is not first[point.id]]
    for point in shared[:10]:
        lines.append(f"{point.label}: the same run as {first[point.id].label}")
    if len(shared) > 10:
        lines.append(f"and {len(shared) - 10} more points that share a run")
    hours = [point.own_seconds * point.world_size / 3600 for point in runs if point.own_seconds is not None]
    time_needed = f", {sum(hours):.3g} GPU-hours" if len(hours) == len(runs) else ""
    disk = sum(point.disk_bytes for point in runs) / GIB
    flops, tokens = sum(point.own_flops for point in runs), sum(point.tokens * point.own_share for point in runs)
    lines.append(
        f"\n{len(runs)} runs: {tokens:.3g} tokens, {flops:.3g} FLOPs{time_needed}, {disk:.3g} GiB of checkpoints"
    )
    branches = sum(point.trunk is not None for point in runs)
    if branches:
        whole = sum(point.flops for point in runs)
        lines.append(f"{branches} runs are WSD branches: {flops / whole:.0%} of the FLOPs of full runs")
    return "\n".join(lines)
