"""A form fitted to a table, with intervals, profiles, errors on held-out budgets and criteria of comparison."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron.laws.base import Form, Law, LawTable, Points
from megatron.laws.bootstrap import bootstrap, interval
from megatron.laws.compare import HeldOut, held_out_errors, information_criteria, leave_one_budget_out
from megatron.laws.fit import Fit, fit
from megatron.laws.optimise import HUBER_DELTA
from megatron.laws.profile import DETERMINED, DIVERGED, LIMIT_FACTOR, WEAK, Profile, profiles
from megatron.laws.record import plain
from megatron.laws.table import short

CURVE_BUDGETS = 6  # budgets and sizes per budget that get a curve, and the points of a curve
CURVE_SIZES = 4
CURVE_POINTS = 60
CURVE_REACH = 4.0  # times the most epochs of a size: how far its curve is drawn, within those of the budget


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """A fit with its uncertainty."""

    fit: Fit
    base: str  # where the frozen base comes from, as printed; "" if it was fitted
    level: float  # of all intervals
    draws: np.ndarray | None  # [B, P] theta
    profiles: Mapping[str, Profile]
    held_out: list[HeldOut]
    criteria: Mapping[str, float]

    @property
    def diverged(self) -> list[str]:
        """Names of the parameters without a value."""
        return [name for name, profile in self.profiles.items() if profile.status == DIVERGED]

    @property
    def law(self) -> Law | None:
        """The fitted law; None if a parameter diverged."""
        if self.diverged:
            return None
        table = self.fit.table
        notes: dict[str, Any] = {"table": table.source, "filters": list(table.filters), "rows": len(table)}
        notes |= {"base": self.base, "range": _ranges(table)}
        return Law(self.fit.form, self.fit.theta, self.draws, notes, compute=table.compute)

    @property
    def r2(self) -> float | None:
        """The share of the variance of the losses that the law explains; None if all losses are equal."""
        loss = self.fit.table.loss
        if np.ptp(loss) == 0:
            return None
        errors = np.exp(self.fit.residuals) * loss - loss
        return float(1 - (errors**2).sum() / ((loss - loss.mean()) ** 2).sum())

    def bootstrap_interval(self, name: str) -> tuple[float | None, float | None] | None:
        """Return the bootstrap interval of a parameter, ends None beyond LIMIT_FACTOR from it; None without draws."""
        if self.draws is None or name not in self.fit.free:
            return None
        index = self.fit.form.parameters.index(name)
        ends = interval(self.draws[:, index], self.level, self.fit.num_groups, len(self.fit.free))
        limit = np.log(LIMIT_FACTOR)
        low, high = (None if abs(end - self.fit.theta[index]) >= limit else float(np.exp(end)) for end in ends)
        return low, high

    def parameter(self, name: str) -> dict[str, Any]:
        """Return the record of a parameter: its value and intervals, None where it diverged."""
        frozen = name in self.fit.frozen
        value = self.fit.form.public(self.fit.theta)[name]
        if frozen:
            return {"value": value, "frozen": True, "status": DETERMINED, "bootstrap": None, "profile": None}
        profile = self.profiles[name]
        if profile.status == DIVERGED:
            record = {"value": None, "status": DIVERGED, "towards": profile.direction}
            return record | {"frozen": False, "bootstrap": None, "profile": None}
        return {
            "value": value,
            "frozen": False,
            "status": profile.status,
            "bootstrap": self.bootstrap_interval(name),
            "profile": (profile.low, profile.high),
        }

    def curves(self) -> list[dict[str, Any]]:
        """Return loss against epochs for some budgets and sizes, with runs and bootstrap bands; [] if it diverged.

        The budgets are those with the most runs, among those that were read for different numbers of epochs.
        """
        law = self.law
        if law is None:
            return []
        table = self.fit.table
        rows = {budget: table.unique_tokens == budget for budget in np.unique(table.unique_tokens)}
        repeated = [budget for budget in rows if len(np.unique(table.epochs[rows[budget]])) > 1]
        chosen = sorted(sorted(repeated, key=lambda budget: -rows[budget].sum())[:CURVE_BUDGETS])
        return [
            _curve(law, (budget, size), table, self.level)
            for budget in chosen
            for size in _spread(np.unique(table.parameters[rows[budget]]), CURVE_SIZES)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the record of this fit in fit.json."""
        form, table = self.fit.form, self.fit.table
        predicted = np.exp(self.fit.residuals) * table.loss
        diverged = bool(self.diverged)
        record = {
            "form": form.name,
            "equation": form.equation,
            "source": form.source,
            "base": self.base or None,
            "parameters": {name: self.parameter(name) for name in form.parameters},
            "level": self.level,
            "resamples": 0 if self.draws is None else len(self.draws),
            "diverged": self.diverged,
            "objective": {"value": self.fit.value, "huber_delta": HUBER_DELTA, "of": "log loss, summed over rows"},
            "starts": {"number": self.fit.num_starts, "at_the_best_objective": self.fit.agreeing_starts},
            "criteria": dict(self.criteria),
            "r2": self.r2,
            "held_out": {"errors": held_out_errors(self.held_out), "budgets": [asdict(row) for row in self.held_out]},
            "residuals": {
                "parameters": table.parameters.tolist(),
                "unique_tokens": table.unique_tokens.tolist(),
                "tokens": table.tokens.tolist(),
                "loss": table.loss.tolist(),
                "predicted": predicted.tolist(),
            },
            "profiles": {
                name: {
                    "values": profile.values.tolist(),
                    "objectives": profile.objectives.tolist(),
                    "statistics": profile.statistics.tolist(),
                }
                for name, profile in self.profiles.items()
                if profile.status != DIVERGED
            },
            "curves": self.curves(),
            "law": None if diverged or self.law is None else self.law.to_json(),
        }
        return plain(record)

    def __str__(self) -> str:
        return "\n".join([*self._header(), *self._parameter_lines(), *self._footer()])

    def _header(self) -> list[str]:
        form, table = self.fit.form, self.fit.table
        budgets = table.budgets
        tokens = " to ".join(dict.fromkeys((short(budgets[0]), short(budgets[-1]))))
        return [
            f"{form.name}: {form.equation}",
            f"  source: {form.source}",
            f"  rows: {len(table)} in {self.fit.num_groups} groups of {table.source or 'a table'}, "
            f"{len(budgets)} budgets of {tokens} unique tokens",
            f"  filter: {'; '.join(table.filters) or 'none'}",
            *(f"  note: {note}" for note in table.notes),
            f"  base: {self.base or ('fitted to the same rows' if form.base else 'none in this form')}",
            f"  objective: {self.fit.value:.6g} (Huber losses of log loss, summed, delta {HUBER_DELTA:g}); "
            f"{self.fit.agreeing_starts} of {self.fit.num_starts} starts reached it; R2 {_share(self.r2)}",
        ]

    def _parameter_lines(self) -> list[str]:
        level = f"{100 * self.level:g}%"
        lines = [f"  {'parameter':10} {'value':>11}  {level + ' bootstrap':25} {level + ' profile':25} note"]
        for name in self.fit.form.parameters:
            record = self.parameter(name)
            if record["frozen"]:
                lines.append(f"  {name:10} {record['value']:11.5g}  {'-':25} {'-':25} frozen")
            elif record["status"] == DIVERGED:
                note = f"diverged towards {record['towards']}: not identifiable from these rows"
                lines.append(f"  {name:10} {'-':>11}  {'-':25} {'-':25} {note}")
            else:
                note = "poorly determined by these rows" if record["status"] == WEAK else ""
                ends = (_ends(record["bootstrap"]), _ends(record["profile"]))
                lines.append(f"  {name:10} {record['value']:11.5g}  {ends[0]:25} {ends[1]:25} {note}".rstrip())
        return lines

    def _footer(self) -> list[str]:
        held_out = "none, too few budgets or rows"
        if errors := held_out_errors(self.held_out):
            held_out = f"{errors['median']:.4g} nats per token (median), {errors['rms']:.4g} (RMS)"
        lines = [f"  leave-one-budget-out error: {held_out}"]
        if self.diverged:
            name = self.diverged[0]
            value = 0 if name in self.fit.form.vanishing and self.profiles[name].direction == "0" else "VALUE"
            lines.append(
                f"  DIVERGED: {', '.join(self.diverged)} has no value and this fit gives no law; add runs, freeze it "
                f"(--freeze {name}={value}) or choose another form"
            )
        return lines


