"""Fits to public measurements: Muennighoff's runs, and losses over weight decay and depth.

Muennighoff's points are read from a file outside the project and the test is skipped where it is absent.
"""

from dataclasses import replace

import numpy as np
import pytest

from megatron.laws.base import LawTable
from megatron.laws.fit import fit, fit_from
from megatron.laws.optimise import Objective
from megatron.laws.registry import FORMS
from megatron.laws.study import study
from megatron.laws.table import read_table
from tests.conftest import ROOT

POINTS = ROOT.parent / "shared" / "reference" / "muennighoff_points.csv"
REPETITION = FORMS["repetition"]
BASE = {name: REPETITION.published[name] for name in REPETITION.base}


def muennighoff(**selection) -> LawTable:
    """Return the runs of 2305.16264's notebook."""
    if not POINTS.exists():
        pytest.skip(f"{POINTS.name}: the public points of 2305.16264 are not on this machine")
    return read_table(POINTS, **selection)


def test_the_published_fit_is_a_local_optimum_of_its_182_rows():
    table = muennighoff(where=("in_fit=1",))
    assert len(table) == 182
    published = REPETITION.internal(REPETITION.published)
    assert Objective(REPETITION, table, (5, 6)).value(published) == pytest.approx(0.0158259, abs=5e-8)
    local = fit_from(REPETITION, table, BASE, REPETITION.published)
    values = REPETITION.public(local.theta)
    assert values["R_D*"] == pytest.approx(15.387756, rel=2e-3) and values["R_N*"] == pytest.approx(5.309743, rel=2e-3)
    assert local.value == pytest.approx(0.0158259, abs=1e-7)


def test_the_global_fit_is_better_and_says_that_its_value_is_poorly_determined():
    result = study(REPETITION, muennighoff(where=("in_fit=1",)), BASE, base="published", resamples=200)
    assert result.fit.value <= 0.0158047
    record = result.parameter("R_D*")
    assert record["value"] == pytest.approx(95.4, rel=0.01)
    assert REPETITION.public(result.fit.theta)["R_N*"] == pytest.approx(1.71, rel=0.01)
    assert record["profile"][0] < 15.4 and record["profile"][1] is None
    assert record["bootstrap"][0] < 15.4 and (record["bootstrap"][1] or np.inf) > 200
    profile = result.profiles["R_D*"]
    near = (profile.values > 15) & (profile.values < 200)
    assert near.sum() >= 3 and (profile.objectives[near] < 0.0158047 * 1.003).all()
    lines = str(result).splitlines()
    (line,) = [line for line in lines if line.startswith("  R_D*")]
    assert "poorly determined by these rows" in line and "unbounded]" in line
    assert any(line.startswith("  base: published") for line in lines) and "  filter: in_fit=1" in lines


def test_on_all_rows_the_fit_diverges_and_prints_no_number():
    table = muennighoff(mixed=("data",))
    assert len(table) == 308
    result = study(REPETITION, table, BASE, base="published", resamples=0)
    assert "R_D*" in result.diverged and result.profiles["R_D*"].direction == "infinity"
    assert result.law is None and result.parameter("R_D*")["value"] is None
    (line,) = [line for line in str(result).splitlines() if line.startswith("  R_D*")]
    assert not any(character.isdigit() for character in line)


# AR loss after 10 epochs of 100M tokens, by weight decay and depth 6 to 18 (2609.19107, loop_grid.csv, no loops), and
# the training FLOPs of each depth in 1e18. Sizes are those that 6 N D = FLOPs gives for 1,900 steps of 524,288 tokens.
WEIGHT_DECAY = {
    0.05: (3.840, 3.964, 4.226, 4.587, 4.998, 5.456, 5.934),
    0.2: (3.683, 3.672, 3.752, 3.884, 4.059, 4.273, 4.528),
    0.4: (3.637, 3.574, 3.568, 3.608, 3.673, 3.760, 3.880),
    0.8: (3.639, 3.534, 3.485, 3.471, 3.468, 3.477, 3.509),
    1.6: (3.706, 3.585, 3.508, 3.468, 3.434, 3.413, 3.401),
}
FLOPS = np.array([0.485, 0.922, 1.60, 2.49, 3.80, 5.53, 7.55]) * 1e18
TOKENS = 1900 * 524_288
# one budget and one number of tokens cannot determine the data term, and one number of epochs not its exponent
FROZEN = {name: FORMS["chinchilla"].published[name] for name in ("B", "beta")}


def by_depth(weight_decay: float) -> LawTable:
    loss = np.array(WEIGHT_DECAY[weight_decay])
    constant = np.ones(len(loss))
    sizes = FLOPS / (6 * TOKENS)
    return LawTable(sizes, constant * TOKENS / 10, constant * TOKENS, loss, np.arange(len(loss)), source="depths.csv")


def largest_error(name: str, table: LawTable) -> float:
    """Return the largest error of a form's fit in nats per token."""
    frozen = FROZEN | ({"d": 1.0} if "d" in FORMS[name].parameters else {})
    predicted = np.exp(fit(FORMS[name], table, frozen).residuals) * table.loss
    return float(np.abs(predicted - table.loss).max())


@pytest.mark.parametrize(
    "weight_decay, over_fitting, monotone", [(0.05, 0.02, 1.2), (0.2, 0.01, 0.5), (0.4, 0.006, 0.2)]
)
def test_low_weight_decay_needs_the_over_fitting_form(weight_decay, over_fitting, monotone):
    """At low weight decay larger models are worse: no law that is monotone in N can follow, at any constants."""
    table = by_depth(weight_decay)
    errors = {name: largest_error(name, table) for name in ("overfitting", "chinchilla", "outer-exponent")}
    print(f"largest errors at weight decay {weight_decay}, nats per token:", errors)
    assert errors["overfitting"] < over_fitting
    assert errors["chinchilla"] > monotone and errors["outer-exponent"] > monotone


def test_at_high_weight_decay_a_monotone_form_suffices():
    assert largest_error("chinchilla", by_depth(1.6)) < 0.005


def test_weight_decay_lowers_the_over_fitting_parameter():
    """P of the one-parameter form falls with weight decay, to less than a tenth from 0.05 to 0.8."""
    form = FORMS["overfitting-linear"]
    values = [form.public(fit(form, by_depth(decay), FROZEN).theta)["P"] for decay in (0.05, 0.2, 0.4, 0.8)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 10


def test_rows_of_another_scale_give_the_same_fit():
    """Tokens and parameters in other units change A and B only: nothing in the fit depends on a unit."""
    table = by_depth(0.4)
    form = FORMS["overfitting-linear"]
    scaled = replace(table, parameters=table.parameters * 1e3, unique_tokens=table.unique_tokens * 1e3)
    scaled = replace(scaled, tokens=table.tokens * 1e3)
    frozen = FROZEN | {"B": FROZEN["B"] * 1e3 ** FROZEN["beta"]}
    assert fit(form, scaled, frozen).value == pytest.approx(fit(form, table, FROZEN).value, rel=1e-6)
