"""Fits: the objective, the optimiser against independent ones, planted constants, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron.errors import ConfigurationError
from megatron.laws.base import LawTable
from megatron.laws.compare import leave_one_budget_out
from megatron.laws.fit import fit, fit_from
from megatron.laws.optimise import HUBER_DELTA, Objective, descend, huber
from megatron.laws.registry import FORMS
from tests.laws.synthetic import PLANTED, synthetic


def test_the_objective_is_the_sum_of_huber_losses_of_log_loss():
    """Against a loop over rows, for one parameter vector; the sum grows with the number of rows."""
    table = synthetic("chinchilla")
    form = FORMS["chinchilla"]
    theta = form.internal(PLANTED["chinchilla"]) + 0.01
    values = form.public(theta)
    total = 0.0
    for size, tokens, loss in zip(table.parameters, table.tokens, table.loss, strict=True):
        predicted = values["E"] + values["A"] / size ** values["alpha"] + values["B"] / tokens ** values["beta"]
        error = abs(np.log(predicted / loss))
        total += error**2 / 2 if error <= HUBER_DELTA else HUBER_DELTA * (error - HUBER_DELTA / 2)
    assert Objective(form, table, (0, 1)).value(theta) == pytest.approx(total, rel=1e-9)
    assert huber(np.array([-0.5e-3, 1e-3, 0.1])) == pytest.approx([0.125e-6, 0.5e-6, 1e-3 * 0.0995])


@pytest.mark.parametrize("name", FORMS)
def test_planted_constants_are_recovered(name):
    """Within 4 standard errors of a fit with little noise; exponents within 8%."""
    table = synthetic(name, noise=0.002)
    result = fit(FORMS[name], table)
    assert result.value <= result.objective.value(FORMS[name].internal(PLANTED[name]))
    values = FORMS[name].public(result.theta)
    for parameter in FORMS[name].parameters:
        if parameter not in ("A", "B", "C", "c"):  # correlated with their exponents
            assert values[parameter] == pytest.approx(PLANTED[name][parameter], rel=0.08), parameter
    assert np.sqrt((result.residuals**2).mean()) < 0.003
    assert result.agreeing_starts > result.num_starts / 4


@pytest.mark.parametrize("name", ["chinchilla", "overfitting-linear"])
def test_no_start_of_a_plain_search_ends_lower(name):
    """L-BFGS-B alone from every start of the grid, as the papers do it, finds nothing better."""
    table, form = synthetic(name, seed=4), FORMS[name]
    best = fit(form, table).value

    def value_and_gradient(theta):
        log_loss, gradient = form.log_loss_and_gradient(theta, table)
        residuals = log_loss - np.log(table.loss)
        return huber(residuals).sum(), gradient @ np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)

    options = {"ftol": 1e-13, "gtol": 1e-9, "maxiter": 400}
    plain = [
        minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options).fun
        for start in form.starts(table, {})[::9]
    ]
    assert best <= min(plain) * (1 + 1e-9)
    assert min(plain) == pytest.approx(best, rel=1e-3)


def test_a_mean_in_place_of_the_sum_stops_early():
    """Why the objective is a sum: with the mean, the default tolerances of L-BFGS-B end far from the minimum."""
    table, form = synthetic("chinchilla"), FORMS["chinchilla"]

    def scaled(theta, factor):
        log_loss, gradient = form.log_loss_and_gradient(theta, table)
        residuals = log_loss - np.log(table.loss)
        slope = gradient @ np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return factor * huber(residuals).sum(), factor * slope

    start = form.starts(table, {})[0]
    mean = minimize(scaled, start, args=(1 / len(table),), jac=True, method="L-BFGS-B").fun * len(table)
    assert mean > 1.5 * fit(form, table).value


def test_many_starts_at_once_give_the_minima_of_each_alone():
    table, form = synthetic("overfitting-linear"), FORMS["overfitting-linear"]
    objective = Objective(form, table, tuple(range(6)))
    starts = form.starts(table, {})[::20]
    weights = np.random.default_rng(0).integers(0, 3, (len(starts), len(table))).astype(float)
    together = descend(objective, starts, weights=weights)
    for index, start in enumerate(starts):
        alone = descend(objective, start[None], weights=weights[index : index + 1])
        assert together[0][index] == pytest.approx(alone[0][0], rel=1e-6)
        assert together[1][index] == pytest.approx(objective.value(alone[0], weights[index])[0], rel=1e-9)


def test_frozen_parameters_stay_and_the_others_are_fitted():
    table = synthetic("repetition")
    base = {name: PLANTED["repetition"][name] for name in FORMS["repetition"].base}
    result = fit(FORMS["repetition"], table, base)
    assert result.free == ("R_D*", "R_N*")
    values = FORMS["repetition"].public(result.theta)
    assert [values[name] for name in base] == pytest.approx(list(base.values()), rel=1e-12)
    assert values["R_D*"] == pytest.approx(15.39, rel=0.05) and values["R_N*"] == pytest.approx(5.31, rel=0.1)
    zero = fit(FORMS["chinchilla"], table, {"E": 0})
    assert FORMS["chinchilla"].public(zero.theta)["E"] == 0 and zero.value > result.value


def test_a_local_fit_is_refused_like_a_global_one():
    table = synthetic("repetition")
    start = PLANTED["repetition"]
    assert fit_from(FORMS["repetition"], table, {"E": 1.8}, start).free[0] == "A"
    with pytest.raises(ConfigurationError, match="--freeze R_X"):
        fit_from(FORMS["repetition"], table, {"R_X": 1.0}, start)


def few_rows() -> LawTable:
    return synthetic("chinchilla").select(np.arange(6))


def two_points() -> LawTable:
    """Two runs with five seeds: as many rows as a fit of five parameters takes, and nothing between them."""
    table = synthetic("chinchilla", seeds=5)
    return table.select(table.group < 2)


def one_budget() -> LawTable:
    table = synthetic("quokka")
    return table.select(table.unique_tokens == table.budgets[0])


def whole_samples(table: LawTable) -> LawTable:
    """The same runs without the tokens after the last whole sample of 2048 tokens."""
    return replace(table, tokens=table.tokens // 2048 * 2048)


def one_budget_of_whole_samples() -> LawTable:
    table = whole_samples(one_budget())
    assert len(np.unique(np.minimum(table.unique_tokens, table.tokens))) == 2
    return table


@pytest.mark.parametrize(
    "name, table, frozen, message",
    [
        (
            "chinchilla",
            few_rows,
            {},
            "synthetic.csv: 6 distinct runs (6 rows; seeds count once) cannot determine the 5 parameters",
        ),
        ("quokka", one_budget, {}, "all runs have 2.5e+07 unique tokens, and beta, m of quokka describe several"),
        ("bounded", one_budget, {}, "and delta of bounded describe several budgets; add runs"),
        ("bounded", one_budget_of_whole_samples, {}, "all runs have 2.5e+07 unique tokens, and delta of"),
        ("chinchilla", two_points, {}, "2 distinct runs (10 rows; seeds count once) cannot determine the 5"),
        ("chinchilla", few_rows, {"R_D*": 3.0}, "--freeze R_D*: no parameter of the form chinchilla; it has E, A, B"),
        ("chinchilla", few_rows, {"A": -1.0}, "--freeze A=-1: must be positive; correct"),
        ("chinchilla", few_rows, {"E": float("nan")}, "--freeze E=nan: must be positive or 0"),
        ("chinchilla", few_rows, dict(FORMS["chinchilla"].published), "every parameter is frozen, nothing to fit"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(name, table, frozen, message):
    with pytest.raises(ConfigurationError) as error:
        fit(FORMS[name], table(), frozen)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_budget_suffices_for_what_it_determines():
    base = {name: PLANTED["overfitting"][name] for name in FORMS["overfitting"].base}
    table = synthetic("overfitting")
    values = fit(FORMS["overfitting"], table.select(table.unique_tokens == table.budgets[1]), base)
    assert FORMS["overfitting"].public(values.theta)["P"] == pytest.approx(0.06, rel=0.2)


def test_runs_on_fresh_tokens_of_one_corpus_are_fitted():
    """U is the size of the corpus and D < U varies, as in the runs of the Chinchilla paper."""
    table = synthetic("chinchilla", noise=0.002)
    fresh = replace(table, unique_tokens=np.full(len(table), 1e13))
    result = fit(FORMS["chinchilla"], fresh)
    assert FORMS["chinchilla"].public(result.theta)["beta"] == pytest.approx(PLANTED["chinchilla"]["beta"], rel=0.08)
    held_out = leave_one_budget_out(result)
    assert len(held_out) == 10 and held_out[0].highest < held_out[-1].lowest


@pytest.mark.parametrize("sample_tokens", [0.0, 2048.0])
def test_a_budget_is_held_out_with_its_runs_of_one_epoch(sample_tokens):
    table = synthetic("chinchilla")
    runs = replace(whole_samples(table), sample_tokens=sample_tokens)
    assert (runs.tokens < runs.unique_tokens).any() and runs.budgets.tolist() == table.budgets.tolist()
    folds = [leave_one_budget_out(fit(FORMS["chinchilla"], rows)) for rows in (table, runs)]
    assert [len(fold.errors) for fold in folds[1]] == [len(fold.errors) for fold in folds[0]]
