"""How much more unique data a baseline needs to reach the loss of a method: the data multiplier.

1. A baseline is measured runs over unique tokens: at each budget the mean over seeds of its best recipe, as chosen on
   the tuning set.
2. Between two budgets its loss is interpolated, linearly in the tokens or in their logarithm. The first budget that
   reaches the loss of the method counts.
3. The multiplier is the tokens that the baseline needs, divided by those of the method. Beyond the measured budgets it
   is a bound, or an extrapolation of the last segment up to a stated factor.
4. Seeds of both sides are resampled for an interval, with the choice of the best recipe inside.

The yardstick of qlabs-eng/slowrun (`data_eff`) is this for baselines on fresh tokens, interpolated linearly. The number
depends on the baseline as much as on the method, so that every answer carries its baseline.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, t

from megatron.errors import ConfigurationError
from megatron.laws.base import counted_epochs
from megatron.laws.record import plain
from megatron.laws.rows import CORPUS
from megatron.laws.table import Runs, short
from megatron.randomness import stream

INTERPOLATIONS = {"log": (np.log, np.exp), "linear": (np.asarray, np.asarray)}
RESAMPLES = 1000
# columns of an evaluation that must agree between baseline and method: likelihood and bound may differ
COMPARABLE = (*CORPUS, "set", "alignment", "valid-data-path", "eval-samples", "eval-seed", "eval-alignment")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Runs on one data budget that differ in their seed only."""

    settings: dict[str, Any]
    parameters: float | None
    epochs: float | None
    losses: np.ndarray  # [S] nats per token, a loss per seed
    selection_losses: np.ndarray  # [S] on the set that chooses

    def resampled(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return means over resampled seeds, of losses and selection losses. [RESAMPLES], [RESAMPLES]

        Resampled deviations are scaled by sqrt(S / (S - 1)), as the mean of few seeds varies more than its resamples
        (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 2.3.2).
        """
        num_seeds = len(self.losses)
        index = draws.integers(num_seeds, size=(RESAMPLES, num_seeds))
        scale = np.sqrt(num_seeds / max(num_seeds - 1, 1))
        means = []
        for losses in (self.losses, self.selection_losses):
            means.append(losses.mean() + scale * (losses[index].mean(axis=1) - losses.mean()))
        return means[0], means[1]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The best loss of a method over data budgets, with all recipes that it was chosen from."""

    name: str
    source: str
    filters: tuple[str, ...]
    shared: dict[str, Any]
    chosen_on: str | None  # the set whose losses choose the best recipe
    budgets: np.ndarray  # [K] unique tokens, ascending
    recipes: list[list[Recipe]]  # [K] lists, the best recipe of a budget first
    notes: tuple[str, ...] = ()  # on the groups of seeds, printed with the answer

    @property
    def losses(self) -> np.ndarray:
        """Mean losses of the best recipes. [K]"""
        return np.array([recipes[0].losses.mean() for recipes in self.recipes])

    @property
    def is_bound(self) -> bool:
        """Whether losses are upper bounds of the negative log-likelihood."""
        return bool(self.shared.get("bound", False))

    @property
    def is_repeated(self) -> bool:
        """Whether any recipe has several seeds, so that there is something to resample."""
        return any(len(recipe.losses) > 1 for recipes in self.recipes for recipe in recipes)

    def degrees_of_freedom(self, tokens: float) -> int:
        """Return the number of seeds beyond the first of the best recipes at the budgets that decide the loss there."""
        upper = np.clip(np.searchsorted(self.budgets, tokens), 0, len(self.budgets) - 1)
        ends = {upper} if self.budgets[upper] == tokens or not upper else {upper - 1, upper}
        return sum(len(self.recipes[end][0].losses) - 1 for end in ends)

    def resampled(self, draws: np.random.Generator) -> np.ndarray:
        """Return the curve of resampled seeds, the best recipes chosen again. [RESAMPLES, K]"""
        columns = []
        for recipes in self.recipes:
            losses, selection_losses = zip(*(recipe.resampled(draws) for recipe in recipes))
            best = np.argmin(selection_losses, axis=0)  # [RESAMPLES]
            columns.append(np.take_along_axis(np.array(losses), best[None], 0)[0])
        return np.stack(columns, axis=1)

    def to_json(self) -> dict[str, Any]:
        """Return the curve as reports read it."""
        points = [
            {
                "unique_tokens": float(budget),
                "loss": float(recipes[0].losses.mean()),
                "seeds": len(recipes[0].losses),
                "chosen_from": len(recipes),
                "parameters": recipes[0].parameters,
                "epochs": recipes[0].epochs,
                "settings": recipes[0].settings,
            }
            for budget, recipes in zip(self.budgets, self.recipes)
        ]
        return {
            "name": self.name,
            "source": self.source,
            "filters": list(self.filters),
            "evaluation": self.shared,
            "bound": self.is_bound,
            "recipe": self.recipe(),
            "chosen_on": self.chosen_on,
            "points": points,
        }

    @property
    def most_recipes(self) -> int:
        """The most recipes that any budget's best was chosen from."""
        return max(map(len, self.recipes))

    def recipe(self) -> str:
        """Return what was trained, in words: how recipes were chosen, their epochs, sizes, seeds and data budgets."""
        words = ["one recipe"]
        if self.most_recipes > 1:
            words = [f"best of {_span(list(map(len, self.recipes)))} recipes at each budget"]
            words += [f"chosen on {self.chosen_on}"] if self.chosen_on else []
        best = [recipes[0] for recipes in self.recipes]
        epochs = [recipe.epochs for recipe in best if recipe.epochs is not None]
        words.append(f"epochs {_span(epochs)}" if epochs else "epochs not given")
        sizes = [recipe.parameters for recipe in best if recipe.parameters is not None]
        words += [f"parameters {_span(sizes)}"] if sizes else []
        words.append(f"seeds {_span([len(recipe.losses) for recipe in best])}")
        words.append(f"unique tokens {_span(self.budgets)}")
        if len(self.budgets) > 1:
            words[-1] += f" ({len(self.budgets)} budgets)"
        return "; ".join(words)


NO_STATEMENT = "no statement"
# (is the baseline's loss an upper bound, is the method's) -> sign of a multiplier, caveat
_BOUNDS = {
    (False, False): ("", ""),
    (False, True): (
        ">=",
        "the method's losses are upper bounds of its negative log-likelihood: it is worth at least these multipliers",
    ),
    (True, False): (
        "<=",
        "the baseline's losses are upper bounds of its negative log-likelihood: it may need fewer tokens",
    ),
    (True, True): ("", "losses of both sides are upper bounds of the negative log-likelihood"),
}


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """The answer for one data budget of the method."""

    unique_tokens: float
    loss: float  # nats per token
    how: str  # "interpolated", "extrapolated", "above the range" or "below the range" of the baseline
    baseline_tokens: float | None  # unique tokens that the baseline needs; None outside the range
    multiplier: float | None  # None outside the range
    more_than: float | None  # above the range: the largest measured budget of the baseline, as a multiplier
    less_than: float | None  # below the range: the smallest
    interval: tuple[float | None, float | None] | None  # 95%; an end outside the range is None; None without seeds
    resamples_outside: int  # resamples whose multiplier lies outside the range
    sign: str  # ">=" or "<=" before a multiplier from losses that are upper bounds; "" before a limit of the range
    caveat: str  # what upper bounds mean for this answer; starts with NO_STATEMENT where they leave none

    def __str__(self) -> str:
        if self.caveat.startswith(NO_STATEMENT):
            return self.caveat
        if self.multiplier is None:
            text = f"more than {self.more_than:.3g}x" if self.more_than else f"less than {self.less_than:.3g}x"
        else:
            text = f"{self.sign} {self.multiplier:.3g}x".lstrip()
        if self.interval and any(self.interval):
            low, high = (f"{end:.3g}" if end is not None else "outside the range" for end in self.interval)
            text += f" [{low}, {high}]"
        return text


def curve(name: str, runs: Runs) -> Curve:
    """Return the curve of runs over data budgets.

    A run's budget is its training set. On a set that no run has read to its end, such as the corpus of runs on fresh
    tokens, it is the tokens that the run has read by its last validation.
    """
    # [R], false where tokens are NaN
    partial = counted_epochs(runs.last_tokens, runs.unique_tokens, runs.sample_tokens) < 1
    whole_sets = runs.unique_tokens[~partial]
    budget_of_run = np.where(partial & ~np.isin(runs.unique_tokens, whole_sets), runs.last_tokens, runs.unique_tokens)
    budgets = np.unique(budget_of_run)
    recipes = []
    for budget in budgets:
        groups = np.unique(runs.group[budget_of_run == budget])
        chosen = [_recipe(runs, np.flatnonzero((runs.group == group) & (budget_of_run == budget))) for group in groups]
        recipes.append(sorted(chosen, key=lambda recipe: recipe.selection_losses.mean()))
    return Curve(
        name=name,
        source=runs.source,
        filters=runs.filters,
        shared=runs.shared,
        chosen_on=runs.chosen_on,
        budgets=budgets,
        recipes=recipes,
        notes=runs.notes,
    )


def measured_loss(loss: float, unique_tokens: float) -> Curve:
    """Return the curve of a single loss that is known from elsewhere."""
    losses = np.array([loss])
    recipe = Recipe(settings={}, parameters=None, epochs=None, losses=losses, selection_losses=losses)
    budgets = np.array([unique_tokens])
    return Curve(
        name="given loss", source="", filters=(), shared={}, chosen_on=None, budgets=budgets, recipes=[[recipe]]
    )


def _recipe(runs: Runs, rows: np.ndarray) -> Recipe:
    epochs = float(np.mean(counted_epochs(runs.tokens[rows], runs.unique_tokens[rows], runs.sample_tokens)))
    parameters = float(runs.parameters[rows[0]])
    return Recipe(
        settings=runs.settings[rows[0]],
        parameters=parameters if np.isfinite(parameters) else None,
        epochs=epochs if np.isfinite(epochs) else None,
        losses=runs.loss[rows],
        selection_losses=runs.selection_loss[rows],
    )


def check_comparable(baseline: Curve, method: Curve) -> None:
    """Check that the losses of baseline and method are of one corpus and one kind of evaluation.

    Raises: ConfigurationError if they differ, or the baseline has a single data budget.
    """
    if len(baseline.budgets) < 2:
        raise ConfigurationError(
            f"--baseline {baseline.name}: has runs on {baseline.budgets[0]:.4g} unique tokens only; a multiplier needs "
            "two data budgets or more"
        )
    for name in COMPARABLE:
        values = [side.shared.get(name) for side in (baseline, method)]
        if None not in values and values[0] != values[1]:
            raise ConfigurationError(
                f"--method {method.name}: {name} is {values[1]}, and {values[0]} for the baseline {baseline.name}; "
                "compare losses of one corpus and one evaluation"
            )


def multipliers(
    baseline: Curve, method: Curve, interpolation: str = "log", extrapolate: float = 1.0
) -> list[Multiplier]:
    """Return the data multiplier at each data budget of the method.

    `extrapolate` is by what factor the largest budget of the baseline may be exceeded.

    Raises: ConfigurationError for sides that are not comparable, and a factor below 1.
    """
    if not 1 <= extrapolate < float("inf"):
        raise ConfigurationError(f"--extrapolate {extrapolate:g}: must be a factor of at least 1")
    check_comparable(baseline, method)
    needed = _needed(baseline.budgets, baseline.losses[None], method.losses[:, None], interpolation)[:, 0]  # [M]
    resampled = _resampled(baseline, method, interpolation)  # [M, RESAMPLES]
    limit = baseline.budgets[-1] * extrapolate
    answers = []
    for index, (budget, loss) in enumerate(zip(method.budgets, method.losses)):
        tokens = float(needed[index])
        inside = 0 < tokens <= limit
        how = "interpolated" if tokens <= baseline.budgets[-1] else "extrapolated"
        how = how if inside else "below the range" if tokens == 0 else "above the range"
        draws = resampled[index] if resampled is not None else np.empty(0)
        degrees = method.degrees_of_freedom(budget) + baseline.degrees_of_freedom(tokens)
        sign, caveat = _sign(baseline, method, how)
        answers.append(
            Multiplier(
                unique_tokens=float(budget),
                loss=float(loss),
                how=how,
                baseline_tokens=tokens if inside else None,
                multiplier=tokens / float(budget) if inside else None,
                more_than=float(baseline.budgets[-1] / budget) if tokens > limit else None,
                less_than=float(baseline.budgets[0] / budget) if tokens == 0 else None,
                interval=_interval(draws / budget, limit / budget, degrees) if len(draws) and degrees else None,
                resamples_outside=int(np.sum((draws == 0) | (draws > limit))),
                sign=sign,
                caveat=caveat,
            )
        )
    return answers


def _sign(baseline: Curve, method: Curve, how: str) -> tuple[str, str]:
    """Return the sign before a multiplier, and what upper bounds mean for it.

    "More than" the range of a baseline needs its own loss, since it may be better than a bound; "less than" needs the
    method's.
    """
    if how == "above the range":
        return "", f"{NO_STATEMENT} (the baseline's loss is an upper bound)" if baseline.is_bound else ""
    if how == "below the range":
        return "", f"{NO_STATEMENT} (the method's loss is an upper bound)" if method.is_bound else ""
    return _BOUNDS[baseline.is_bound, method.is_bound]


def _needed(budgets: np.ndarray, losses: np.ndarray, targets: np.ndarray, interpolation: str) -> np.ndarray:
    """Return the least unique tokens at which baselines reach target losses.

    `budgets` [K], `losses` [R, K], `targets` [M, R] or [M, 1] -> [M, R]; 0 if the smallest budget is already better.
    Beyond the largest budget the last segment is continued; inf if it does not fall.
    """
    forward, back = INTERPOLATIONS[interpolation]
    positions = forward(budgets.astype(float))
    reached = losses[None] <= targets[..., None]  # [M, R, K]
    index = np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), len(budgets) - 1)  # of a segment's upper end
    before_first = reached[..., 0]
    upper = np.maximum(index, 1)
    losses = np.broadcast_to(losses[None], reached.shape)
    low, high = (np.take_along_axis(losses, end[..., None], -1)[..., 0] for end in (upper - 1, upper))
    fall = low - high
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(fall > 0, (low - targets) / fall, np.inf)
        tokens = back(positions[upper - 1] + share * (positions[upper] - positions[upper - 1]))
    tokens = np.where(reached.any(axis=-1), np.minimum(tokens, budgets[upper]), tokens)  # rounding of exp(log)
    exactly_first = losses[..., 0] == targets
    return np.where(before_first, np.where(exactly_first, budgets[0], 0.0), tokens)


