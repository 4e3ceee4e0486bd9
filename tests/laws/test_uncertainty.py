"""Bootstrap, profiles, held-out budgets and comparison: against formulas, planted constants and coverage."""

import numpy as np
import pytest
from scipy.stats import binom, laplace, norm

from megatron.laws.base import LawTable
from megatron.laws.bootstrap import bootstrap, interval
from megatron.laws.compare import held_out_errors, leave_one_budget_out, log_likelihood
from megatron.laws.fit import fit, fit_from
from megatron.laws.optimise import huber
from megatron.laws.profile import DETERMINED, DIVERGED, WEAK, profiles
from megatron.laws.registry import FORMS
from megatron.laws.study import comparison, comparison_table, study
from tests.laws.synthetic import PLANTED, synthetic


def test_the_bootstrap_draws_whole_groups_and_repeats():
    """Two seeds of every run that are copies: the spread must be that of the groups, not of twice as many rows."""
    table = synthetic("overfitting-linear")
    twice = LawTable(
        **{
            name: np.repeat(getattr(table, name), 2)
            for name in ("parameters", "unique_tokens", "tokens", "loss", "group")
        }
    )
    form, start = FORMS["overfitting-linear"], PLANTED["overfitting-linear"]
    single = bootstrap(fit_from(form, table, {}, start), 150)
    double = bootstrap(fit_from(form, twice, {}, start), 150)
    assert double == pytest.approx(single, abs=2e-2 * single.std(axis=0).max() + 1e-3)
    assert (bootstrap(fit_from(form, table, {}, start), 150) == single).all()
    assert not (bootstrap(fit_from(form, table, {}, start), 150, seed=2) == single).all()


def test_an_interval_of_many_groups_is_that_of_percentiles():
    draws = np.random.default_rng(0).normal(2, 3, 200_000)
    assert interval(draws, 0.95, 10**6, 5) == pytest.approx(norm(2, 3).interval(0.95), abs=0.06)
    narrow, wide = interval(draws, 0.95, 10**6, 5), interval(draws, 0.95, 12, 5)
    assert wide[0] < narrow[0] and wide[1] > narrow[1]


def test_the_bootstraps_spread_is_that_of_new_runs():
    """Standard deviations of draws against those over independent tables of the same law.

    A parameter that few rows determine, P, has too wide a bootstrap: resamples without those rows vary more.
    """
    form, start = FORMS["overfitting-linear"], PLANTED["overfitting-linear"]
    tables = [synthetic("overfitting-linear", seed) for seed in range(30)]
    fresh = np.array([fit_from(form, table, {}, start).theta for table in tables]).std(axis=0)
    drawn = np.mean([bootstrap(fit_from(form, table, {}, start), 100).std(axis=0) for table in tables[:4]], axis=0)
    assert (0.65 * fresh < drawn).all() and (drawn < 1.5 * fresh)[:5].all() and drawn[5] < 2.5 * fresh[5]


def test_profiles_give_the_intervals_of_the_bootstrap_where_both_are_good():
    table, form = synthetic("overfitting-linear"), FORMS["overfitting-linear"]
    result = fit(form, table)
    draws = bootstrap(result, 300)
    for name, profile in profiles(result, 0.95).items():
        low, high = np.exp(interval(draws[:, form.parameters.index(name)], 0.95, len(table), 6))
        assert profile.status == DETERMINED
        assert profile.low < form.public(result.theta)[name] < profile.high
        assert 0.5 < np.log(profile.high / profile.low) / np.log(high / low) < 1.5, name
        assert profile.objectives.min() >= result.value * (1 - 1e-6)


def test_a_profile_is_the_objective_minimised_over_the_other_parameters():
    """Against fits with the parameter frozen."""
    table, form = synthetic("chinchilla"), FORMS["chinchilla"]
    profile = profiles(fit(form, table), 0.95)["alpha"]
    for index in (3, 8, 12):
        frozen = fit(form, table, {"alpha": profile.values[index]})
        if profile.statistics[index] < 40:  # where it is followed exactly
            assert profile.objectives[index] == pytest.approx(frozen.value, rel=1e-3)


