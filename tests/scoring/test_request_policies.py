"""Likelihoods of requests under policies, by blocks and in any order: against plain loops and enumerations."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.generation.generate import check_objective
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import BlockChains, MaskedChains, with_steps
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.block_diffusion import BlockDiffusion
from megatron.scoring.requests import Request, Scoring
from megatron.scoring.score import score

VOCABULARY, EOD, SEQ_LENGTH, BLOCK = Vocabulary(4), 3, 18, 4
MASK = VOCABULARY.mask_id
BLOCKS = ObjectiveConfig(objective="block-diffusion", diffusion_block_size=BLOCK)
CHAINS = [{"chain_order": order} for order in ("left-to-right", "right-to-left", "random", "confidence", "margin")]
CHAINS += [{"chain_order": "entropy", "tokens_per_step": 2}, {"chain_order": "random", "tokens_per_step": 3}]
BLOCKED = [{"chain_order": "confidence", "block_length": 2}, {"chain_order": "margin", "tokens_per_step": 2}]
BLOCKED[1]["block_length"] = 3


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, init_method_std=0.6)
    transformer = Transformer(config, VOCABULARY)
    initialise(transformer, config, 3)
    return transformer.eval()


def text(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, EOD, size).tolist()


def scores(model, objective, requests, **settings):
    return score(model, objective, requests, Scoring(**settings), eod=EOD, seq_length=SEQ_LENGTH)


def chain(model, objective, requests, **policy):
    return scores(model, objective, requests, likelihood="chain", **policy)


# ------------------------------------------------------------------------------------ references: one pass a step


@torch.no_grad()
def masked_probs(model, state: list[int], offset: int = 0) -> np.ndarray:
    """Return the distribution of each token [T, V] given a partly masked text, by one bidirectional pass."""
    probs = model.logits(torch.tensor([state]), causal=False)[0].double().softmax(-1).numpy()
    return np.roll(probs, offset, 0)


@torch.no_grad()
def block_probs(model, state: list[int]) -> np.ndarray:
    """Return the same of the last block of a partly masked text, as the objective reads texts."""
    ids = np.array([[*state, 0]])
    batch = BlockDiffusion(MASK, BLOCK)._batch(ids, np.ones((1, len(state)), bool), np.ones((1, len(state))), 1)
    batch.tokens[:, : len(state)] = torch.tensor(state)
    hidden = model.hidden_states(batch)[0, : len(state)]
    return model.head(hidden).double().softmax(-1).numpy()


CERTAINTY = {
    "confidence": lambda probs: np.sort(probs)[-1],
    "margin": lambda probs: np.sort(probs)[-1] - np.sort(probs)[-2],
    "entropy": lambda probs: float((probs * np.log(probs)).sum()),
}


def chain_nats(predict, context, answer, tail, *, order, tokens_per_step=1, block_length=None) -> float:
    """Return the NLL of a policy by plain loops; `tail` [MASK] follow the answer and stay masked."""
    size, start = len(answer), len(context)
    state = [*context, *[MASK] * (size + tail)]
    masked, nats, length = list(range(size)), 0.0, block_length or size
    steps = -(-size // tokens_per_step)
    for step in range(steps):
        probs = predict(state)[start:]
        number = size * (step + 1) // steps - size * step // steps
        last_block = masked[number - 1] // length
        priority = {
            index: 9 if index // length < last_block else CERTAINTY[order](probs[index])
            for index in masked
            if index // length <= last_block
        }
        chosen = sorted(priority, key=lambda index: (-priority[index], index))[:number]
        nats -= sum(np.log(probs[index, answer[index]]) for index in chosen)
        for index in chosen:
            state[start + index] = answer[index]
            masked.remove(index)
    return nats


@pytest.mark.parametrize("objective, offset", [("mdm", 0), ("dual", 1)])
@pytest.mark.parametrize(
    "policy",
    [
        {"order": "confidence"},
        {"order": "margin", "tokens_per_step": 3},
        {"order": "entropy", "tokens_per_step": 2, "block_length": 3},
    ],
)
def test_a_policy_is_the_chain_rule_of_its_order(model, objective, offset, policy):
    requests = [Request(text(seed, 2 + seed), text(seed + 9, size)) for seed, size in enumerate((7, 1, 5, 2))]
    settings = {"chain_order" if name == "order" else name: value for name, value in policy.items()}
    for request, result in zip(requests, chain(model, objective, requests, **settings), strict=True):
        context, answer = request.context, request.continuation
        expected = chain_nats(lambda state: masked_probs(model, state, offset), context, answer, 0, **policy)
        assert -result.log_likelihood == pytest.approx(expected, abs=1e-4)
        steps = -(-len(answer) // policy.get("tokens_per_step", 1))
        assert result.samples == steps and result.forward_tokens == steps * (len(context) + len(answer))
        assert not result.upper_bound and not result.standard_error


# ------------------------------------------------------------------------------------ block diffusion


def block_nats(model, context, answer, order) -> float:
    """Return the NLL of an answer block by block: blocks of the grid, whose tail is masked."""
    tokens, start, nats = [*context, *answer], len(context), 0.0
    while start < len(tokens):
        end = min((start // BLOCK + 1) * BLOCK, len(tokens))
        tail = min(-end % BLOCK, SEQ_LENGTH - end)
        nats += chain_nats(
            lambda state: block_probs(model, state), tokens[:start], tokens[start:end], tail, order=order
        )
        start = end
    return nats


@pytest.mark.parametrize("order", CERTAINTY)
def test_block_diffusion_is_scored_block_by_block(model, order):
    """Answers within a block, over several, from a context of whole blocks, and to the end of the window."""
    sizes = ((6, 1), (6, 2), (3, 8), (8, 5), (7, 11), (1, 17), (4, 4))
    requests = [Request(text(seed, size), text(seed + 9, answer)) for seed, (size, answer) in enumerate(sizes)]
    results = chain(model, BLOCKS, requests, chain_order=order)
    for request, result in zip(requests, results, strict=True):
        expected = block_nats(model, request.context, request.continuation, order)
        assert -result.log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("block", [3, 8, 12, 17, 18, 40])
@pytest.mark.parametrize("order", ["left-to-right", "confidence"])
def test_steps_of_blocks_of_any_length_are_those_of_validation(model, block, order):
    """Blocks that fit into a window once or not at all, of which the first is partly unmasked, have the same steps."""
    tokens, chains = torch.tensor([text(5, SEQ_LENGTH)]), BlockChains(model, block)
    masked = torch.arange(SEQ_LENGTH)[None] > 0
    sampling = with_steps(Sampling(order=order), 2, chains.num_ordered(SEQ_LENGTH - 1))
    expected = float(chains.nll(tokens, masked, keys=[(0, 0)], sampling=sampling).sum())
    objective = ObjectiveConfig(objective="block-diffusion", diffusion_block_size=block)
    requests = [Request(tokens[0, :1].tolist(), tokens[0, 1:].tolist())]
    (result,) = chain(model, objective, requests, chain_order=order, tokens_per_step=2)
    assert -result.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_whole_text_has_the_nll_of_validation_in_every_state(model):
    """The first state of each block, all masked, is that of a validation window with all tokens masked."""
    tokens = text(5, 18)
    window = np.array([[*tokens, 0]])
    masked = np.arange(18)[None] > 0
    batch = BlockDiffusion(MASK, BLOCK)._batch(window, masked, np.ones((1, 18)), 17)
    with torch.no_grad():
        nll = model(batch, per_position=True).double().sum()
    (result,) = chain(model, BLOCKS, [Request(tokens[:1], tokens[1:])], tokens_per_step=BLOCK)
    assert -result.log_likelihood == pytest.approx(float(nll), abs=1e-4)


def test_masked_forms_share_the_text_of_a_row(model):
    """32 samples of an answer in one block cost one text and 32 blocks, not 32 windows read twice."""
    context = text(1, 12)
    requests = [Request(context, answer, "document") for answer in ([0, 1, 2, 0], [2, 1, 0, 0])]
    results = scores(model, BLOCKS, requests, only_mc_nll=True, decide_at=0.0)
    # all 15 masks of both answers: the fully masked form first, and the others in a second row
    assert [result.samples for result in results] == [15, 15]
    assert sum(result.forward_tokens for result in results) == (12 + 2 * 4) + (12 + 28 * 4)


def test_the_bound_of_block_diffusion_is_the_mean_over_orders(model):
    context, answer = text(1, 6), text(2, 5)
    pieces = [(context, answer[:2]), ([*context, *answer[:2]], answer[2:])]
    expected = 0.0
    for before, piece in pieces:
        tail, orders = -(len(before) + len(piece)) % BLOCK, []
        for order in permutations(range(len(piece))):
            state, nats = [*before, *[MASK] * (len(piece) + tail)], 0.0
            for index in order:
                nats -= np.log(block_probs(model, state)[len(before) + index, piece[index]])
                state[len(before) + index] = piece[index]
            orders.append(nats)
        expected += np.mean(orders)
    (result,) = scores(model, BLOCKS, [Request(context, answer)])
    assert -result.log_likelihood == pytest.approx(expected, abs=1e-4) and result.upper_bound


# ------------------------------------------------------------------------------------ any order


@torch.no_grad()
def permuted_nats(model, context, answer, order) -> float:
    """Return the NLL of an answer in an order by one causal pass per token, which is given the target's position."""
    tokens, positions, nats = list(context), list(range(len(context))), 0.0
    for index in order:
        ids, target = torch.tensor([tokens]), len(context) + index
        batch = Batch.unscored(ids, True, torch.tensor([positions]))
        targets = torch.tensor([[*positions[1:], target]])
        object.__setattr__(batch, "target_positions", targets)
        logs = model.head(model.hidden_states(batch))[0, -1].double().log_softmax(-1)
        nats -= float(logs[answer[index]])
        tokens.append(answer[index])
        positions.append(target)
    return nats