def _resampled(baseline: Curve, method: Curve, interpolation: str) -> np.ndarray | None:
    """Return the tokens that the baseline needs in each resample [M, RESAMPLES], or None without repeated seeds."""
    if not (baseline.is_repeated or method.is_repeated):
        return None
    draws = stream(0, "data multiplier")
    losses = baseline.resampled(draws)  # [RESAMPLES, K]
    return _needed(baseline.budgets, losses, method.resampled(draws).T, interpolation)


def _interval(multiples: np.ndarray, limit: float, degrees: int) -> tuple[float | None, float | None]:
    """Return the ends of the 95% interval of resamples; None for one that lies outside the range.

    The quantiles are those of a normal variable at Student's 2.5% and 97.5% points, since the spread of the seeds is
    itself estimated, with few degrees of freedom (Hesterberg, The American Statistician 69, 2015).
    """
    tail = norm.cdf(t.ppf(0.025, degrees))
    low, high = (float(end) for end in np.quantile(multiples, [tail, 1 - tail], method="nearest"))
    return low if 0 < low <= limit else None, high if 0 < high <= limit else None


def not_falling(baseline: Curve) -> list[tuple[float, float]]:
    """Return the segments of unique tokens over which the baseline's loss does not fall."""
    rises = np.flatnonzero(np.diff(baseline.losses) >= 0)
    return [(float(baseline.budgets[index]), float(baseline.budgets[index + 1])) for index in rises]


