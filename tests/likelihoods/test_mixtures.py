"""Bounds of the mixture over orders of every objective that has orders, against all orders of short texts."""

import math

import numpy as np
import pytest
import torch

from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import BlockChains
from megatron.likelihoods.mixture import MixtureEngine, _estimates, _groups, _mixture, _tangent, _variances
from megatron.likelihoods.windows import WholeWindows
from tests.generation.test_generate import model
from tests.likelihoods.chain_reference import SIZE, likelihood_of, order_nll, orders_of
from tests.likelihoods.test_policies import NOISE, OneRank, chains_of_kind

KINDS = ("masked", "any-order", "blocks")
TEXT = [1, 0, 2, 2]
DRAWS = 4000


@pytest.fixture(scope="module")
def tiny():
    return model(SIZE, init_method_std=0.6)


@pytest.fixture(scope="module")
def all_orders(tiny):
    """The NLL of a text in all of its six orders, [6]."""
    chains = chains_of_kind("masked", tiny)
    return np.array([order_nll(chains, TEXT, order).sum() for order in orders_of(chains, len(TEXT))])


def drawn(all_orders: np.ndarray, count: int) -> torch.Tensor:
    """Return the NLL in `count` random orders of many texts, each a single token, [count, DRAWS, 1]."""
    choices = np.random.default_rng(count).integers(len(all_orders), size=(count, DRAWS))
    return torch.from_numpy(all_orders[choices])[..., None]


def test_the_mixture_lies_between_its_bounds(all_orders):
    """In expectation: mean >= K/2 orders >= K orders >= -log p(x) >= lower bound, each the tighter the larger K is."""
    exact, jensen = -np.log(np.mean(np.exp(-all_orders))), all_orders.mean()
    shares = torch.ones(DRAWS, 1)
    means, errors = [], []
    for count in (2, 4, 8, 32):
        values = _estimates(drawn(all_orders, count), shares)[..., 0].numpy()  # [4, DRAWS]
        means.append(values.mean(1))
        errors.append(values.std(1) / math.sqrt(DRAWS))
        assert (values[0] >= values[1] - 1e-9).all() and (values[1] >= values[2] - 1e-9).all()  # for any orders
    mean, half, full, lower = np.transpose(means)
    mean_error, _, full_error, lower_error = np.transpose(errors)
    assert (np.abs(mean - jensen) < 4 * mean_error).all()
    assert (half[1:] - full[:-1])[:2] == pytest.approx([0, 0], abs=0.1)  # of four orders is of two
    assert (np.diff(full) < 0).all() and (np.diff(lower) > 0).all()
    assert (full > exact - 4 * full_error).all() and (lower < exact + 4 * lower_error).all()
    assert full[-1] - exact < 0.05 * (jensen - exact) and exact - lower[-1] < 0.2 * (jensen - exact)


def test_the_bias_of_many_orders_is_that_of_half_of_them_less_once_more(all_orders):
    """2 iwae_K - iwae_K/2 is free of the bias in 1/K, that is Var(w) / 2K."""
    exact = -np.log(np.mean(np.exp(-all_orders)))
    orders = torch.cat([drawn(all_orders, 128 + shift)[:128] for shift in range(4)], 1)
    _, half, full, _ = _estimates(orders, torch.ones(orders.shape[1], 1)).mean((1, 2)).tolist()
    weights = np.exp(exact - all_orders)
    assert full - exact == pytest.approx(weights.var() / 256, rel=0.3)
    assert abs(2 * full - half - exact) < 0.5 * (full - exact)


