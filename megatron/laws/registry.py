"""The registered forms. A form is a file in megatron/laws/forms and its entry here."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError
from megatron.laws.base import Form, Law
from megatron.laws.compute import Compute
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
    """Return the law of a record that `Law.to_json` wrote.

    Raises: KeyError, TypeError or ValueError for a record that it did not write.
    """
    form = form_named(record["form"], "form")
    draws = None
    if record.get("draws"):
        with np.errstate(divide="ignore"):  # a parameter frozen at 0
            draws = np.log(np.array(record["draws"], dtype=float).reshape(-1, len(form.parameters)))
    compute = Compute.from_json(record.get("computed_parameters"))
    return Law(form, form.internal(record["values"]), draws, dict(record.get("notes", {})), compute=compute)


def load_law(path: str | Path, name: str | None = None) -> Law:
    """Return the law of the form `name` in a fit.json, which may also be given as the path FILE:FORM.

    The name may be left out for a file with a single form. `notes["file"]` is FILE:FORM.

    Raises: ConfigurationError if the file is not a fit, has several forms and none is named, has no such form, or its
    fit diverged.
    """
    text = str(path)
    if name is None and ":" in text and not Path(text).exists():
        text, _, name = text.rpartition(":")
    try:
        record = json.loads(Path(text).read_text())
        fits = {str(fit["form"]): fit["law"] for fit in record["fits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_a_fit(text, error) from error
    if not fits:
        raise ConfigurationError(f"{text}: has no fit; give the fit.json of tools/fit_scaling_laws.py")
    if name is None and len(fits) > 1:
        raise ConfigurationError(f"{text}: has fits of {', '.join(fits)}; name the form: {text}:{next(iter(fits))}")
    form = name or next(iter(fits))
    if form not in fits:
        raise ConfigurationError(f"{text}: no fit of the form {form}; it has {', '.join(fits)}")
    if fits[form] is None:
        raise ConfigurationError(
            f"{text}: the fit of {form} diverged and gives no law; freeze the parameter or choose another form"
        )
    try:
        law = from_json(fits[form])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_a_fit(text, error) from error
    return replace(law, notes={**law.notes, "file": f"{text}:{form}"})


def _not_a_fit(path: str, error: Exception) -> ConfigurationError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    return ConfigurationError(f"{path}: not a fit of tools/fit_scaling_laws.py ({reason}); give its fit.json")
