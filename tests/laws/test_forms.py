"""The forms: published values, gradients, limits of their parameters, and what adding a form takes."""

from typing import ClassVar

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.laws.base import Form, Law, Points, columns, log_sum, stack
from megatron.laws.registry import FORMS, form_named, from_json
from megatron.laws.study import study
from tests.laws.synthetic import PLANTED, synthetic


def law(name: str, **values) -> Law:
    """Return a law with published or planted constants, some replaced."""
    form = FORMS[name]
    return Law(form, form.internal({**(form.published or PLANTED[name]), **values}))


def random_points(num_points: int = 40) -> Points:
    """Return points over all regimes: less than an epoch, exactly one, many."""
    rng = np.random.default_rng(1)
    parameters, unique = 10 ** rng.uniform(6.5, 10, (2, num_points))
    epochs = 10 ** rng.uniform(-0.5, 3, num_points)
    epochs[:5] = 1.0
    return Points(parameters, unique, unique * epochs)


def test_muennighoffs_unit_values():
    """The values that the authors' notebook checks its function against."""
    repetition = law("repetition")
    assert repetition.loss(6.34e9, 25e9, 242e9) == pytest.approx(2.2256440889984477, abs=1e-12)
    assert repetition.loss(8.67e9, 25e9, 178e9) == pytest.approx(2.2269634075087867, abs=1e-12)


def test_hoffmanns_law_by_its_formula():
    values = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    expected = 1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28
    assert law("chinchilla", **values).loss(70e9, 1.4e12, 1.4e12) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("parameters, unique, epochs", [(400e6, 10e6, 70), (400e6, 100e6, 175), (1e9, 1e9, 260)])
def test_quokkas_law_turns_at_its_table_of_epochs(parameters, unique, epochs):
    """Table 3 of 2510.03280, which its printed, rounded constants reproduce within 6%."""
    many = np.geomspace(1, 1e4, 20001)
    losses = law("quokka").loss(parameters, unique, unique * many)
    assert many[losses.argmin()] == pytest.approx(epochs, rel=0.06)


def test_quokkas_formula_at_a_point():
    parameters, unique, epochs = 3e8, 5e7, 20.0
    half_life = 254.35 * unique**0.39 / parameters**0.55
    data = unique * epochs**1.49 * np.exp(-(((epochs - 1) / half_life) ** 0.40))
    expected = 1535.23 / parameters**0.42 + 54.21 / data**0.13
    assert law("quokka").loss(parameters, unique, unique * epochs) == pytest.approx(expected, rel=1e-12)