def test_any_order_is_exact_from_left_to_right_and_in_a_given_order(model):
    requests = [Request(text(seed, 2 + seed), text(seed + 9, size)) for seed, size in enumerate((7, 1, 5, 2))]
    requests += [Request(requests[0].context, text(30, 4))]  # shares a context
    sizes = [len(request.continuation) for request in requests]
    for settings, orders in (
        ({}, [range(size) for size in sizes]),
        ({"likelihood": "chain"}, [range(size) for size in sizes]),
        ({"likelihood": "chain", "chain_order": "right-to-left"}, [range(size)[::-1] for size in sizes]),
    ):
        results = scores(model, "any-order", requests, **settings)
        for request, order, result in zip(requests, orders, results, strict=True):
            expected = permuted_nats(model, request.context, request.continuation, order)
            assert -result.log_likelihood == pytest.approx(expected, abs=1e-4) and not result.upper_bound


def test_target_positions_are_those_of_validation(model):
    tokens = text(3, 19)
    likelihood = Autoregressive(with_target_positions=True)
    batch = likelihood.evaluation(np.array([tokens]), EvaluationNoise(1, "v", 0), np.arange(1), "published")
    with torch.no_grad():
        nll = float(model(batch, per_position=True).double().sum())
    for objective in ("any-order", ObjectiveConfig(target_positions=True)):
        (result,) = scores(model, objective, [Request(tokens[:1], tokens[1:])])
        assert -result.log_likelihood == pytest.approx(nll, abs=1e-4)
    (plain,) = scores(model, "ar", [Request(tokens[:1], tokens[1:])])
    assert abs(plain.log_likelihood + nll) > 1e-2


