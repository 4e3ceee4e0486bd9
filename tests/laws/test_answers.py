"""Answers of laws: optima, frontiers and critical compute against published values, closed forms and brute force."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq

from megatron.laws.answers import (
    NEAR_LOSS,
    PUBLISHED_CRITICAL_COMPUTE,
    Limits,
    best_run,
    critical_compute,
    critical_compute_line,
    enough,
    frontier,
    to_json,
)
from megatron.laws.base import Law, LawTable
from megatron.laws.bootstrap import bootstrap
from megatron.laws.fit import fit
from megatron.laws.registry import FORMS

BUDGETS = [1e7, 1e8, 1e9, 1e10, 1e11]  # unique tokens, four decades


def law(name: str, draws=None, **values) -> Law:
    form = FORMS[name]
    return Law(form, form.internal({**form.published, **values}), draws)


# ------------------------------------------------------------------ one law


def test_chinchillas_optimum_is_the_closed_form():
    chinchilla = law("chinchilla")
    v = chinchilla.values
    for flops in (1e18, 1e21, 1e24):
        g = (v["alpha"] * v["A"] / (v["beta"] * v["B"])) ** (1 / (v["alpha"] + v["beta"]))
        size = g * (flops / 6) ** (v["beta"] / (v["alpha"] + v["beta"]))
        best = best_run(chinchilla, 1e12, flops)
        assert best.parameters == pytest.approx(size, rel=1e-4)
        assert best.tokens == pytest.approx(flops / 6 / size, rel=1e-4)
        assert best.epochs == pytest.approx(best.tokens / 1e12) and best.flops == pytest.approx(flops)
        assert best.no_optimum_in == ()


def test_muennighoffs_allocation_is_the_published_one():
    """`optimal_allocation(1e22, 25e9)` of the authors' notebook: 7.02B parameters, 237.3B tokens, 9.49 epochs."""
    best = best_run(law("repetition"), 25e9, 1e22)
    assert best.parameters == pytest.approx(7.02e9, rel=2e-3)
    assert best.tokens == pytest.approx(237.3e9, rel=2e-3)
    assert best.epochs == pytest.approx(9.49, rel=1e-3)


@pytest.mark.parametrize(
    "unique_tokens, flops",
    [(1e7, 6.07e17), (1e8, 2.04e19), (1e9, 7.59e20), (1e10, 2.83e22), (1e11, 1.11e24), (1e12, 4.12e25)],
)
def test_quokkas_best_runs_are_the_published_ones(unique_tokens, flops):
    """Table 4 of 2510.03280, from its printed, rounded coefficients: compute within 8%."""
    best = best_run(law("quokka"), unique_tokens)
    assert best.flops == pytest.approx(flops, rel=0.08)
    assert best.no_optimum_in == ()


@pytest.mark.parametrize(
    "size, unique_tokens, published, recomputed",
    [(4e8, 1e7, 70, 66), (4e8, 1e8, 175, 165), (1e9, 1e9, 260, 246), (1e10, 1e12, 1098, 1029)],
)
def test_quokkas_best_epochs_of_a_given_size_are_the_published_ones(size, unique_tokens, published, recomputed):
    """Table 3 of 2510.03280, and what its printed, rounded coefficients give."""
    best = best_run(law("quokka"), unique_tokens, limits=Limits(parameters=(size, size)))
    assert best.epochs == pytest.approx(published, rel=0.07) and round(best.epochs) == pytest.approx(recomputed, abs=1)
    assert best.parameters == pytest.approx(size) and best.no_optimum_in == ()


def test_lovelaces_best_epochs_of_a_given_size_are_the_closed_form():
    """epochs = (beta B U^(1 - beta) / (P N))^(1 / (1 + beta)) for L = ... + P (epochs - 1) N / U (2605.01640)."""
    over_fitting = law("overfitting-linear", **law("chinchilla").values, P=2e-3)
    v, size = over_fitting.values, 2e8
    for unique_tokens in (1e8, 1e9, 1e10):
        expected = (v["beta"] * v["B"] * unique_tokens ** (1 - v["beta"]) / (v["P"] * size)) ** (1 / (1 + v["beta"]))
        best = best_run(over_fitting, unique_tokens, limits=Limits(parameters=(size, size)))
        assert best.epochs == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["quokka", "repetition", "geometric", "overfitting-linear"])
