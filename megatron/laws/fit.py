"""Fits a form to a table: frozen parameters, starts, the best of the local minima."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.errors import ConfigurationError
from megatron.laws.base import Form, LawTable
from megatron.laws.optimise import Objective, descend, polish

MAX_STARTS = 96  # of the grid: the best third by objective, the others evenly over the grid
POLISHED = 5  # distinct local minima that L-BFGS-B refines
SAME_OPTIMUM = 1e-4  # relative difference of two objectives at which they count as the same


@dataclass(frozen=True, eq=False)
class Fit:
    """A form fitted to a table, before any statement about its uncertainty."""

    objective: Objective
    frozen: Mapping[str, float]  # public values
    theta: np.ndarray  # [P]
    value: float  # sum of Huber's losses
    optima: np.ndarray  # [K, P] distinct local minima, the best first
    num_starts: int
    agreeing_starts: int  # that reached the best objective

    @property
    def form(self) -> Form:
        """The form that was fitted."""
        return self.objective.form

    @property
    def table(self) -> LawTable:
        """The rows it was fitted to."""
        return self.objective.table

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted parameters."""
        return tuple(self.form.parameters[index] for index in self.objective.free)

    @cached_property
    def residuals(self) -> np.ndarray:
        """log L - log loss of each row. [R]"""
        return self.objective.residuals(self.theta)[0]

    @property
    def num_groups(self) -> int:
        """The number of groups of runs that differ in their seed only."""
        return len(np.unique(self.table.group))


def fit(form: Form, table: LawTable, frozen: Mapping[str, float] | None = None) -> Fit:
    """Return the best fit of a form to a table from a grid of starts, with some parameters frozen at public values.

    Raises: ConfigurationError for unknown names or values of frozen parameters, nothing to fit, too few rows, or too
    few budgets.
    """
    frozen = dict(frozen or {})
    check(form, table, frozen)
    free = tuple(index for index, name in enumerate(form.parameters) if name not in frozen)
    objective = Objective(form, table, free)
    starts = _thinned(objective, form.starts(table, frozen))
    minima, values = descend(objective, starts)
    order = _distinct(minima[:, free], values)
    polished = sorted((polish(objective, minima[index]) for index in order), key=lambda optimum: optimum[1])
    best = min(polished[0][1], float(values.min()))
    return Fit(
        objective=objective,
        frozen=frozen,
        theta=polished[0][0],
        value=polished[0][1],
        optima=np.array([theta for theta, _ in polished]),
        num_starts=len(starts),
        agreeing_starts=int((values <= best * (1 + SAME_OPTIMUM)).sum()),
    )


def fit_from(form: Form, table: LawTable, frozen: Mapping[str, float], start: Mapping[str, float]) -> Fit:
    """Return the local fit from one start, given as public values."""
    check(form, table, frozen)
    free = tuple(index for index, name in enumerate(form.parameters) if name not in frozen)
    objective = Objective(form, table, free)
    theta, value = polish(objective, form.internal({**start, **frozen}))
    return Fit(objective, frozen, theta, value=value, optima=theta[None], num_starts=1, agreeing_starts=1)


def check(form: Form, table: LawTable, frozen: Mapping[str, float]) -> None:
    """Check that the rows can determine the parameters that are not frozen.

    Raises: ConfigurationError as `fit` does.
    """
    form.check_names(list(frozen), "--freeze")
    for name, value in frozen.items():
        if not np.isfinite(value) or value < 0 or (value == 0 and name not in form.vanishing):
            zero = " or 0" if name in form.vanishing else ""
            raise ConfigurationError(f"--freeze {name}={value:g}: must be positive{zero}; correct the value")
    free = [name for name in form.parameters if name not in frozen]
    if not free:
        raise ConfigurationError(f"--form {form.name}: every parameter is frozen, nothing to fit; free one")
    source = table.source or "table"
    needed = form.minimum_rows(frozen)
    if table.num_distinct < needed:
        raise ConfigurationError(
            f"{source}: {table.num_distinct} distinct runs ({len(table)} rows; seeds count once) cannot determine the "
            f"{len(free)} parameters of {form.name}, which needs {needed}; add runs, freeze parameters or choose a "
            f"form with fewer"
        )
    undetermined = [name for name in form.across_budgets if name in free]
    if len(table.budgets) == 1 and undetermined:
        raise ConfigurationError(
            f"{source}: all runs have {table.budgets[0]:.4g} unique tokens, and {', '.join(undetermined)} of "
            f"{form.name} describe several budgets; add runs of other budgets, or freeze them (--freeze, --base)"
        )


def _thinned(objective: Objective, starts: np.ndarray) -> np.ndarray:
    """Return at most MAX_STARTS of the starts."""
    if len(starts) <= MAX_STARTS:
        return starts
    best = np.argsort(objective.value(starts))[: MAX_STARTS // 3]
    even = np.linspace(0, len(starts) - 1, MAX_STARTS - len(best)).round().astype(int)
    return starts[np.unique(np.concatenate([best, even]))]


def _distinct(theta: np.ndarray, values: np.ndarray) -> list[int]:
    """Return the indices of the best POLISHED minima that differ by more than rounding, the best first."""
    chosen: list[int] = []
    for index in np.argsort(values):
        same = any(
            values[index] <= values[other] * (1 + SAME_OPTIMUM) and np.abs(theta[index] - theta[other]).max() < 0.05
            for other in chosen
        )
        if not same:
            chosen.append(int(index))
        if len(chosen) == POLISHED:
            break
    return chosen
