"""Likelihoods of unmasking policies and of the mixture over orders, against enumerations on a tiny vocabulary."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from megatron.generation.diffusion import fill
from megatron.generation.sampling import ORDERS, Sampling, draw_keys
from megatron.likelihoods.forced import policy_nll
from megatron.likelihoods.windows import MixtureEngine, PolicyEngine, WholeWindows, _mixture, _tangent, with_steps
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.masked_diffusion import MaskedDiffusion
from tests.frequencies import chi_square
from tests.generation.test_generate import NEVER, model

SIZE, MASK = 3, 3
TEXTS = torch.tensor(list(itertools.product(range(SIZE), repeat=4)))  # all texts of four tokens, [81, 4]
NOISE = EvaluationNoise(1, "validation", 0)
POLICIES = [Sampling(order=order) for order in ORDERS]
POLICIES += [Sampling(order="confidence", steps=2), Sampling(order="margin", block_length=2)]
POLICIES += [Sampling(order="entropy", steps=3, block_length=2), Sampling(order="random", steps=1)]


class OneRank:
    """The part of ParallelContext that the engines use."""

    device = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return model(SIZE, init_method_std=0.6)


@torch.no_grad()
def order_probabilities(transformer, text: list[int], offset: int = 0) -> list[float]:
    """Return the probability of tokens 1.. of a text given token 0, in each of their orders, by plain loops."""
    results = []
    for order in itertools.permutations(range(1, len(text))):
        state, probability = [text[0]] + [MASK] * (len(text) - 1), 1.0
        for position in order:
            logits = transformer.logits(torch.tensor([state]), causal=False)[0, position - offset]
            probability *= float(logits.double().softmax(-1)[text[position]])
            state[position] = text[position]
        results.append(probability)
    return results


@pytest.mark.parametrize("sampling", POLICIES, ids=str)
def test_the_probabilities_of_all_texts_sum_to_one(tiny, sampling):
    masked = torch.tensor([[False, True, True, True]]).expand(27, -1)
    nll = policy_nll(
        tiny, TEXTS[:27], masked, keys=[(0, 0)] * 27, sampling=sampling
    )  # all texts that begin with token 0
    assert float((-nll.double().sum(1)).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sampling", POLICIES[:3] + POLICIES[4:9], ids=str)
def test_generation_follows_the_likelihood_of_its_policy(tiny, sampling):
    text, count = [1, MASK, MASK, MASK], 4000
    drawn = Sampling(order=sampling.order, steps=sampling.steps, block_length=sampling.block_length, temperature=1.0)
    keys = draw_keys([text] * count)
    outputs = fill(tiny, [text] * count, keys, drawn, batch_size=count, eod=NEVER, open_end=True)
    texts, masked = TEXTS[27:54], torch.tensor([[False, True, True, True]]).expand(27, -1)
    nll = policy_nll(tiny, texts, masked, keys=[(0, 0)] * 27, sampling=sampling)
    expected = {tuple(row): float(p) for row, p in zip(texts.tolist(), (-nll.double().sum(1)).exp())}
    assert chi_square(Counter(tuple(output) for output in outputs), expected, count) > 1e-3


def test_a_direction_is_the_chain_rule_in_it(tiny):
    text = [1, 0, 2, 2]
    masked = torch.tensor([[False, True, True, True]])
    by_order = dict(zip(itertools.permutations(range(1, 4)), order_probabilities(tiny, text), strict=True))
    for order, positions in (("left-to-right", (1, 2, 3)), ("right-to-left", (3, 2, 1))):
        nll = policy_nll(tiny, torch.tensor([text]), masked, keys=[(0, 0)], sampling=Sampling(order=order))
        assert float((-nll.sum()).exp()) == pytest.approx(by_order[positions], rel=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_scored_at_the_positions_that_predict(tiny, shifted):
    ids = np.array([[1, 0, 2, 2, 0], [2, 2, 1, 0, 1]])
    whole = WholeWindows(MaskedDiffusion(MASK, 1, shifted=shifted))
    batch = whole.evaluation(ids, NOISE, np.arange(2), "common")
    engine = PolicyEngine(tiny, OneRank(), Sampling(order="left-to-right"), offset=whole.target_offset)
    nll = engine.nll(batch)
    assert ((nll > 0).numpy() == (batch.weights > 0).numpy()).all()
    for row in range(2):
        first_order = order_probabilities(tiny, ids[row, :4].tolist(), int(shifted))[0]
        assert float((-nll[row].sum()).exp()) == pytest.approx(first_order, rel=1e-5)


def test_the_mixture_lies_between_its_bounds(tiny):
    """With many orders: mean >= K/2 orders >= K orders >= -log p(x) >= lower bound, each within its error."""
    ids = TEXTS[40:44].numpy()
    ids = np.concatenate([ids, ids[:, :1]], axis=1)
    batch = WholeWindows(MaskedDiffusion(MASK, 1)).evaluation(ids, NOISE, np.arange(4), "common")
    exact = np.array([-np.log(np.mean(order_probabilities(tiny, row[:4].tolist()))) for row in ids])
    jensen = np.array([-np.mean(np.log(order_probabilities(tiny, row[:4].tolist()))) for row in ids])
    estimates = []
    for seed in range(60):
        engine = MixtureEngine(tiny, OneRank(), Sampling(order="random", seed=seed), orders=4)
        estimates.append(engine.nll(batch).sum(2).numpy())  # [4, B]
    means, errors = np.mean(estimates, 0), np.std(estimates, 0) / np.sqrt(60)
    assert np.abs(means[0] - jensen).max() < 4 * errors[0].max()
    assert (means[0] >= means[1] - 1e-6).all() and (means[1] >= means[2] - 1e-6).all()  # for any orders, not on average
    assert (means[2] >= exact - 4 * errors[2]).all() and (means[3] <= exact + 4 * errors[3]).all()
    assert (means[0] - means[2] > 0.2 * (jensen - exact)).all()  # K orders are tighter than the bound by much


def test_all_orders_give_the_probability_of_the_mixture(tiny):
    """The engine's own combination, on the orders of an enumeration: K = all six orders."""
    probabilities = np.array(order_probabilities(tiny, [1, 0, 2, 2]))
    nll = torch.from_numpy(-np.log(probabilities))[:, None, None] * torch.tensor([0.0, 0.2, 0.3, 0.5])  # [6, 1, 4]
    shares = torch.tensor([[0, 1, 1, 1]]) / 3
    assert float(_mixture(nll, shares).sum()) == pytest.approx(-np.log(probabilities.mean()))
    first, second = probabilities[:2].mean(), probabilities[2:].mean()
    assert float(_tangent(nll[:2], nll[2:])) == pytest.approx(1 - np.log(first) - second / first)


def test_steps_of_several_tokens():
    assert with_steps(Sampling(), 1, 127).steps == 127 and with_steps(Sampling(), 4, 127).steps == 32