@pytest.mark.parametrize(
    "fitted, name, direction, seed",
    [
        ("repetition", "R_D*", "infinity", 2),  # repeated tokens are worth new ones
        ("overfitting-linear", "P", "0", 4),  # no over-fitting
    ],
)
def test_a_parameter_that_the_rows_do_not_determine_diverges(fitted, name, direction, seed):
    table, form = synthetic("chinchilla", seed), FORMS[fitted]
    base = {parameter: PLANTED["chinchilla"][parameter] for parameter in form.base}
    result = study(form, table, base, resamples=0)
    profile = result.profiles[name]
    assert (profile.status, profile.direction) == (DIVERGED, direction)
    assert result.law is None and result.to_json()["law"] is None and result.to_json()["curves"] == []
    record = result.parameter(name)
    assert record["value"] is None and record["bootstrap"] is None and record["profile"] is None
    (line,) = [line for line in str(result).splitlines() if line.strip().startswith(name)]
    assert f"diverged towards {direction}" in line
    assert not any(character.isdigit() for character in line.replace(f"towards {direction}", ""))
    assert f"DIVERGED: {name}" in str(result) and f"--freeze {name}={'0' if direction == '0' else 'VALUE'}" in str(
        result
    )


def test_noise_can_look_like_a_little_over_fitting_and_the_interval_says_so():
    form = FORMS["overfitting-linear"]
    base = {parameter: PLANTED["chinchilla"][parameter] for parameter in form.base}
    result = study(form, synthetic("chinchilla", 2), base, resamples=0)
    assert result.profiles["P"].status == WEAK and result.profiles["P"].low is None
    (line,) = [line for line in str(result).splitlines() if line.strip().startswith("P ")]
    assert "[unbounded, " in line and "poorly determined by these rows" in line


def test_a_planted_decay_does_not_diverge():
    table = synthetic("repetition", seed=2)
    base = {name: PLANTED["repetition"][name] for name in FORMS["repetition"].base}
    result = study(FORMS["repetition"], table, base, resamples=100)
    assert not result.diverged and result.law is not None
    low, high = result.parameter("R_D*")["profile"]
    assert low < 15.39 < high and high / low < 1.5
    curves = result.to_json()["curves"]
    assert {curve["unique_tokens"] for curve in curves} == set(table.budgets)
    for curve in curves:
        low, high, loss = (np.array(curve[key]) for key in ("low", "high", "loss"))
        assert (low <= loss + 1e-3).all() and (loss <= high + 1e-3).all()


def test_the_likelihood_of_huber_losses_is_laplaces_and_gausss_in_the_limits():
    """At the best scale: of the mean size for residuals far beyond delta, of the mean square far below."""
    rng = np.random.default_rng(0)
    large, small = rng.laplace(0, 0.5, 400), rng.normal(0, 1e-5, 400)
    expected = laplace.logpdf(large, scale=np.abs(large).mean()).sum()
    assert log_likelihood(huber(large).sum(), 400) == pytest.approx(expected, rel=5e-3)
    expected = norm.logpdf(small, scale=np.sqrt((small**2).mean())).sum()
    assert log_likelihood(huber(small).sum(), 400) == pytest.approx(expected, rel=1e-3)


def test_held_out_errors_are_those_of_fits_without_the_budget():
    table, form = synthetic("chinchilla"), FORMS["chinchilla"]
    results = leave_one_budget_out(fit(form, table))
    assert [result.lowest for result in results] == list(table.budgets)
    budget = table.budgets[1]
    other = fit(form, table.select(table.unique_tokens != budget))
    rows = table.select(table.unique_tokens == budget)
    errors = np.exp(form.log_loss(other.theta, rows)) - rows.loss
    assert results[1].errors == pytest.approx(errors, abs=1e-3)
    everything = np.concatenate([result.errors for result in results])
    assert held_out_errors(results)["rms"] == pytest.approx(np.sqrt((everything**2).mean()))
    assert leave_one_budget_out(fit(form, rows, {"beta": 0.3672})) == []
    assert held_out_errors([]) is None