def test_the_geometric_law_is_the_paper_s_sum():
    """D' = U (1 + (1 - d) + (1 - d)^2 + ...) over the epochs, here over 7 of them."""
    values = PLANTED["geometric"] | {"R_D*": 4.0}
    share = 1 / (1 + 1 / values["R_D*"])  # 1 - d
    data = 1e8 * sum(share**epoch for epoch in range(7))
    expected = values["E"] + values["A"] / 1e6 ** values["alpha"] + values["B"] / data ** values["beta"]
    assert law("geometric", **values).loss(1e6, 1e8, 7e8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay, tolerance", [(31.19, 0.016), (493.89, 0.001)])
def test_the_geometric_and_the_exponential_decay_agree_at_the_published_constants(decay, tolerance):
    epochs = np.geomspace(1, 1000, 50)
    values = PLANTED["geometric"] | {"R_D*": decay}

    def effective_tokens(name: str) -> np.ndarray:
        loss = law(name, **values).loss(1e6, 1e9, 1e9 * epochs)  # a size below the optimum
        return (values["B"] / (loss - values["E"] - values["A"] / 1e6 ** values["alpha"])) ** (1 / values["beta"])

    assert effective_tokens("repetition")[-1] == pytest.approx(1e9 * (1 + decay * -np.expm1(-999 / decay)), rel=1e-9)
    assert effective_tokens("geometric") == pytest.approx(effective_tokens("repetition"), rel=tolerance)


def test_over_fitting_with_exponents_of_one_is_the_form_of_one_parameter():
    points = random_points()
    general = law("overfitting", **PLANTED["overfitting-linear"], d=1, k=1)
    linear = law("overfitting-linear")
    arguments = points.parameters, points.unique_tokens, points.tokens
    assert general.loss(*arguments) == pytest.approx(linear.loss(*arguments), rel=1e-13)
    values = PLANTED["overfitting-linear"]
    expected = values["E"] + 500 / 1e8**0.34 + 2e4 / 8e8**0.465 + 0.002 * 7 * 1e8 / 1e8
    assert linear.loss(1e8, 1e8, 8e8) == pytest.approx(expected, rel=1e-13)


def test_without_repetition_over_fitting_and_repetition_are_chinchillas():
    base = dict(PLANTED["chinchilla"])
    points = random_points()
    arguments = points.parameters, points.tokens, points.tokens
    expected = law("chinchilla", **base).loss(*arguments)
    assert law("overfitting", **base).loss(*arguments) == pytest.approx(expected, rel=1e-13)
    small = 60 * points.parameters < points.tokens  # below the optimum for these tokens: no excess parameters
    assert 5 < small.sum() < 35
    for name in ("repetition", "geometric"):
        losses = law(name, **base).loss(*arguments)
        assert losses[small] == pytest.approx(expected[small], rel=1e-13)


def test_the_bounded_law_stays_between_its_losses():
    bounded = law("bounded")
    values = PLANTED["bounded"]
    assert bounded.loss(1e1, 1e1, 1e1) == pytest.approx(values["L0"], rel=1e-2)
    assert bounded.loss(1e14, 1e20, 1e20) == pytest.approx(values["E"], rel=1e-2)
    h = 300 / 1e8**0.4 + 2e5 / 4e8**0.65 + 0.1 * 1e8**0.6 / 1e8**0.6
    assert bounded.loss(1e8, 1e8, 4e8) == pytest.approx(1.9 + (10.8 - 1.9) * h / (1 + h), rel=1e-12)


def test_the_outer_exponent_of_one_is_chinchillas():
    points = random_points()
    arguments = points.parameters, points.unique_tokens, points.tokens
    outer = law("outer-exponent", **PLANTED["chinchilla"], k=1)
    assert outer.loss(*arguments) == pytest.approx(law("chinchilla").loss(*arguments), rel=1e-13)


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_central_differences(name):
    form, points = FORMS[name], random_points()
    rng = np.random.default_rng(3)
    theta = form.internal(PLANTED[name]) + rng.normal(0, 0.3, (6, len(form.parameters)))
    log_loss, gradient = form.log_loss_and_gradient(theta, points)
    assert log_loss.shape == (6, 40) and gradient.shape == (6, len(form.parameters), 40)
    step = 1e-5
    for index in range(len(form.parameters)):
        offset = step * np.eye(len(form.parameters))[index]
        slope = (form.log_loss(theta + offset, points) - form.log_loss(theta - offset, points)) / (2 * step)
        assert gradient[:, index] == pytest.approx(slope, abs=1e-7, rel=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_extreme_parameters_give_no_nan(name):
    """What an optimiser may try on its way."""
    form, points = FORMS[name], random_points()
    for index in range(len(form.parameters)):
        for value in (-100.0, 100.0):
            theta = form.internal(PLANTED[name])
            theta[index] = value
            log_loss, gradient = form.log_loss_and_gradient(theta, points)
            assert not np.isnan(log_loss).any() and not np.isnan(gradient).any(), (form.parameters[index], value)


@pytest.mark.parametrize("name", FORMS)
def test_a_law_survives_json(name):
    form = FORMS[name]
    theta = form.internal(PLANTED[name])
    original = Law(form, theta, draws=np.stack([theta, theta + 0.1]), notes={"table": "runs.csv"})
    copy = from_json(original.to_json())
    assert copy.form is form and copy.notes == {"table": "runs.csv"}
    assert copy.theta == pytest.approx(theta) and copy.draws == pytest.approx(original.draws)
    assert [resample.draws for resample in copy.resampled()] == [None, None]


def test_a_term_that_is_zero_stays_zero():
    chinchilla = law("chinchilla", E=0)
    assert chinchilla.loss(1e9, 1e9, 1e9) == pytest.approx(477.84 / 1e9**0.3473 + 2143.86 / 1e9**0.3672, rel=1e-12)
    assert not np.isnan(chinchilla.form.log_loss_and_gradient(chinchilla.theta, random_points())[1]).any()


def test_an_unknown_form_gets_a_suggestion():
    with pytest.raises(ConfigurationError, match="--form chinchila: no such form; did you mean chinchilla?"):
        form_named("chinchila")
    with pytest.raises(ConfigurationError, match="the forms are chinchilla, outer-exponent, "):
        form_named("xyz")


class PowerLaw(Form):
    """L = A / D^alpha: what a new form has to write."""

    name = "power"
    equation = "L = A / D^alpha"
    source = "this test"
    parameters = ("A", "alpha")
    across_budgets = ()
    losses = ("A",)
    grid: ClassVar = {"A": (0.5, 2.0), "alpha": (0.1, 0.5)}
    amplitudes: ClassVar = {"A": (("log_tokens", -1, "alpha"),)}

    def log_loss_and_gradient(self, theta, points):
        a, log_alpha = columns(theta)
        power = np.exp(log_alpha) * points.log_tokens
        return log_sum([(a - power, stack((1, -power), power.shape))])


def test_a_new_form_is_a_class_and_an_entry(monkeypatch, tmp_path):
    """Fit, intervals, record and answers follow from the class."""
    monkeypatch.setitem(FORMS, "power", PowerLaw())
    table = synthetic("chinchilla")
    planted = Law(FORMS["power"], FORMS["power"].internal({"A": 20.0, "alpha": 0.1}))
    noise = np.exp(0.003 * np.random.default_rng(2).standard_normal(len(table)))
    loss = planted.loss(table.parameters, table.unique_tokens, table.tokens) * noise
    table = type(table)(table.parameters, table.unique_tokens, table.tokens, loss, table.group)
    result = study(form_named("power"), table, {}, resamples=100)
    assert result.parameter("alpha")["value"] == pytest.approx(0.1, rel=0.02)
    low, high = result.parameter("alpha")["bootstrap"]
    assert low < 0.1 < high
    assert from_json(result.to_json()["law"]).values["A"] == pytest.approx(20, rel=0.05)
