"""What a sweep has done: a table for the terminal and a page, from the run folders alone."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jinja2

from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point, replace_file, unique_runs
from megatron.sweeps.states import State, last_record, run_state
from megatron.training.run_folder import read_json

STATES = ("finished", "running", "stopped", "lost", "waiting", "failed")
SILENT_MINUTES = 30.0  # a running run without any record for as long may hang


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, its progress and its last loss."""

    point: Point
    state: State
    share: float  # of what it trains itself, 0 to 1
    seconds: float  # of training so far, of this run itself
    loss: float | None  # of the last record, training or validation

    @property
    def detail(self) -> str:
        """What a reader wants to know of this state."""
        state = self.state
        if state.name == "running":
            silent = state.silent_seconds / 60
            return state.holder + (f"; no record for {silent:.0f} minutes, may hang" if silent > SILENT_MINUTES else "")
        if state.name == "lost":
            return "was killed; resumes when it is started again"
        return state.reason if state.name in ("failed", "stopped") else ""


@dataclass(frozen=True)
class SweepStatus:
    """The states of all runs of a sweep."""

    folder: Path
    runs: list[RunStatus]

    @property
    def counts(self) -> Counter:
        """The number of runs in each state."""
        return Counter(run.state.name for run in self.runs)

    @property
    def share(self) -> float:
        """The share of the FLOPs of all runs that is done."""
        return self._flops_done / self._flops

    @property
    def rank_hours(self) -> float:
        """Hours of all ranks that were spent on training: GPU-hours where each rank has a GPU."""
        return sum(run.seconds * run.point.world_size for run in self.runs) / 3600

    @property
    def remaining_rank_hours(self) -> float | None:
        """The estimate for the rest at the measured FLOPs per second of a rank; None before anything was measured."""
        if not self.rank_hours or not self._flops_done:
            return None
        return self.rank_hours * (self._flops / self._flops_done - 1)

    @property
    def _flops(self) -> float:
        return sum(run.point.own_flops for run in self.runs)

    @property
    def _flops_done(self) -> float:
        return sum(run.share * run.point.own_flops for run in self.runs)

    def line(self) -> str:
        """Return the summary: counts, progress, hours."""
        counts = ", ".join(f"{self.counts[name]} {name}" for name in STATES if self.counts[name])
        rest = self.remaining_rank_hours
        left = "" if rest is None else f", about {rest:.3g} left"
        spent = f"{self.share:.0%} of the FLOPs, {self.rank_hours:.3g} rank-hours{left}"
        return f"{len(self.runs)} runs: {counts}; {spent}"


def sweep_status(folder: Path, points: Sequence[Point]) -> SweepStatus:
    """Return the status of every run of a plan."""
    return SweepStatus(folder, [run_progress(point, folder) for point in unique_runs(points)])


def run_progress(point: Point, folder: Path) -> RunStatus:
    """Return the status of one run of a sweep."""
    state = run_state(point.folder(folder))
    record = last_record(point.folder(folder)) if state.name != "waiting" else {}
    # a branch's records begin with its trunk's
    trunk_samples = point.trunk_samples if point.trunk and _is_branch(point.folder(folder)) else 0
    consumed_samples = record.get("consumed_samples", state.consumed_samples)
    own_samples = max(consumed_samples - trunk_samples, 0)
    share = 1.0 if state.name == "finished" else own_samples / (point.train_samples - trunk_samples)
    seconds = record.get("seconds", 0.0) * own_samples / max(consumed_samples, 1)
    return RunStatus(point=point, state=state, share=share, seconds=seconds, loss=record.get("loss"))


def table(status: SweepStatus) -> str:
    """Return one line per run, with the runs that need a look first."""
    order = {"failed": 0, "running": 1, "lost": 2, "stopped": 3, "waiting": 4, "finished": 5}
    runs = sorted(status.runs, key=lambda run: order[run.state.name])
    rows = [(run.point.id, run.state.name, f"{run.share:4.0%}", run.point.label, run.detail) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip() for row in rows]
    return "\n".join([*lines, "", status.line()])


def _is_branch(run: Path) -> bool:
    """Return whether a run has continued from a checkpoint of its trunk."""
    with suppress(ConfigurationError, TypeError):
        return read_json(run / "config.json").get("branched_from") is not None
    return False


PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ status.folder.name }}</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
progress { width: 6rem; }
.failed { color: #c33; } .running { color: #27c; } .finished { color: #282; } .lost, .stopped { color: #a60; }
</style></head><body>
<h1>{{ status.folder.name }}</h1>
<p><progress value="{{ status.share }}"></progress> {{ status.line() }}</p>
<p>Written {{ written }} by <code>tools/sweep.py status</code>.</p>
<div class="scroll"><table>
<thead><tr><th>run</th><th>state</th><th>progress</th><th>point</th><th>loss</th><th></th></tr></thead>
<tbody>
{% for run in status.runs %}
<tr><td><code>{{ run.point.id }}</code></td><td class="{{ run.state.name }}">{{ run.state.name }}</td>
<td><progress value="{{ run.share }}"></progress></td><td>{{ run.point.label }}</td>
<td class="number">{{ "%.4f"|format(run.loss) if run.loss is not none }}</td><td>{{ run.detail }}</td></tr>
{% endfor %}
</tbody></table></div></body></html>
""")


def write_page(status: SweepStatus) -> Path:
    """Write SWEEP/status.html and return its path.

    Raises: OSError where it cannot be written.
    """
    path = status.folder / "status.html"
    replace_file(path, PAGE.render(status=status, written=time.strftime("%Y-%m-%d %H:%M:%S")))
    return path