def test_the_best_run_is_that_of_a_brute_force_search(name):
    extra = {"geometric": law("repetition").values, "overfitting-linear": law("chinchilla").values | {"P": 2e-3}}
    form = law(name, **extra.get(name, {}))
    sizes, shares = np.geomspace(1e5, 1e12, 700)[:, None], np.geomspace(1e-5, 1, 300)[None]
    for flops in (1e18, 1e20, 1e23):
        tokens = shares * np.minimum(flops / 6 / sizes, 1e5 * 1e8)
        best = best_run(form, 1e8, flops, Limits(parameters=(1e5, 1e12)))
        assert best.flops <= flops * (1 + 1e-9)
        assert -1e-9 <= form.loss(sizes, 1e8, tokens).min() - best.loss < 1e-3
        assert frontier(form, 1e8, np.geomspace(1e15, flops, 300))[0][-1] == pytest.approx(best.loss, abs=2e-4)


def test_a_monotone_law_has_no_optimum_without_a_compute_budget():
    repetition = law("repetition")
    best = best_run(repetition, 1e8)
    assert best.no_optimum_in == ("parameters", "epochs") and "no optimum within the range" in str(best)
    # its lowest loss is that of infinite size and epochs: N' = U_N (1 + R_N*), D' = U (1 + R_D*)
    v = repetition.values
    g = (v["A"] / v["B"]) ** (1 / (2 * v["alpha"]))
    size, tokens = g * g * 1e8 * (1 + v["R_N*"]), 1e8 * (1 + v["R_D*"])
    assert best.loss == pytest.approx(v["E"] + v["A"] / size ** v["alpha"] + v["B"] / tokens ** v["beta"], abs=1e-6)
    sufficient = enough(repetition, 1e8)
    assert sufficient.loss == pytest.approx(best.loss + NEAR_LOSS, abs=1e-4)
    assert sufficient.flops < best.flops / 10 and sufficient.epochs < 200


def test_enough_needs_a_floor_of_the_loss():
    """Without one the end of the search's range would decide. A steep optimum lies between two budgets of the grid."""
    assert enough(law("chinchilla"), 1e8) is None and to_json(None) is None
    no_wear = law("repetition", **{"R_D*": 1e20, "R_N*": 1e20})  # as good as fresh tokens
    assert enough(no_wear, 1e8) is None
    constants = {"E": 2, "A": 500, "B": 2e4, "alpha": 0.34, "beta": 0.465, "P": 0.06, "d": 2.5, "k": 2.5}
    steep = law("overfitting", **constants)
    best = best_run(steep, 1e8)
    sufficient = enough(steep, 1e8)
    assert sufficient.loss == pytest.approx(best.loss + NEAR_LOSS, abs=1e-4) and sufficient.flops < best.flops


@pytest.mark.parametrize("flops", [1e14, 1e15, 1e17])
def test_the_best_run_of_a_law_that_wears_at_once_is_not_missed_at_one_epoch(flops):
    """Quokka's wear has an infinite slope at one epoch: the best run of little compute stops there exactly."""
    quokka, size = law("quokka", c=1.0), (1e5, 1e12)
    sizes = np.geomspace(*size, 20000)
    one_epoch = quokka.loss(sizes, 1e7, np.minimum(1e7, flops / 6 / sizes)).min()
    assert best_run(quokka, 1e7, flops, Limits(parameters=size)).loss <= one_epoch + 1e-9
    losses, _ = frontier(quokka, 1e7, np.geomspace(flops / 3, flops, 7), Limits(parameters=size))
    assert losses[-1] <= one_epoch + 1e-6


def test_limits_of_the_search_are_respected():
    best = best_run(law("quokka"), 1e8, limits=Limits(parameters=(1e5, 5e7), epochs=100))
    assert best.parameters == pytest.approx(5e7) and best.epochs == pytest.approx(100)
    assert set(best.no_optimum_in) == {"parameters", "epochs"}
    assert best_run(law("quokka"), 1e8, 1e15, Limits(parameters=(1e5, 5e7))).no_optimum_in == ()


def test_a_frontier_never_rises_and_stops_before_over_fitting():
    over_fitting = law("overfitting-linear", **law("chinchilla").values, P=1e-2)
    flops = np.geomspace(1e14, 1e26, 200)
    losses, sizes = frontier(over_fitting, 1e8, flops)
    assert (np.diff(losses) <= 0).all() and losses[-1] == losses[-2]
    assert losses[-1] == pytest.approx(best_run(over_fitting, 1e8).loss, abs=1e-3)
    assert sizes[-1] == pytest.approx(best_run(over_fitting, 1e8).parameters, rel=0.1)
    infeasible = frontier(over_fitting, 1e8, np.array([1e2, 1e16]), Limits(parameters=(1e6, 1e9)))[0]
    assert np.isnan(infeasible[0]) and np.isfinite(infeasible[1])


# ------------------------------------------------------------------ two laws


