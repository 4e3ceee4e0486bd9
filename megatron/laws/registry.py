"""The registered forms. A form is a file in megatron/laws/forms and its entry here."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError
from megatron.laws.base import Form, Law
from megatron.laws.forms.bounded import Bounded
from megatron.laws.forms.chinchilla import Chinchilla
from megatron.laws.forms.geometric import Geometric
from megatron.laws.forms.outer_exponent import OuterExponent
from megatron.laws.forms.overfitting import Overfitting
from megatron.laws.forms.overfitting_linear import OverfittingLinear
from megatron.laws.forms.quokka import Quokka
from megatron.laws.forms.repetition import Repetition

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Chinchilla(),
        OuterExponent(),
        Repetition(),
        Geometric(),
        Quokka(),
        Overfitting(),
        OverfittingLinear(),
        Bounded(),
    )
}


def form_named(name: str, flag: str = "--form") -> Form:
    """Return the form of a name.

    Raises: ConfigurationError for an unknown name.
    """
    if name not in FORMS:
        close = difflib.get_close_matches(name, FORMS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"the forms are {', '.join(FORMS)}"
        raise ConfigurationError(f"{flag} {name}: no such form; {remedy}")
    return FORMS[name]


def from_json(record: Mapping) -> Law:
    """Return the law of a record that `Law.to_json` wrote."""
    form = form_named(record["form"], "form")
    draws = np.log(np.array(record["draws"])) if record.get("draws") else None
    return Law(form, form.internal(record["values"]), draws, record.get("notes", {}))


def load_law(path: Path, name: str | None = None) -> Law:
    """Return a law of a fit.json: that of the form `name`, or the first.

    Raises: ConfigurationError if the file is not a fit, has no such form, or its fit diverged.
    """
    try:
        record = json.loads(Path(path).read_text())
        fits = {fit["form"]: fit for fit in record["fits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: not a fit of tools/fit_scaling_laws.py ({error}); give its fit.json"
        ) from error
    form = name or next(iter(fits))
    if form not in fits:
        raise ConfigurationError(f"{path}: no fit of the form {form}; it has {', '.join(fits)}")
    if fits[form]["law"] is None:
        raise ConfigurationError(
            f"{path}: the fit of {form} diverged and gives no law; freeze the parameter or choose another form"
        )
    return from_json(fits[form]["law"])
