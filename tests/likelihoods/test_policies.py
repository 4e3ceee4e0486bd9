"""Likelihoods of unmasking policies of every objective that has them, against plain loops on a tiny vocabulary."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from megatron.generation.diffusion import fill
from megatron.generation.sampling import ORDERS, Sampling, draw_keys
from megatron.likelihoods.chains import AnyOrderChains, BlockChains, Chains, MaskedChains, with_steps
from megatron.likelihoods.windows import PolicyEngine, WholeWindows
from megatron.objectives.base import EvaluationNoise
from tests.frequencies import chi_square
from tests.generation.test_generate import NEVER, model
from tests.likelihoods.chain_reference import BLOCK, MASK, SIZE, likelihood_of, order_nll, policy_order

TEXTS = torch.tensor(list(itertools.product(range(SIZE), repeat=4)))  # all texts of four tokens, [81, 4]
NOISE = EvaluationNoise(1, "validation", 0)
POLICIES = [Sampling(order=order) for order in ORDERS]
POLICIES += [Sampling(order="confidence", steps=2), Sampling(order="margin", block_length=2)]
POLICIES += [Sampling(order="entropy", steps=3, block_length=2), Sampling(order="random", steps=1)]
POLICIES += [Sampling(order="right-to-left", steps=2, block_length=2)]  # the last of three tokens is a block
KINDS = ("masked", "shifted", "any-order", "blocks")


class OneRank:
    """The part of ParallelContext that the engines use."""

    device, rank = torch.device("cpu"), 0


@pytest.fixture(scope="module")
def tiny():
    return model(SIZE, init_method_std=0.6)


def chains_of_kind(kind: str, transformer) -> Chains:
    if kind == "any-order":
        return AnyOrderChains(transformer)
    if kind == "blocks":
        return BlockChains(transformer, BLOCK)
    return MaskedChains(transformer, int(kind == "shifted"))


def unmasked_first(texts: torch.Tensor) -> torch.Tensor:
    """Return that all tokens but the first of each text are masked."""
    masked = torch.ones(texts.shape, dtype=torch.bool)
    masked[:, 0] = False
    return masked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", POLICIES, ids=str)
def test_the_probabilities_of_all_texts_sum_to_one(tiny, kind, sampling):
    texts = TEXTS[:27]  # all that begin with token 0
    if kind == "blocks":  # the first block has a context, the last one is shorter than the others
        texts = torch.cat([torch.zeros(81, 1, dtype=torch.int64), TEXTS], 1)
    keys = [(0, 0)] * len(texts)
    nll = chains_of_kind(kind, tiny).nll(texts, unmasked_first(texts), keys=keys, sampling=sampling)
    assert float((-nll.double().sum(1)).exp().sum()) == pytest.approx(1, abs=1e-5)
    assert (nll[:, 0] == 0).all() and (nll[:, 1:] > 0).all()


@pytest.mark.parametrize("sampling", POLICIES[:3] + POLICIES[4:9], ids=str)
def test_generation_follows_the_likelihood_of_its_policy(tiny, sampling):
    text, count = [1, MASK, MASK, MASK], 4000
    drawn = Sampling(order=sampling.order, steps=sampling.steps, block_length=sampling.block_length, temperature=1.0)
    keys = draw_keys([text] * count)
    outputs = fill(tiny, [text] * count, keys, drawn, batch_size=count, eod=NEVER, open_end=True)
    texts = TEXTS[27:54]
    nll = MaskedChains(tiny).nll(texts, unmasked_first(texts), keys=[(0, 0)] * 27, sampling=sampling)
    expected = {tuple(row): float(p) for row, p in zip(texts.tolist(), (-nll.double().sum(1)).exp())}
    assert chi_square(Counter(tuple(output) for output in outputs), expected, count) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "random"])
def test_a_policy_is_the_chain_rule_in_its_order(tiny, kind, order):
    # an any-order model sees distances as attention weights only: one token of context is a tie, which goes left,
    # and two equal ones would be a tie but for rounding
    texts = [[1, 0, 2, 2, 1, 0], [0, 2, 1, 1, 0, 2], [2, 1, 0, 1, 2, 0]]
    chains, tokens = chains_of_kind(kind, tiny), torch.tensor(texts)
    nll = chains.nll(tokens, unmasked_first(tokens), keys=[(0, 0)] * 3, sampling=Sampling(order=order))
    for row, text in zip(nll, texts, strict=True):
        expected = order_nll(chains, text, policy_order(chains, text, order, start=1))
        assert row.numpy() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ["common", "published"])
def test_windows_are_scored_at_the_tokens_that_an_objective_scores(tiny, kind, alignment):
    ids = np.array([[1, 0, 2, 2, 0], [2, 2, 1, 0, 1]])
    chains = chains_of_kind(kind, tiny)
    whole = WholeWindows(likelihood_of(chains))
    batch = whole.evaluation(ids, NOISE, np.arange(2), alignment)
    nll = PolicyEngine(chains, OneRank(), Sampling(order="left-to-right")).nll(batch)
    scored = whole.scored_tokens(4, alignment)
    assert ((nll > 0).numpy() == whole.scored(ids, alignment)[:, : scored.stop]).all()
    if scored.start:
        for row, window in zip(nll, ids[:, : scored.stop].tolist(), strict=True):
            forward = tuple(range(1, scored.stop))
            assert row.numpy() == pytest.approx(order_nll(chains, window, forward), rel=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("order", ["left-to-right", "right-to-left"])
def test_one_pass_in_an_order_is_one_step_after_another(order, padded):
    texts, masked = TEXTS[30:40], torch.tensor([[False, True, False, True]]).expand(10, -1)
    transformer = model(SIZE, init_method_std=0.6, softmax_over_padding=padded)
    chains, settings = AnyOrderChains(transformer), {"keys": [(0, 0)] * 10, "sampling": Sampling(order=order)}
    filling = chains.filling(texts, masked, **settings)
    with torch.no_grad():
        filling.run()
    assert filling.token_nll().numpy() == pytest.approx(chains.nll(texts, masked, **settings).numpy(), abs=1e-5)


def test_a_random_order_is_one_of_all_orders_and_differs_by_key(tiny):
    text = [1, 0, 2, 2]
    tokens, chains = torch.tensor([text]), AnyOrderChains(tiny)
    keys, sampling = [(5, index) for index in range(40)], Sampling(order="random")
    tokens = tokens.expand(40, -1)
    nll = chains.nll(tokens, unmasked_first(tokens), keys=keys, sampling=sampling)
    totals = {round(total, 4) for total in nll.sum(1).tolist()}
    expected = {round(order_nll(chains, text, order).sum(), 4) for order in itertools.permutations((1, 2, 3))}
    assert len(totals) == len(expected) == 6
    assert sorted(totals) == pytest.approx(sorted(expected), abs=2e-4)


def test_blocks_of_unequal_masks_do_not_depend_on_one_another(tiny):
    """Tokens of a context in the middle of a block, and blocks that are masked completely, together and alone."""
    texts = torch.tensor([[1, 0, 2, 2, 1, 0, 2]])
    chains, sampling = BlockChains(tiny, 3), Sampling(order="confidence")
    masked = torch.tensor([[False, False, True, True, True, True, False]])
    together = chains.nll(texts, masked, keys=[(0, 0)], sampling=sampling)
    first = chains.nll(texts, masked & (torch.arange(7) < 3), keys=[(0, 0)], sampling=sampling)
    second = chains.nll(texts, masked & (torch.arange(7) >= 3), keys=[(0, 0)], sampling=sampling)
    assert together.numpy() == pytest.approx((first + second).numpy(), abs=1e-5)
    assert ((together > 0) == masked).all()


def test_steps_of_several_tokens():
    assert with_steps(Sampling(), 1, 127).steps == 127 and with_steps(Sampling(), 4, 127).steps == 32


def test_passes(tiny):
    assert MaskedChains(tiny).passes(Sampling(order="random"), 31) == 31
    assert BlockChains(tiny, 4).passes(Sampling(order="random"), 31) == 4
    assert AnyOrderChains(tiny).passes(Sampling(order="random", steps=31), 31) == 1
    assert AnyOrderChains(tiny).passes(Sampling(order="random", steps=8), 31) == 8
    assert AnyOrderChains(tiny).passes(Sampling(order="margin"), 31) == 31