def ar_without_repetition(**values) -> Law:
    """Loss E + B / min(D, U)^beta: any size is large enough, repetition is worthless."""
    constants = {"E": 1.8, "A": 1e-12, "B": 400.0, "alpha": 0.35, "beta": 0.35, "R_D*": 1e-9, "R_N*": 1e60}
    return law("repetition", **{**constants, **values})


def mdm_without_wear(**values) -> Law:
    """Loss E + A / N^alpha + B / D^beta whatever is repeated."""
    return law("chinchilla", **{"E": 1.8, "A": 900.0, "B": 2000.0, "alpha": 0.35, "beta": 0.35, **values})


def closed_form_crossing(unique_tokens: float, mdm: Law, ar: Law) -> float:
    """Return C where k (C/6)^(-ab/(a+b)) of the Chinchilla frontier equals B / U^beta."""
    v = mdm.values
    a, b = v["alpha"], v["beta"]
    g = (a * v["A"] / (b * v["B"])) ** (1 / (a + b))
    k = v["A"] / g**a + v["B"] * g**b
    floor = ar.values["B"] / unique_tokens ** ar.values["beta"]
    return 6 * (k / floor) ** ((a + b) / (a * b))


@pytest.mark.parametrize("exponents", [{}, {"alpha": 0.3, "beta": 0.4}])
def test_critical_compute_is_the_closed_form_over_four_decades_of_data(exponents):
    mdm, ar = mdm_without_wear(**exponents), ar_without_repetition()
    limits = Limits(parameters=(1e5, 1e16))
    crossings = [critical_compute(mdm, ar, unique_tokens, limits) for unique_tokens in BUDGETS]
    for crossing in crossings:
        expected = closed_form_crossing(crossing.unique_tokens, mdm, ar)
        assert crossing.flops == pytest.approx(expected, rel=0.02)
        assert crossing.loss == pytest.approx(1.8 + 400 / crossing.unique_tokens**0.35, abs=2e-5)
        assert crossing.ahead == "first" and crossing.interval is None
    line = critical_compute_line(crossings)
    a, b = mdm.values["alpha"], mdm.values["beta"]
    assert line.exponent == pytest.approx(0.35 * (a + b) / (a * b), rel=1e-3)
    assert line.flops(1e8) == pytest.approx(crossings[1].flops, rel=0.02)


def test_critical_compute_of_finite_repetition_scales_with_the_data():
    """With one E and alpha = beta for both laws, U, N and D scale all terms alike: C ~ U^2 exactly."""
    ar = law("repetition", **{"R_D*": 31.19, "R_N*": 55.16})
    mdm = law("repetition", A=700.0, B=2100.0, **{"R_D*": 493.89, "R_N*": 1265.65})
    crossings = [critical_compute(mdm, ar, unique_tokens) for unique_tokens in BUDGETS]
    assert np.allclose([c.flops / c.unique_tokens**2 for c in crossings], crossings[1].flops / 1e16, rtol=0.02)

    def difference(log_flops: float) -> float:  # brute force at one budget, by another search
        sizes = np.geomspace(1e6, 1e12, 20000)
        losses = [form.loss(sizes, 1e8, np.exp(log_flops) / 6 / sizes).min() for form in (mdm, ar)]
        return losses[0] - losses[1]

    assert crossings[1].flops == pytest.approx(np.exp(brentq(difference, np.log(1e17), np.log(1e24))), rel=0.02)


def test_an_over_fitting_law_is_overtaken_where_its_best_run_is():
    """The frontier of a law with over-fitting is flat beyond its best run, although more epochs would hurt."""
    ar = law("overfitting-linear", **law("chinchilla").values, P=1e-2)
    mdm = mdm_without_wear(E=1.8172, A=900.0, B=4000.0)
    crossing = critical_compute(mdm, ar, 1e8)
    assert crossing.flops > best_run(ar, 1e8).flops
    assert best_run(mdm, 1e8, crossing.flops).loss == pytest.approx(best_run(ar, 1e8).loss, abs=1e-4)


def test_no_crossing_and_several_crossings_are_reported():
    better, worse = mdm_without_wear(), mdm_without_wear(A=1000.0, B=2500.0)
    ahead, never = critical_compute(better, worse, 1e8), critical_compute(worse, better, 1e8)
    assert (ahead.flops, ahead.ahead, ahead.crossings) == (None, "first", ())
    assert (
        (never.flops, never.ahead) == (None, "second")
        and "no crossing in the range" in str(never)
        and "the second law is ahead at its end" in str(never)
    )
    assert critical_compute(better, better, 1e8).ahead == "neither"
    # ahead on an interval only: gains most from early compute, but has a higher floor
    fast = mdm_without_wear(E=2.0, A=300.0, B=800.0)
    interval = critical_compute(fast, better, 1e8, Limits(flops=(1e14, 1e26)))
    assert interval.flops is None and interval.ahead == "second" and len(interval.crossings) == 1
    assert critical_compute_line([ahead, never]) is None


