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
from tests.likelihoods.test_policies import NOISE, TEXTS, OneRank, chains_of_kind

KINDS = ("masked", "any-order", "blocks")
SEEDS = 40


@pytest.fixture(scope="module")
def tiny():
    return model(SIZE, init_method_std=0.6)


@pytest.fixture(scope="module", params=KINDS)
def mixture(request, tiny):
    """Estimates from 8 orders by seed, [SEEDS, 8, B], and the NLL of texts in all orders, [B][orders, T]."""
    chains = chains_of_kind(request.param, tiny)
    ids = TEXTS[41:45].numpy()
    ids = np.concatenate([ids, ids[:, :1]], axis=1)
    batch = WholeWindows(likelihood_of(chains)).evaluation(ids, NOISE, np.arange(4), "common")
    samplings = [Sampling(order="random", seed=seed) for seed in range(SEEDS)]
    estimates = np.stack(
        [MixtureEngine(chains, OneRank(), sampling, orders=8).nll(batch).sum(2) for sampling in samplings]
    )
    texts = [row[: batch.tokens.shape[1]].tolist() for row in ids]
    orders = [np.stack([order_nll(chains, text, order) for order in orders_of(chains, len(text))]) for text in texts]
    return estimates, orders


def test_the_mixture_lies_between_its_bounds(mixture):
    """Mean >= K/2 orders >= K orders >= -log p(x) >= lower bound, each within its error."""
    estimates, orders = mixture
    exact = np.array([-np.log(np.mean(np.exp(-nll.sum(1)))) for nll in orders])
    jensen = np.array([nll.sum(1).mean() for nll in orders])
    means = estimates[:, :4].mean(0)
    errors = estimates[:, :4].std(0) / math.sqrt(SEEDS) + 1e-5
    assert (np.abs(means[0] - jensen) < 4.5 * errors[0]).all()
    assert (estimates[:, 0] >= estimates[:, 1] - 1e-4).all()  # for any orders, not on average
    assert (estimates[:, 1] >= estimates[:, 2] - 1e-4).all()
    assert (means[2] >= exact - 4 * errors[2]).all() and (means[3] <= exact + 4 * errors[3]).all()
    assert (means[0] - means[2] > 0.2 * (jensen - exact)).all()  # K orders are tighter than the bound by much


def test_standard_errors_are_those_between_seeds(mixture):
    """The jackknife's variances of all texts together, whose orders are independent; they may be too high (blocks)."""
    estimates, _ = mixture
    spread = estimates[:, :3].sum(2).var(0, ddof=1)
    predicted = estimates[:, 4:7].sum(2).mean(0)
    assert (predicted > 0.6 * spread).all() and (predicted < [2, 3, 5] * spread).all()


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
