"""The runs of an earlier stage as teachers of a stage with `teachers_of`: ensembles, self-distillation, chains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point, same_value, text
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


@dataclass(frozen=True)
class TeacherStage:
    """The stage `teachers_of`, and its points; without a stage there are no teachers."""

    stage: Stage | None = None
    points: Sequence[Point] = ()

    def ids(self, student: Stage, variant: Variant, axes: dict[str, Any]) -> list[str]:
        """Return the ids of the teachers of a student's points.

        They are the points of the same variant, or of the only one there, with the same values of the axes that both
        stages have, one for each of `teacher_seeds`.

        Raises: ConfigurationError where `exclude` leaves none.
        """
        if self.stage is None:
            return []
        names = [other.name for other in self.stage.variants]
        name = variant.name if variant.name in names else names[0]
        ids = [
            point.id
            for point in self.points
            if point.variant == name
            and (not student.teacher_seeds or point.seed in student.teacher_seeds)
            and all(same_value(value, axes[axis]) for axis, value in point.axes.items() if axis in axes)
        ]
        if not ids:
            label = ", ".join([variant.name, *(f"{axis} {text(value)}" for axis, value in axes.items())])
            raise ConfigurationError(
                f"stages.{student.name}: stage {self.stage.name} has no run for {label}; exclude that student as well"
            )
        return ids