def test_standard_errors_are_those_between_draws(all_orders):
    """The jackknife's variances are on average those of the estimates, or higher."""
    orders = drawn(all_orders, 16)
    actual = _estimates(orders, torch.ones(DRAWS, 1))[:3, :, 0].var(1).numpy()
    predicted = _variances(orders).mean(1).numpy()
    assert predicted[0] == pytest.approx(actual[0], rel=0.05)
    assert (predicted > 0.9 * actual).all() and (predicted < 3 * actual).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_draws_orders_of_its_objective(tiny, kind):
    """Every order is one of all orders, and the estimates are the plain formulas, for each block of a text."""
    chains = chains_of_kind(kind, tiny)
    ids = np.array([[*TEXT, 0], [2, 1, 1, 0, 0]])
    batch = WholeWindows(likelihood_of(chains)).evaluation(ids, NOISE, np.arange(2), "common")
    engine = MixtureEngine(chains, OneRank(), Sampling(order="random", seed=3), orders=8)
    estimates = engine.nll(batch).double()  # [7, B, T]
    for row, text in enumerate(ids[:, :4].tolist()):
        orders = np.stack([engine.order_nll(batch, index)[row].double().numpy() for index in range(8)])  # [8, T]
        known = np.stack([order_nll(chains, text, order) for order in orders_of(chains, len(text))])  # [orders, T]
        assert (np.abs(orders[:, None] - known).max(2).min(1) < 1e-4).all()
        assert len(np.unique(orders.sum(1).round(4))) > 1
        for group in np.split(np.arange(4), 2) if kind == "blocks" else [np.arange(4)]:
            totals = orders[:, group].sum(1)
            halves = [-np.log(np.mean(np.exp(-half))) for half in np.split(totals, 2)]
            factors = [math.exp(halves[0] - halves[1]), math.exp(halves[1] - halves[0])]
            lower = np.mean([1 + halves[0] - factors[0], 1 + halves[1] - factors[1]])
            expected = [totals.mean(), np.mean(halves), -np.log(np.mean(np.exp(-totals))), lower]
            assert estimates[:4, row, group].sum(1).numpy() == pytest.approx(expected, rel=1e-4)


def test_few_orders_have_no_standard_error():
    assert _variances(torch.rand(6, 3, 5)).isnan().all() and not _variances(torch.rand(8, 3, 5)).isnan().any()


def test_the_error_of_a_mean_is_its_textbook_one():
    nll = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = (nll.sum(2)[:4] + nll.sum(2)[4:]) / 2  # [K/2, G]
    assert _variances(nll)[0].numpy() == pytest.approx((pairs.var(0) / 4).numpy())


def test_all_orders_give_the_probability_of_the_mixture(tiny):
    """The engine's own combination, on the orders of an enumeration: K = all six orders."""
    chains = chains_of_kind("masked", tiny)
    nll = np.stack([order_nll(chains, [1, 0, 2, 2], order) for order in orders_of(chains, 4)])  # [6, 4]
    probabilities = np.exp(-nll.sum(1))
    groups, shares = torch.from_numpy(nll)[:, None], torch.tensor([[0, 1, 1, 1]]) / 3
    assert float(_mixture(groups, shares).sum()) == pytest.approx(-np.log(probabilities.mean()))
    first, second = probabilities[:2].mean(), probabilities[2:].mean()
    assert float(_tangent(groups[:2], groups[2:])) == pytest.approx(1 - np.log(first) - second / first)


def test_blocks_have_mixtures_of_their_own(tiny):
    """All orders of a text are all pairs of orders of its blocks: their mixture is the product of those of blocks.

    The sum over blocks is at most the mean, over all ways to combine the orders of blocks, of the whole text's value.
    """
    chains, text = BlockChains(tiny, 3), [1, 0, 2, 2, 1, 0]
    nll = np.stack([order_nll(chains, text, order) for order in orders_of(chains, len(text))])  # [2 * 6, T]
    first, second = (np.unique(nll[:, part].round(12), axis=0) for part in (slice(0, 3), slice(3, 6)))
    assert (len(first), len(second)) == (2, 6)
    exact = -np.log(np.mean(np.exp(-nll.sum(1))))
    blocks = [-np.log(np.mean(np.exp(-part.sum(1)))) for part in (first, second)]
    assert sum(blocks) == pytest.approx(exact)
    orders = torch.from_numpy(np.concatenate([first[[0, 1]], second[[3, 1]]], axis=1))[:, None]  # [2, 1, T]
    swapped = torch.from_numpy(np.concatenate([first[[1, 0]], second[[3, 1]]], axis=1))[:, None]
    by_block = _estimates(_groups(orders, 3), torch.ones(2, 3) / 3)[2].sum()
    whole = [_estimates(values, torch.ones(1, 6) / 6)[2].sum() for values in (orders, swapped)]
    assert by_block <= (whole[0] + whole[1]) / 2 and by_block < max(whole) - 1e-3
