"""The fitting tool: its options as forms, frozen parameters and bases, and the answers of fitted laws."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.errors import ConfigurationError
from megatron.laws.answers import Crossing, Optimum, best_run, critical_compute, enough, to_json
from megatron.laws.base import Form, Law, LawTable
from megatron.laws.record import plain
from megatron.laws.registry import FORMS, form_named, load_law
from megatron.laws.table import short

PUBLISHED = "published"
# forms whose E, A, B, alpha and beta are those of runs without repetition
BASE_FORMS = ("chinchilla", *(form.name for form in FORMS.values() if form.base))
QUANTITIES = {"parameters": "N", "unique_tokens": "U", "epochs": "epochs"}  # with a range in the notes of a law


@dataclass(frozen=True)
class Request:
    """A form to fit, its frozen parameters and where its base comes from."""

    form: Form
    frozen: dict[str, float] = field(default_factory=dict)
    base: str = ""


def requests(forms: str, freeze: Sequence[str], base: str | None) -> list[Request]:
    """Return what to fit for --form NAME,NAME, --freeze NAME=VALUE and --base published or FILE[:FORM].

    A frozen parameter or a base holds for those of the forms that have it.

    Raises: ConfigurationError for unknown forms, parameters that no form has, values that are no numbers, a base that
    no form takes or that lacks a parameter.
    """
    chosen = [form_named(name) for name in dict.fromkeys(forms.split(","))]
    frozen = frozen_values(freeze, chosen)
    results = []
    for form in chosen:
        own = {name: value for name, value in frozen.items() if name in form.parameters}
        constants, label = _base_of(form, base, own) if base else ({}, "")
        results.append(Request(form, {**constants, **own}, label))
    if base and not any(request.base for request in results):
        raise ConfigurationError(
            f"--base {base}: {forms} has no base; leave out --base or choose a form such as repetition"
        )
    return results


def frozen_values(freeze: Sequence[str], forms: Sequence[Form]) -> dict[str, float]:
    """Return the values of --freeze NAME=VALUE, several separated by commas or by repeating the flag.

    Raises: ConfigurationError for a name that none of the forms has, or no number.
    """
    known = list(dict.fromkeys(name for form in forms for name in form.parameters))
    values = {}
    for word in (word for words in freeze for word in words.split(",")):
        name, equals, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            raise ConfigurationError(f"--freeze {word}: must be NAME=VALUE with a number, such as R_D*=15.4") from None
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"the parameters are {', '.join(known)}"
            raise ConfigurationError(f"--freeze {word}: no parameter of {', '.join(f.name for f in forms)}; {remedy}")
        values[name] = value
    return values


def _base_of(form: Form, base: str, frozen: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Return the constants of a form's base, less those of --freeze, and how they are printed.

    Both are empty for a form without a base.
    """
    if not form.base:
        return {}, ""
    if base == PUBLISHED:
        if not form.published:
            raise ConfigurationError(
                f"--base {PUBLISHED}: {form.source} prints no base for {form.name}; fit chinchilla to single-epoch "
                f"runs and give its fit.json"
            )
        values, origin = dict(form.published), f"{PUBLISHED} ({form.source})"
    else:
        law = load_law(base)
        if law.form.name not in BASE_FORMS:
            raise ConfigurationError(
                f"--base {base}: parameters of {law.form.name} are no base of {form.name}; give a fit of "
                f"{', '.join(BASE_FORMS)}"
            )
        values, origin = law.values, f"{base} ({law.form.name}, {law.notes.get('rows', '?')} rows)"
    constants = {name: values[name] for name in form.base if name not in frozen}
    return constants, f"frozen, {origin}: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items())


def check_flops(table: LawTable, budgets: Sequence[float], flops: Sequence[float]) -> None:
    """Check that compute budgets allow the smallest model of a table the fewest epochs of the table, at most one.

    Raises: ConfigurationError for a compute budget below that on any number of unique tokens.
    """
    for budget in budgets:
        least = float(table.compute.flops(table.parameters.min(), budget * min(1.0, float(table.epochs.min()))))
        for compute in flops:
            if compute < least:
                raise ConfigurationError(
                    f"--flops {compute:g}: the smallest model of the table, {short(float(table.parameters.min()))} "
                    f"parameters, takes {least:.3g} FLOPs (6 N D) on {short(budget)} unique tokens; give more"
                )