def test_the_interval_is_that_of_the_draws():
    """B of the first law varies log-normally; its crossing is a monotone function of B, so quantiles map exactly."""
    factors = np.exp(0.05 * np.random.default_rng(0).standard_normal(40))
    mdm, ar = mdm_without_wear(), ar_without_repetition()
    draws = [mdm.form.internal({**mdm.values, "B": mdm.values["B"] * factor}) for factor in factors]
    crossing = critical_compute(replace(mdm, draws=np.array(draws)), replace(ar, draws=np.tile(ar.theta, (40, 1))), 1e8)
    expected = [closed_form_crossing(1e8, mdm_without_wear(B=2000.0 * factor), ar) for factor in factors]
    ends = np.quantile(expected, [0.025, 0.975], method="nearest")
    assert crossing.interval == pytest.approx(tuple(ends), rel=0.02)
    assert (crossing.resamples, crossing.resamples_without_crossing) == (40, 0)
    assert "95% [" in str(crossing) and to_json(crossing)["flops"] == crossing.flops
    sides = replace(mdm, draws=np.array(draws[:20])), replace(ar, draws=np.tile(ar.theta, (20, 1)))
    half = critical_compute(*sides, 1e8, level=0.5)
    ends = np.quantile(expected[:20], [0.25, 0.75], method="nearest")
    assert half.interval == pytest.approx(tuple(ends), rel=0.02) and "50% [" in str(half)


def test_an_interval_beyond_the_range_says_so():
    mdm, ar = mdm_without_wear(), ar_without_repetition()
    above = mdm.form.internal({**mdm.values, "E": 9.0})  # never overtakes
    draws = np.array([mdm.theta, above] * 5)
    crossing = critical_compute(replace(mdm, draws=draws), replace(ar, draws=np.tile(ar.theta, (10, 1))), 1e8)
    assert crossing.interval[1] is None and crossing.interval[0] == pytest.approx(crossing.flops)
    assert crossing.resamples_without_crossing == 5 and "beyond the range" in str(crossing)


@pytest.mark.parametrize(
    "unique_tokens, flops",
    [(10e6, 3.16e17), (25e6, 2.32e18), (50e6, 1.05e19), (100e6, 4.72e19), (500e6, 1.56e21), (1e9, 7.05e21)],
)
def test_the_published_line_gives_its_table(unique_tokens, flops):
    assert PUBLISHED_CRITICAL_COMPUTE.flops(unique_tokens) == pytest.approx(flops, rel=3e-3)
    in_tokens = 2.12 * 10**1.956 * unique_tokens**2.174  # the same line as the project page prints it
    assert PUBLISHED_CRITICAL_COMPUTE.flops(unique_tokens) == pytest.approx(in_tokens, rel=2e-3)


# ------------------------------------------------------------------ from runs to critical compute


def noisy_runs(planted: Law, seed: int) -> LawTable:
    """Return 72 runs of a law: four sizes, three data budgets, 1 to 300 epochs, noise of 0.3%."""
    grid = np.meshgrid([2e7, 6e7, 2e8, 6e8], [2.5e7, 1e8, 4e8], [1, 3, 10, 30, 100, 300], indexing="ij")
    sizes, budgets, epochs = (axis.ravel() for axis in grid)
    noise = np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(sizes)))
    loss = planted.loss(sizes, budgets, epochs * budgets) * noise
    return LawTable(sizes, budgets, epochs * budgets, loss, np.arange(len(sizes)))


@pytest.mark.slow
def test_the_interval_of_fitted_laws_contains_the_planted_critical_compute():
    """Eight pairs of sweeps: at least six nominal 95% intervals contain the truth; estimates are within 10% of it."""
    planted = [
        law("repetition", A=700.0, B=2100.0, **{"R_D*": 300.0, "R_N*": 300.0}),
        law("repetition", **{"R_D*": 8.0, "R_N*": 6.0}),
    ]
    expected = critical_compute(*planted, 1e8).flops
    covered = 0
    for repetition in range(8):
        fitted = []
        for index, form_and_values in enumerate(planted):
            result = fit(form_and_values.form, noisy_runs(form_and_values, 10 * repetition + index))
            fitted.append(replace(form_and_values, theta=result.theta, draws=bootstrap(result, 100)))
        crossing = critical_compute(*fitted, 1e8)
        assert crossing.flops == pytest.approx(expected, rel=0.1)
        low, high = crossing.interval
        assert high < 1.5 * low
        covered += low <= expected <= high
    assert covered >= 6