def study(
    form: Form,
    table: LawTable,
    frozen: Mapping[str, float],
    *,
    base: str = "",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 1,
    progress: bool = False,
) -> Study:
    """Return a form fitted to a table with intervals from `resamples` bootstrap resamples and profiles.

    Raises: ConfigurationError as `fit` does.
    """
    fitted = fit(form, table, frozen)
    return Study(
        fit=fitted,
        base=base,
        level=level,
        draws=bootstrap(fitted, resamples, seed=seed, progress=progress) if resamples else None,
        profiles=profiles(fitted, level, progress),
        held_out=leave_one_budget_out(fitted),
        criteria=information_criteria(fitted),
    )


def comparison(studies: list[Study]) -> list[dict[str, Any]]:
    """Return forms fitted to the same rows, the lowest AIC first, with differences of AIC and BIC to the lowest.

    Errors on held-out budgets are those of the budgets that every form predicts.
    """
    folds = [{(fold.lowest, fold.highest) for fold in study.held_out} for study in studies]
    common = set.intersection(*folds)
    lowest = {name: min(study.criteria[name] for study in studies) for name in ("aic", "bic")}
    return [
        {
            "form": study.fit.form.name,
            "fitted_parameters": len(study.fit.free),
            "objective": study.fit.value,
            "delta_aic": study.criteria["aic"] - lowest["aic"],
            "delta_bic": study.criteria["bic"] - lowest["bic"],
            "r2": study.r2,
            "held_out_errors": held_out_errors(
                [fold for fold in study.held_out if (fold.lowest, fold.highest) in common]
            ),
            "diverged": study.diverged,
        }
        for study in sorted(studies, key=lambda study: study.criteria["aic"])
    ]


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Return a comparison as text."""
    lines = [f"{'form':20} {'fitted':>6} {'objective':>11} {'dAIC':>9} {'dBIC':>9} {'R2':>8} {'median':>8} {'RMS':>8}"]
    for row in rows:
        errors = [f"{error:.4g}" for error in (row["held_out_errors"] or {}).values()] or ["-", "-"]
        note = f"  diverged: {', '.join(row['diverged'])}" if row["diverged"] else ""
        lines.append(
            f"{row['form']:20} {row['fitted_parameters']:6} {row['objective']:11.6g} {row['delta_aic']:9.2f} "
            f"{row['delta_bic']:9.2f} {_share(row['r2']):>8} {errors[1]:>8} {errors[0]:>8}{note}"
        )
    return "\n".join(lines)


def _share(r2: float | None) -> str:
    return "-" if r2 is None else f"{r2:.4f}"


def _ranges(table: LawTable) -> dict[str, list[float]]:
    """Return the least and the most of N, U and epochs of the runs."""
    quantities = {
        "parameters": table.parameters,
        "unique_tokens": table.unique_tokens,
        "epochs": table.counted_epochs,
    }
    return {name: [float(values.min()), float(values.max())] for name, values in quantities.items()}


def _ends(ends: tuple[float | None, float | None] | None) -> str:
    if ends is None:
        return "-"
    low, high = ("unbounded" if end is None else f"{end:.4g}" for end in ends)
    return f"[{low}, {high}]"


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the values, evenly by rank."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def _curve(law: Law, budget_and_size: tuple[float, float], table: LawTable, level: float) -> dict[str, Any]:
    """Return the curve of one budget and size: epochs, loss, the band of the draws, and the runs."""
    budget, size = budget_and_size
    rows = (table.unique_tokens == budget) & (table.parameters == size)
    within = table.epochs[table.unique_tokens == budget]
    most = min(within.max(), CURVE_REACH * table.epochs[rows].max())
    epochs = np.geomspace(within.min(), max(most, within.min() * 1.01), CURVE_POINTS)
    points = Points(np.full(CURVE_POINTS, size), np.full(CURVE_POINTS, budget), epochs * budget)
    low = high = None
    if law.draws is not None:
        with np.errstate(over="ignore"):
            losses = np.exp(law.form.log_loss(law.draws, points))  # [B, points]
        low, high = (np.quantile(losses, tail, axis=0).tolist() for tail in ((1 - level) / 2, (1 + level) / 2))
    return {
        "unique_tokens": float(budget),
        "parameters": float(size),
        "epochs": epochs.tolist(),
        "loss": np.exp(law.form.log_loss(law.theta, points)).tolist(),
        "low": low,
        "high": high,
        "runs": {"epochs": table.epochs[rows].tolist(), "loss": table.loss[rows].tolist()},
    }