def to_json(
    baseline: Curve, method: Curve, answers: Sequence[Multiplier], *, interpolation: str, extrapolate: float
) -> dict[str, Any]:
    """Return the record that reports read (docs/data-multiplier.md)."""
    record = {
        "kind": "data_multiplier",
        "interpolation": interpolation,
        "extrapolate": extrapolate,
        "baseline": baseline.to_json() | {"loss_does_not_fall": not_falling(baseline)},
        "method": method.to_json(),
        "answers": [asdict(answer) for answer in answers],
    }
    return plain(record)


def table(baseline: Curve, method: Curve, answers: Sequence[Multiplier], interpolation: str) -> str:
    """Return the answers as text: a line per data budget, then baseline, method and caveats."""
    head = ("unique tokens", "loss", "baseline needs", "multiplier", "how")
    rows: list[tuple[str, ...]] = [head]
    for answer in answers:
        needs = short(answer.baseline_tokens) if answer.baseline_tokens else "-"
        loss = f"{'<= ' if method.is_bound else ''}{answer.loss:.4f}"
        rows.append((short(answer.unique_tokens), loss, needs, str(answer), answer.how))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += ["", f"baseline: {baseline.name}: {baseline.recipe()}; {interpolation} interpolation"]
    if method.source:
        lines.append(f"method:   {method.name}: {method.recipe()}")
    return "\n".join([*lines, *_caveats(baseline, method, answers)])


