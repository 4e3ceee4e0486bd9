"""The runs of an earlier stage as teachers of a stage with `teachers_of`: ensembles, self-distillation, chains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.sweeps.points import Point, same_value
from megatron.sweeps.states import run_state
from megatron.sweeps.sweep_file import Stage, Variant


def unfinished_teachers(points: Sequence[Point], folder: Path) -> str | None:
    """Return what students of all these points wait for, or None if every run has finished."""
    states = {point.id: run_state(point.folder(folder)).name for point in points}
    unfinished = [states[point.id] for point in points if states[point.id] != "finished"]
    if not unfinished:
        return None
    failed = sum(state in ("failed", "lost") for state in unfinished)
    note = f", {failed} of them failed or lost" if failed else ""
    return f"waits for {len(unfinished)} of {len(points)} points of stage {points[0].stage}, its teachers{note}"


def teacher_ids(stage: Stage, variant: Variant, axes: dict[str, Any], points: Sequence[Point]) -> list[str]:
    """Return the ids of a student's teachers among the points of the stage `teachers_of`.

    They are the points of the same variant, or of the only one there, with the same values of the axes that both stages
    have, one for each of `teacher_seeds`.
    """
    names = {point.variant for point in points}
    name = variant.name if variant.name in names else next(iter(names), None)
    return [
        point.id
        for point in points
        if point.variant == name
        and (not stage.teacher_seeds or point.seed in stage.teacher_seeds)
        and all(same_value(value, axes[axis]) for axis, value in point.axes.items() if axis in axes)
    ]
