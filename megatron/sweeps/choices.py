"""The best trials of a tuned stage, for the stages that continue with them."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point, text
from megatron.sweeps.states import State, run_state
from megatron.training.run_folder import read_records


@dataclass(frozen=True)
class Choices:
    """Tuned flags by (variant, values of the axes in `by`), and how each was chosen."""

    flags: dict[tuple, dict[str, Any]]
    records: list[dict]


def best_trials(points: Sequence[Point], folder: Path, *, set_name: str, by: Sequence[str]) -> Choices | str:
    """Return the best trial of each variant and combination of the axes `by`, or what it waits for.

    A trial's loss is the lowest validation loss of its run on `set_name`, averaged over seeds and all other axes. A
    trial with a run that diverged or ran out of memory is out: an average over the others would favour it.

    Raises: ConfigurationError if a finished run was not validated on that set, or no trial of a group finished.
    """
    states = {point.id: run_state(point.folder(folder)) for point in points}
    unfinished = [
        point for point in points if states[point.id].name != "finished" and not states[point.id].has_own_fault
    ]
    if unfinished:
        failed = sum(states[point.id].name in ("failed", "lost") for point in unfinished)
        note = f", {failed} of them failed or lost" if failed else ""
        return f"waits for {len(unfinished)} of {len(points)} points of stage {points[0].stage}{note}"
    losses: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    tuned: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for point in points:
        group = (point.variant, *(text(point.axes[name]) for name in by))
        assert point.trial is not None
        tuned[group][point.trial] = point.tuned
        losses[group][point.trial].append(_loss(point, folder, states[point.id], set_name))
    flags, records = {}, []
    for group, trials in losses.items():
        means = {trial: statistics.fmean(values) for trial, values in trials.items()}
        best = min(means, key=lambda trial: means[trial])
        if means[best] == float("inf"):
            raise ConfigurationError(
                f"{folder}: no trial of {', '.join(map(str, group))} finished; see tools/sweep.py status, and change "
                "the tuned ranges"
            )
        flags[group] = tuned[group][best]
        order = sorted(means, key=lambda trial: means[trial])
        named = dict(zip(("variant", *by), group, strict=True))
        ranked = [{"trial": trial, "loss": means[trial], **tuned[group][trial]} for trial in order]
        records.append(
            {**named, "from": points[0].stage, "set": set_name, "chosen": best, "flags": flags[group], "trials": ranked}
        )
    return Choices(flags, records)


def _loss(point: Point, folder: Path, state: State, set_name: str) -> float:
    if state.has_own_fault:
        return float("inf")
    records = read_records(point.folder(folder))
    losses = [record["loss"] for record in records if record["kind"] == "valid" and record["set"] == set_name]
    if not losses:
        raise ConfigurationError(
            f"{point.folder(folder)}: was never validated on the set {set_name}, which chooses the best trial; name it "
            "in --valid-data-path, or another set in tuning.set"
        )
    return min(losses)