def _caveats(baseline: Curve, method: Curve, answers: Sequence[Multiplier]) -> list[str]:
    lines = [
        f"{short(answer.unique_tokens)}: beyond the baseline's range: more than {answer.more_than:.3g}x; train the "
        "baseline on more data, or allow more with --extrapolate"
        for answer in answers
        if answer.more_than and not answer.caveat
    ]
    for low, high in not_falling(baseline):
        lines.append(f"the baseline's loss does not fall from {short(low)} to {short(high)} unique tokens")
    if any(answer.interval for answer in answers):
        lines.append(f"[ ]: 95% of {RESAMPLES} resamples of the seeds; recipes of one seed do not vary")
    elif baseline.is_repeated or method.is_repeated:
        lines.append("no interval: the budgets that decide the answer have one seed each")
    else:
        lines.append("no interval: no recipe has several seeds")
    for name, side in (("baseline", baseline), ("method", method)):
        if side.most_recipes > 1 and side.chosen_on == side.shared.get("set"):
            lines.append(
                f"recipes of the {name} were chosen by the losses that are compared; --best-on names another set"
            )
    if not method.source:
        lines.append("the given loss must be of the baseline's corpus and evaluation; this was not checked")
    lines += [*_unchecked(baseline, method), *dict.fromkeys((*baseline.notes, *method.notes))]
    caveats = dict.fromkeys(answer.caveat for answer in answers if answer.caveat)
    return [*lines, *(caveat for caveat in caveats if not caveat.startswith(NO_STATEMENT))]


def _unchecked(baseline: Curve, method: Curve) -> list[str]:
    """Return a line for the columns that only one side has, which `check_comparable` cannot compare."""
    lines = []
    for name, side, other in (("baseline", baseline, method), ("method", method, baseline)):
        missing = [column for column in COMPARABLE if column in other.shared and column not in side.shared]
        if missing and method.source:
            lines.append(f"{', '.join(missing)}: not checked (missing in the {name})")
    return lines


def _span(values: Sequence[float] | np.ndarray) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"