# ------------------------------------------------------------------------------------ every likelihood


@pytest.mark.parametrize(
    "objective, policies",
    [
        ("mdm", [*CHAINS, *BLOCKED]),
        ("dual", [*CHAINS, *BLOCKED]),
        (BLOCKS, CHAINS),
        ("any-order", [*CHAINS[:3], {"chain_order": "random", "block_length": 2}]),
    ],
    ids=["mdm", "dual", "block-diffusion", "any-order"],
)
def test_the_probabilities_of_all_answers_sum_to_one(model, objective, policies):
    context = text(4, 6)  # an answer of three tokens lies in two blocks
    requests = [Request(context, answer, "document") for answer in product(range(VOCABULARY.size), repeat=3)]
    for policy in policies:
        results = chain(model, objective, requests, only_mc_nll=True, batch_tokens=10**5, **policy)
        assert np.exp([result.log_likelihood for result in results]).sum() == pytest.approx(1, abs=1e-5), policy
    if objective == "any-order":
        results = scores(model, objective, requests)
        assert np.exp([result.log_likelihood for result in results]).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("objective", ["mdm", "any-order"])
def test_iwae_meets_the_mixture_over_all_orders(model, objective):
    context, answer = text(1, 5), text(2, 4)

    def order_nats(order) -> float:
        if objective == "any-order":
            return permuted_nats(model, context, answer, order)
        state, nats = [*context, *[MASK] * 4], 0.0
        for index in order:
            nats -= np.log(masked_probs(model, state)[5 + index, answer[index]])
            state[5 + index] = answer[index]
        return nats

    nats = np.array([order_nats(order) for order in permutations(range(4))])
    mixture, bound = -np.log(np.exp(-nats).mean()), nats.mean()
    (exact,) = scores(model, objective, [Request(context, answer)], likelihood="iwae", num_orders=24)
    assert -exact.log_likelihood == pytest.approx(mixture, abs=1e-4) and not exact.upper_bound
    draws = [Request(context, answer, f"draw {number}") for number in range(150)]
    means = []
    for number in (2, 8):
        results = scores(model, objective, draws, likelihood="iwae", num_orders=number, only_mc_nll=True)
        values = -np.array([result.log_likelihood for result in results])
        means.append(values.mean())
        assert means[-1] > mixture - 4 * values.std() / np.sqrt(len(draws)) and results[0].upper_bound
    assert bound > means[0] > means[1]
    if objective == "mdm":
        reported = np.sqrt(np.mean([result.standard_error**2 for result in results]))
        assert reported == pytest.approx(values.std(), rel=0.3)  # of 8 orders
    else:
        (result,) = scores(model, objective, [Request(context, answer)], likelihood="bound", num_mc=24)
        assert -result.log_likelihood == pytest.approx(bound, abs=1e-4) and result.upper_bound


