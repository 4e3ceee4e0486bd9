"""Learning rate and weight decay at the corners of every decay style."""

from math import cos, pi
from types import SimpleNamespace

import pytest

from megatron.config.sections import OptimizerConfig
from megatron.training.schedule import learning_rate, weight_decay

PEAK, LOW = 0.5, 0.1
WARMUP, END, WSD = 100, 1000, 300


def rate(samples, style="cosine", *, warmup=WARMUP, end=END, wsd=WSD, low=LOW) -> float:
    low = None if style == "constant" else low  # refused for "constant": it has no final rate
    config = OptimizerConfig(lr=PEAK, min_lr=low, lr_decay_style=style)
    plan = SimpleNamespace(lr_warmup_samples=warmup, lr_decay_samples=end, lr_wsd_decay_samples=wsd)
    return learning_rate(config, plan, samples)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_a_step_has_the_rate_of_megatrons_next_step(style):
    """Megatron computes the rate of a step from the samples before it, and increments the count afterwards."""
    batch, before, megatron_rates = 20, 0, []
    for _ in range(60):
        fraction = min(1.0, max(0.0, (before - WARMUP) / (END - WARMUP)))
        factor = {"cosine": (1 + cos(pi * fraction)) / 2, "linear": 1 - fraction, "constant": 1.0}[style]
        megatron_rates.append(PEAK * before / WARMUP if before <= WARMUP else LOW + (PEAK - LOW) * factor)
        before += batch
    rates = [rate((step + 1) * batch, style) for step in range(60)]
    assert megatron_rates[0] == 0.0 and rates[:-1] == pytest.approx(megatron_rates[1:], abs=1e-15)


CORNERS = {  # style: (samples, rate)
    "cosine": [(100, 0.5), (325, 0.3 + 0.2 * 0.5**0.5), (550, 0.3), (1000, 0.1), (1001, 0.1), (10**12, 0.1)],
    "linear": [(100, 0.5), (325, 0.4), (550, 0.3), (1000, 0.1), (1001, 0.1), (10**12, 0.1)],
    "constant": [(100, 0.5), (550, 0.5), (1000, 0.5), (10**12, 0.5)],
    "WSD": [(100, 0.5), (550, 0.5), (700, 0.5), (850, 0.3), (1000, 0.1), (1001, 0.1), (10**12, 0.1)],
}


@pytest.mark.parametrize("style", CORNERS)
def test_corners(style):
    for samples, expected in [(0, 0.0), (1, 0.005), (50, 0.25), (99, 0.495), *CORNERS[style]]:
        assert rate(samples, style) == pytest.approx(expected, abs=1e-15)


def formula(samples: int, style: str) -> float:
    """Return the rate in closed form."""
    if samples < WARMUP:
        return PEAK * samples / WARMUP
    fraction = (samples - WARMUP) / (END - WARMUP)
    factor = {
        "constant": 1.0,
        "linear": 1 - fraction,
        "cosine": cos(pi / 2 * min(fraction, 1)) ** 2,
        "WSD": (END - samples) / WSD,
    }[style]
    return LOW + (PEAK - LOW) * min(1, max(0, factor))


@pytest.mark.parametrize("style", CORNERS)
def test_the_whole_curve(style):
    for samples in range(0, 1300, 7):
        assert rate(samples, style) == pytest.approx(formula(samples, style), rel=1e-12), samples


@pytest.mark.parametrize("style", CORNERS)
def test_without_warm_up_the_peak_comes_first(style):
    assert rate(0, style, warmup=0) == PEAK


@pytest.mark.parametrize("style", CORNERS)
def test_warm_up_may_last_to_the_end(style):
    assert rate(END, style, warmup=END) == PEAK
    assert rate(END + 1, style, warmup=END) == (PEAK if style == "constant" else LOW)


CYCLES = (300, 650, END)  # samples at their ends


def test_a_cyclic_rate_is_a_cosine_in_each_cycle():
    config = OptimizerConfig(lr=PEAK, min_lr=LOW, lr_decay_style="cyclic", lr_cycles=3)
    plan = SimpleNamespace(lr_warmup_samples=WARMUP, lr_decay_samples=END, lr_cycle_ends=CYCLES)
    for start, end in zip((WARMUP, *CYCLES), CYCLES):
        for samples in range(start + 1, end + 1):
            expected = LOW + (PEAK - LOW) * cos(pi / 2 * (samples - start) / (end - start)) ** 2
            assert learning_rate(config, plan, samples) == pytest.approx(expected, rel=1e-12)
        assert learning_rate(config, plan, end) == pytest.approx(LOW)
    for samples, expected in ((0, 0.0), (50, 0.25), (WARMUP, PEAK), (END + 1, LOW), (10**12, LOW)):
        assert learning_rate(config, plan, samples) == pytest.approx(expected)


def test_one_cycle_is_a_cosine():
    config = OptimizerConfig(lr=PEAK, min_lr=LOW, lr_decay_style="cyclic", lr_cycles=1)
    plan = SimpleNamespace(lr_warmup_samples=WARMUP, lr_decay_samples=END, lr_cycle_ends=(END,))
    assert all(learning_rate(config, plan, samples) == rate(samples) for samples in range(0, 1300, 7))


def test_a_wsd_decay_longer_than_what_is_left_begins_after_the_warm_up():
    assert rate(WARMUP, "WSD", wsd=END) == PEAK
    assert rate((WARMUP + END) // 2, "WSD", wsd=END) == pytest.approx((PEAK + LOW) / 2)


@pytest.mark.parametrize("low, final", [(None, PEAK / 10), (0.0, 0.0), (PEAK, PEAK)])
@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_the_final_rate(style, low, final):
    assert rate(END, style, low=low) == rate(2 * END, style, low=low) == pytest.approx(final)
    if low == PEAK:
        assert rate(END // 2, style, low=low) == PEAK


DECAYS = {  # style: (samples, weight decay)
    "linear": [(0, 0.5), (250, 0.4), (500, 0.3), (1000, 0.1)],
    "cosine": [(0, 0.5), (250, 0.3 + 0.2 * 0.5**0.5), (500, 0.3), (750, 0.3 - 0.2 * 0.5**0.5), (1000, 0.1)],
}


@pytest.mark.parametrize("style", DECAYS)
def test_weight_decay_changes_from_start_to_end_value_over_the_budget(style):
    config = OptimizerConfig(weight_decay_incr_style=style, start_weight_decay=0.5, end_weight_decay=0.1)
    for samples, expected in DECAYS[style]:
        assert weight_decay(config, SimpleNamespace(train_samples=1000), samples) == pytest.approx(expected)


def test_weight_decay_stays_where_it_does_not_change():
    for samples in (0, 1, 10**9):
        assert weight_decay(OptimizerConfig(weight_decay=0.3), SimpleNamespace(train_samples=1000), samples) == 0.3