def answers(
    law: Law,
    budgets: Sequence[float],
    flops: Sequence[float],
    other: Law | None = None,
    *,
    level: float = 0.95,
    progress: bool = False,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what a law answers for data budgets, as lines and as records.

    For each number of unique tokens: the best size and epochs without a limit of compute, the least compute that comes
    close, the best run at each of `flops`, and the compute from which this law is ahead of `other`, with an interval
    of `level`.
    """
    lines: list[str] = []
    records: list[dict[str, Any]] = []

    def add(label: str, budget: float, answer: Any, outside: Sequence[str] = ()) -> None:
        if isinstance(answer, Optimum):
            outside = _outside(law, answer)
        text = str(answer) if answer is not None else _no_floor(law)
        text += f"; outside the range of the runs: {', '.join(outside)}" if outside else ""
        lines.append(f"  {label}: {text}")
        record = {"question": label, "form": law.form.name, "unique_tokens": budget, "answer": to_json(answer)}
        records.append({**record, "outside": list(outside)})

    if other is not None:
        file = other.notes.get("file", other.form.name)
        lines.append(f"  critical compute is against {file} ({origin(other.notes)})")
    for budget in budgets:
        add(f"best run on {short(budget)} unique tokens", budget, best_run(law, budget))
        add(f"enough on {short(budget)} unique tokens", budget, enough(law, budget))
        for compute in flops:
            label = f"best run on {short(budget)} unique tokens at {compute:.3g} FLOPs"
            add(label, budget, best_run(law, budget, compute))
        if other is not None:
            names = _names(law, other)
            crossing = critical_compute(law, other, budget, level=level, names=names, progress=progress)
            outside = _outside_at_crossing(crossing, (law, other))
            add(f"{names[0]} overtakes {names[1]}", budget, crossing, outside)
    return lines, [plain(record) for record in records]


def _names(law: Law, other: Law) -> tuple[str, str]:
    """Return two laws as text: form and table; where these are equal, also the filters or the file of one alone."""
    first, second = (f"{side.form.name} of {side.notes.get('table', 'a table')}" for side in (law, other))
    if first != second:
        return first, second
    filters, others = (side.notes.get("filters", ()) for side in (law, other))
    own = [condition for condition in filters if condition not in others]
    others_own = [condition for condition in others if condition not in filters]
    if not own and not others_own:
        others_own = [other.notes.get("file", "the other fit")]

    def name(words: Sequence[str]) -> str:
        return f"{first} ({'; '.join(words)})" if words else first

    return name(own), name(others_own)


def _no_floor(law: Law) -> str:
    """Return why a law does not say how much compute is enough."""
    if not law.form.models_repetition:
        return f"none: {law.form.name} counts repeated tokens as new ones"
    return "none: the loss still falls at the end of the range of the search"


def _outside(law: Law, answer: Optimum) -> list[str]:
    """Return the quantities of an answer outside the range of the runs that the law was fitted to, as text."""
    words = []
    for name, symbol in QUANTITIES.items():
        low, high = law.notes.get("range", {}).get(name, (0.0, float("inf")))
        if not low * (1 - 1e-6) <= getattr(answer, name) <= high * (1 + 1e-6):
            words.append(f"{symbol} ({' to '.join(dict.fromkeys((short(low), short(high))))})")
    return words


def _outside_at_crossing(crossing: Crossing, laws: Sequence[Law]) -> list[str]:
    """Return the quantities of the best run of each law at critical compute outside its own runs, as text."""
    if crossing.flops is None:
        return []
    best = [best_run(law, crossing.unique_tokens, crossing.flops) for law in laws]
    sides = zip(laws, best, crossing.names, strict=True)
    return [f"{word} for {name}" for law, run, name in sides for word in _outside(law, run)]


def origin(notes: Mapping[str, Any]) -> str:
    """Return table, filters and base of a law as they are printed with its answers."""
    filters = "; ".join(notes.get("filters", ())) or "no filter"
    return f"{notes.get('table', 'a table')}, {filters}, base {notes.get('base') or 'fitted'}"