@pytest.mark.parametrize("objective", ["mdm", "dual", BLOCKS, "any-order"], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"likelihood": "chain", "chain_order": "random"},
        {"likelihood": "iwae", "num_orders": 3},
        {"likelihood": "bound"},
    ],
)
def test_a_score_does_not_depend_on_its_batch(model, objective, settings):
    requests = [Request(text(seed, 3 + seed % 4), text(seed + 50, 1 + seed % 9), f"q{seed}") for seed in range(8)]
    requests += [Request([], text(90, 21))]  # windows
    together = scores(model, objective, requests, **settings)
    for other in (
        scores(model, objective, requests[::-1], batch_tokens=37, **settings)[::-1],
        [scores(model, objective, [request], **settings)[0] for request in requests],
    ):
        for first, second in zip(together, other, strict=True):
            assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-4)
            assert (second.is_greedy, second.samples) == (first.is_greedy, first.samples)


def test_greedy_answers_of_blocks(model):
    """The most confident token of a block first, block by block, given the tokens before it."""
    tokens = text(7, 6)
    while len(tokens) < 13:
        end = min((len(tokens) // BLOCK + 1) * BLOCK, SEQ_LENGTH)
        state = [*tokens, *[MASK] * (end - len(tokens))]
        for _ in range(end - len(tokens)):
            probs = block_probs(model, state)
            index = max((index for index, token in enumerate(state) if token == MASK), key=lambda i: probs[i].max())
            state[index] = int(probs[index].argmax())
        tokens = state
    requests = [Request(tokens[:6], tokens[6:]), Request(tokens[:6], [*tokens[6:-1], (tokens[-1] + 1) % EOD])]
    assert [result.is_greedy for result in scores(model, BLOCKS, requests)] == [True, False]


@pytest.mark.parametrize("policy", [{"order": "margin"}, {"order": "entropy", "tokens_per_step": 3}], ids=str)
def test_a_whole_window_is_scored_as_in_validation(model, policy):
    tokens = torch.tensor([text(8, SEQ_LENGTH)])
    masked = torch.arange(SEQ_LENGTH)[None] > 0
    request = Request(tokens[0, :1].tolist(), tokens[0, 1:].tolist())
    order, tokens_per_step = policy["order"], policy.get("tokens_per_step", 1)
    for objective, chains in (("mdm", MaskedChains(model)), (BLOCKS, BlockChains(model, BLOCK))):
        sampling = with_steps(Sampling(order=order), tokens_per_step, chains.num_ordered(SEQ_LENGTH - 1))
        expected = chains.nll(tokens, masked, keys=[(0, 0)], sampling=sampling).double().sum()
        (result,) = chain(model, objective, [request], chain_order=order, tokens_per_step=tokens_per_step)
        assert -result.log_likelihood == pytest.approx(float(expected), abs=1e-4)


def test_a_model_that_reads_from_right_to_left_only_is_refused(model):
    objective = ObjectiveConfig(objective="ar", right_to_left_ratio=1.0)
    message = "--right-to-left-ratio 1.0: trained the model from right to left only, and texts are read from left to"
    with pytest.raises(ConfigurationError, match=message):
        scores(model, objective, [Request([1], [2])])
    with pytest.raises(ConfigurationError, match=message):
        check_objective("ar", objective)
    check_objective("ar", ObjectiveConfig(objective="ar", right_to_left_ratio=0.5))