@pytest.mark.parametrize("planted", ["overfitting-linear", "chinchilla"])
def test_the_planted_form_wins_the_comparison(planted):
    table = synthetic(planted, seed=1)
    studies = [study(FORMS[name], table, {}, resamples=0) for name in ("chinchilla", "overfitting-linear")]
    rows = comparison(studies)
    assert rows[0]["form"] == planted and rows[0]["delta_aic"] == 0
    if planted == "overfitting-linear":
        assert rows[1]["delta_aic"] > 100 and rows[1]["held_out_errors"]["rms"] > 5 * rows[0]["held_out_errors"]["rms"]
    else:  # over-fitting has P = 0 here: nested, at most as good as one parameter's penalty
        assert 0 < rows[1]["delta_bic"] < np.log(len(table)) + 1 and rows[1]["diverged"] == ["P"]
    assert comparison_table(rows).splitlines()[1].startswith(planted)


def test_forms_are_compared_on_the_budgets_that_all_predict():
    """A form of more parameters cannot leave out a budget that has most of the runs."""
    table = synthetic("chinchilla", seed=1)
    rng = np.random.default_rng(0)
    small = np.concatenate([rng.permutation(np.flatnonzero(table.unique_tokens == b))[:2] for b in table.budgets[1:]])
    rows = table.select(np.concatenate([np.flatnonzero(table.unique_tokens == table.budgets[0]), small]))
    studies = [
        study(FORMS["chinchilla"], rows, frozen, resamples=0)
        for frozen in ({}, {"E": 1.8172, "alpha": 0.3473, "A": 477.84})
    ]
    assert len(studies[0].held_out) == 3 and len(studies[1].held_out) == 4
    errors = {row["fitted_parameters"]: row["held_out_errors"] for row in comparison(studies)}
    assert errors[2] == held_out_errors(studies[1].held_out[1:]) and errors[5] == held_out_errors(studies[0].held_out)


def check_coverage(name: str, covered: np.ndarray, repetitions: int) -> None:
    """Check a share of 95% intervals per parameter, and their mean."""
    rates = covered / repetitions
    print(name, rates)
    assert (covered >= binom(repetitions, 0.95).ppf(1e-4)).all(), rates
    assert 0.92 < rates.mean() < 0.985, rates


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_bootstrap_intervals_cover_planted_constants_at_the_stated_rate(name):
    """200 tables per form: how often a 95% interval has the planted value."""
    form, repetitions = FORMS[name], 200
    truth = form.internal(PLANTED[name])
    covered = np.zeros(len(truth))
    for seed in range(repetitions):
        table = synthetic(name, seed)
        draws = bootstrap(fit_from(form, table, {}, PLANTED[name]), 200, seed=seed)
        ends = [interval(draw, 0.95, len(table), len(truth)) for draw in draws.T]
        covered += [low <= value <= high for (low, high), value in zip(ends, truth, strict=True)]
    check_coverage(name, covered, repetitions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chinchilla", "overfitting-linear"])
def test_profile_intervals_cover_planted_constants_at_the_stated_rate(name):
    form, repetitions = FORMS[name], 200
    covered = np.zeros(len(form.parameters))
    for seed in range(repetitions):
        result = profiles(fit_from(form, synthetic(name, seed), {}, PLANTED[name]), 0.95)
        covered += [
            (profile.low or 0) <= PLANTED[name][parameter] <= (profile.high or np.inf)
            for parameter, profile in result.items()
        ]
    check_coverage(name, covered, repetitions)
