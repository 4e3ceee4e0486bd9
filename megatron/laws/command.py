"""The fitting tool: its options as forms, frozen parameters and bases, and the answers of fitted laws."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import ConfigurationError
from megatron.laws.answers import best_run, critical_compute, enough, to_json
from megatron.laws.base import Form, Law
from megatron.laws.registry import form_named, load_law
from megatron.laws.table import short

PUBLISHED = "published"


@dataclass(frozen=True)
class Request:
    """A form to fit, its frozen parameters and where its base comes from."""

    form: Form
    frozen: dict[str, float] = field(default_factory=dict)
    base: str = ""


def requests(forms: str, freeze: Sequence[str], base: str | None) -> list[Request]:
    """Return what to fit for --form NAME,NAME, --freeze NAME=VALUE and --base published or FILE.

    A frozen parameter or a base holds for those of the forms that have it.

    Raises: ConfigurationError for unknown forms, parameters that no form has, values that are no numbers, a base that
    no form takes or that lacks a parameter.
    """
    chosen = [form_named(name) for name in dict.fromkeys(forms.split(","))]
    frozen = frozen_values(freeze, chosen)
    results = []
    for form in chosen:
        constants, label = _base_of(form, base) if base else ({}, "")
        own = {name: value for name, value in frozen.items() if name in form.parameters}
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


def _base_of(form: Form, base: str) -> tuple[dict[str, float], str]:
    """Return the constants of a form's base and how they are printed; nothing for a form without a base."""
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
        law = load_law(Path(base))
        values, origin = law.values, f"{base} ({law.form.name}, {law.notes.get('rows', '?')} rows)"
    missing = [name for name in form.base if name not in values]
    if missing:
        raise ConfigurationError(f"--base {base}: has no {', '.join(missing)}; give a fit of chinchilla or repetition")
    constants = {name: values[name] for name in form.base}
    return constants, f"frozen, {origin}: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items())


def answers(
    law: Law, budgets: Sequence[float], flops: Sequence[float], other: Law | None, progress: bool = False
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what a law answers for data budgets, as lines and as records.

    For each number of unique tokens: the best size and epochs without a limit of compute, the least compute that comes
    close, the best run at each of `flops`, and the compute from which this law is ahead of `other`.
    """
    lines: list[str] = []
    records: list[dict[str, Any]] = []

    def add(label: str, budget: float, answer) -> None:
        lines.append(f"  {label}: {answer}")
        records.append({"question": label, "form": law.form.name, "unique_tokens": budget, "answer": to_json(answer)})

    for budget in budgets:
        add(f"best run on {short(budget)} unique tokens", budget, best_run(law, budget))
        add(f"enough on {short(budget)} unique tokens", budget, enough(law, budget))
        for compute in flops:
            label = f"best run on {short(budget)} unique tokens at {compute:.3g} FLOPs"
            add(label, budget, best_run(law, budget, compute))
        if other is not None:
            crossing = critical_compute(law, other, budget, progress=progress)
            add(f"{law.form.name} overtakes {other.form.name}", budget, crossing)
    return lines, records


def origin(notes: Mapping[str, Any]) -> str:
    """Return table, filters and base of a law as they are printed with its answers."""
    filters = "; ".join(notes.get("filters", ())) or "no filter"
    return f"{notes.get('table', 'a table')}, {filters}, base {notes.get('base') or 'fitted'}"
