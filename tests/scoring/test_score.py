"""Log-likelihoods of continuations: against brute force, enumeration over all orders, and their reported errors."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.config.sections import DataConfig, ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.scoring import inputs
from megatron.scoring.batched_forward import Limits, batches
from megatron.scoring.mask_designs import balanced_design, exhaustive_design
from megatron.scoring.requests import Request, Scoring
from megatron.scoring.score import score, windows

VOCABULARY, EOD, SEQ_LENGTH = Vocabulary(7), 6, 24


def build(seed: int, std: float = 0.6, **changes) -> Transformer:
    config = ModelConfig(
        **{"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2} | changes, init_method_std=std
    )
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build(3)


def text(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, EOD, size).tolist()


def scored(model, requests, objective="mdm", seq_length=SEQ_LENGTH, finished=lambda *_: None, **settings):
    return score(model, objective, requests, Scoring(**settings), eod=EOD, seq_length=seq_length, finished=finished)


@pytest.fixture
def sequences(monkeypatch):
    """All sequences that are evaluated by a masked-diffusion model."""
    collected, plain = [], inputs.predict_sequences

    def collect(model, batch, *arguments, **settings):
        collected.extend(batch)
        return plain(model, batch, *arguments, **settings)

    monkeypatch.setattr(inputs, "predict_sequences", collect)
    return collected


@torch.no_grad()
def log_softmax(model, tokens, causal: bool) -> np.ndarray:
    """Return log-probabilities [T, V] of a sequence, by one forward pass."""
    return model.logits(torch.tensor([tokens]), causal)[0].double().log_softmax(-1).numpy()


def masked_nll(model, context, continuation, masked) -> dict[int, float]:
    """Return the NLL of each token of the continuation in `masked`, all of them masked at once."""
    tokens = [*context, *continuation]
    for index in masked:
        tokens[len(context) + index] = VOCABULARY.mask_id
    logs = log_softmax(model, tokens, causal=False)
    return {index: -logs[len(context) + index, continuation[index]] for index in masked}


# ------------------------------------------------------------------------------------ next-token prediction


def expected_causal(model, request, seq_length=SEQ_LENGTH):
    context, continuation = request.context or [EOD], request.continuation
    read = [*context, *continuation][-(seq_length + 1) :][:-1]
    logs = log_softmax(model, read, causal=True)[-len(continuation) :]
    best = logs.argmax(-1).tolist() == list(continuation)
    return logs[range(len(continuation)), continuation].sum(), best


def greedy_causal(model, context, size):
    tokens = list(context)
    for _ in range(size):
        tokens.append(int(log_softmax(model, tokens, causal=True)[-1].argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("limits", [{}, {"batch_tokens": 1}, {"batch_tokens": 60}, {"batch_rows": 2}])
def test_causal_scores_equal_one_pass_a_request(model, limits):
    contexts = [text(seed, size) for seed, size in enumerate((5, 9, 9, 1, 40))] + [[]]
    requests = [
        Request(context, text(17 * size + number, size))
        for number, context in enumerate(contexts)
        for size in (1, 4, 12, 1, 24)
    ]
    requests += [Request(text(90, 7), text(91, 3)), Request(text(90, 7), greedy_causal(model, text(90, 7), 5))]
    requests += [Request(text(92, 6), greedy_causal(model, text(92, 6), 4))]
    results = scored(model, requests, "ar", **limits)
    for request, result in zip(requests, results, strict=True):
        nats, greedy = expected_causal(model, request)
        assert result.log_likelihood == pytest.approx(nats, abs=1e-4) and result.is_greedy == greedy
        assert result.standard_error == 0 and not result.upper_bound
    assert results[-1].is_greedy and results[-2].is_greedy


def test_a_shared_context_is_read_once(model):
    context, sizes = text(1, 12), (1, 3, 6)
    scores = scored(model, [Request(context, text(size, size)) for size in sizes], "ar")
    assert sum(score.forward_tokens for score in scores) == 12 + 2 + 5
    alone = scored(model, [Request(text(2, 12), text(3, 4))], "ar")
    assert alone[0].forward_tokens == 12 + 3


def test_equal_requests_are_scored_once_and_told_of_each(model):
    request, indices = Request(text(1, 5), text(2, 3), "q"), []
    for objective in ("ar", "mdm", "dual"):
        indices.clear()
        scores = scored(
            model, [request, Request([], [1]), request], objective, finished=lambda index, _: indices.append(index)
        )
        assert scores[0] == scores[2] and sorted(indices) == [0, 1, 2]
    assert scored(model, [Request(text(1, 3), [])], "ar")[0].log_likelihood == 0


def test_windows_are_those_of_lm_eval():
    for size in (1, 2, 7, 8, 9, 15, 16, 17, 40):
        for longest in (2, 7, 8):
            tokens = list(range(size))
            theirs = get_rolling_token_windows(tokens, prefix_token=99, max_seq_len=longest, context_len=1)
            expected = [make_disjoint_window(pair) for pair in theirs]
            ours = [(list(pair.context), list(pair.continuation)) for pair in windows((99,), tuple(tokens), longest)]
            assert ours == expected


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_long_text_is_the_sum_of_its_windows(model, objective):
    tokens, longest = text(4, 30), 8 - (objective == "mdm")
    result = scored(model, [Request([], tokens)], objective, seq_length=8)[0]
    assert result.truncated_tokens == 0
    window_scores = [
        scored(model, [Request(pair.context, pair.continuation, "x" if number == 0 else f"x/{number}")], objective, 8)[
            0
        ]
        for number, pair in enumerate(windows((EOD,), tuple(tokens), longest))
    ]
    keyed = scored(model, [Request([], tokens, "x")], objective, seq_length=8)[0]
    assert keyed.log_likelihood == pytest.approx(sum(score.log_likelihood for score in window_scores), abs=1e-4)
    assert keyed.standard_error == pytest.approx(
        np.sqrt(sum(score.standard_error**2 for score in window_scores)), abs=1e-5
    )
    assert result.log_likelihood == pytest.approx(keyed.log_likelihood, abs=10 * keyed.standard_error + 1e-4)


# ------------------------------------------------------------------------------------ masked diffusion: the bound


def order_nlls(model, context, continuation) -> np.ndarray:
    """Return the negative log of the chain rule in every order of the continuation, [n!]."""
    n = len(continuation)
    nlls = {s: masked_nll(model, context, continuation, s) for k in range(1, n + 1) for s in combinations(range(n), k)}
    return np.array(
        [sum(nlls[tuple(sorted(order[i:]))][order[i]] for i in range(n)) for order in permutations(range(n))]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_short_answers_are_exact(model, sequences, size):
    context, continuation = text(11, 6), text(12 + size, size)
    (score,) = scored(model, [Request(context, continuation)], only_mc_nll=True)
    orders = order_nlls(model, context, continuation)
    assert score.log_likelihood == pytest.approx(-orders.mean(), abs=1e-5)
    assert score.standard_error == 0 and score.samples == len(sequences) == 2**size - 1
    # Jensen: the exact value for the mean over orders of the products is at most the bound, and equal for one token
    assert score.upper_bound == (size > 1)
    assert -np.log(np.exp(-orders).mean()) <= orders.mean() + 1e-9


def test_the_estimate_is_unbiased_and_its_error_honest(model):
    context, continuation = text(21, 5), text(22, 8)
    design = exhaustive_design(8)
    means = [np.mean([*masked_nll(model, context, continuation, mask.nonzero()[0]).values()]) for mask in design.masked]
    exact, errors = design.weights @ np.array(means), {}
    for num_mc in (5, 17, 65):
        repeated = [Request(context, continuation, f"draw {number}") for number in range(250)]
        scores = scored(model, repeated, num_mc=num_mc, only_mc_nll=True)
        nats = np.array([-score.log_likelihood for score in scores])
        errors[num_mc] = nats.std(ddof=1)
        assert abs(nats.mean() - exact) < 4 * errors[num_mc] / np.sqrt(250)
        reported = np.sqrt(np.mean([score.standard_error**2 for score in scores]))
        assert reported == pytest.approx(errors[num_mc], rel=0.2)
        assert {score.samples for score in scores} == {num_mc}
    assert errors[65] < errors[17] * np.sqrt(16 / 64) * 1.15 and errors[17] < errors[5] * np.sqrt(4 / 16) * 1.15


@pytest.mark.parametrize("n, rows", [(2, 1), (4, 2), (5, 4), (9, 1), (9, 3), (9, 8), (9, 11), (64, 7), (500, 9)])
def test_designs_are_unbiased_in_every_level(n, rows):
    shifts = (np.arange(500) + 0.5) / 500
    level_weights = np.zeros(n)
    for shift in shifts:
        design = balanced_design(n, rows, shift, np.arange(n))
        sizes = design.masked.sum(1)
        assert sizes.min() >= 1 and sizes.max() < n and len(sizes) == rows
        np.add.at(level_weights, sizes, design.weights)
    np.testing.assert_allclose(level_weights[1:] / len(shifts), 1, atol=0.05 * max(1, n / 50))
    # all tokens count about equally
    design = balanced_design(n, max(rows, 8), 0.3, np.random.default_rng(0).permutation(n))
    share = (design.weights / design.masked.sum(1)) @ design.masked
    assert (
        share.sum() == pytest.approx(n - 1)
        and share.max() - share.min() <= (design.weights / design.masked.sum(1)).max()
    )


def test_the_published_estimator_has_many_times_the_variance(model):
    for size, ratio in ((1, 100), (4, 20), (16, 5)):
        context, continuation = text(31, 6), text(32, size)
        draws = [published(model, context, continuation, 32, seed) for seed in range(60)]
        repeated = [Request(context, continuation, f"draw {number}") for number in range(60)]
        ours = [-score.log_likelihood for score in scored(model, repeated, only_mc_nll=True)]
        assert np.mean(draws) == pytest.approx(np.mean(ours), abs=5 * np.std(draws) / np.sqrt(60))
        assert np.var(draws) > ratio * np.var(ours)


def published(model, context, continuation, rows, seed) -> float:
    """Return the published estimate: mask_prob (u + k / K) mod 1, tokens masked independently, NLL / mask_prob."""
    draw, n = np.random.default_rng(seed), len(continuation)
    mask_probs = (draw.random() + np.arange(rows) / rows) % 1
    masked = draw.random((rows, n)) < mask_probs[:, None]
    tokens = np.tile(np.array([*context, *continuation]), (rows, 1))
    tokens[:, len(context) :][masked] = VOCABULARY.mask_id
    with torch.no_grad():
        logs = model.logits(torch.from_numpy(tokens), causal=False).double().log_softmax(-1)[:, len(context) :]
    nll = -logs[:, range(n), continuation].numpy()
    return float((nll * masked / mask_probs[:, None]).sum() / rows)


def test_rivals_share_their_masks(model, sequences):
    context = text(41, 5)
    choices = [Request(context, text(seed, 9), "q") for seed in (42, 43)] + [Request(context, text(44, 10), "q")]
    scored(model, choices, num_mc=61, only_mc_nll=True, decide_at=0.0)
    ids = [sequence.tokens[5:] for sequence in sequences]
    masks = [[tokens == VOCABULARY.mask_id for tokens in ids if len(tokens) == n] for n in (9, 10)]
    first, second = np.split(np.array(masks[0])[2:], 2)
    assert np.array_equal(first, second)
    # the longer choice has the same draws: rows with as many masked tokens have mostly the same masks
    longer = np.array(masks[1])[1:, :9]
    assert np.mean(longer == first) > 0.6 > np.mean(longer == first[::-1]) + 0.05


def test_a_difference_of_rivals_has_less_noise(model):
    context, answer = text(51, 6), text(52, 10)
    other = [*answer[:-1], (answer[-1] + 1) % EOD]
    requests = [Request(context, choice, f"q{number}") for number in range(100) for choice in (answer, other)]
    nats = np.array([score.log_likelihood for score in scored(model, requests, decide_at=0.0, only_mc_nll=True)])
    first, second = nats.reshape(100, 2).T
    assert np.var(first - second) < 0.5 * (np.var(first) + np.var(second))


def test_samples_are_spent_where_the_best_is_not_known(model):
    context = text(61, 6)
    likely = greedy_masked(model, context, 8)
    choices = [Request(context, likely, "choices")] + [Request(context, text(seed, 8), "choices") for seed in (62, 63)]
    single = [Request(context, text(67, 8), "single")]
    scores = scored(model, [*choices, *single], num_mc=128, only_mc_nll=True)
    samples = [score.samples for score in scores]
    assert max(samples[:3]) < 128 and samples[3] > 120
    all_spent = scored(model, choices, num_mc=128, decide_at=0.0, only_mc_nll=True)
    assert min(score.samples for score in all_spent) > 120
    best = np.argmax([score.log_likelihood for score in all_spent])
    assert np.argmax([score.log_likelihood for score in scores[:3]]) == best == 0


def test_stopping_favours_the_leader_by_less_than_its_error(model):
    """The bias of --decide-at in docs/scoring.md, where all masks of 8 tokens can be enumerated."""
    context, answers = text(64, 6), [text(seed, 8) for seed in (65, 66, 68)]
    requests = [Request(context, answer) for answer in answers]
    exact = [-score.log_likelihood for score in scored(model, requests, num_mc=255)]
    leader, repeats = int(np.argmin(exact)), 150
    for settings, max_bias in (({}, 0.6), ({"decide_at": 0.0}, 0.3)):
        repeated = [Request(context, answer, f"draw {number}") for number in range(repeats) for answer in answers]
        scores = scored(model, repeated, num_mc=64, only_mc_nll=True, **settings)
        nats = -np.array([score.log_likelihood for score in scores]).reshape(repeats, -1)[:, leader]
        reported = np.sqrt(np.mean([score.standard_error**2 for score in scores[leader :: len(answers)]]))
        assert abs(nats.mean() - exact[leader]) < max_bias * reported
        assert reported == pytest.approx(nats.std(ddof=1), rel=0.3)


def greedy_masked(model, context, size) -> list[int]:
    """Return the greedy continuation, the most confident token first, by one forward pass per token."""
    tokens, masked = [*context, *[VOCABULARY.mask_id] * size], set(range(size))
    while masked:
        logs = log_softmax(model, tokens, causal=False)
        index = max(masked, key=lambda index: logs[len(context) + index].max())
        tokens[len(context) + index] = int(logs[len(context) + index].argmax())
        masked.remove(index)
    return tokens[len(context) :]


@pytest.mark.parametrize("most", [5, 6, 9, 10, 12, 13, 17, 20, 21, 40])
def test_any_number_of_samples_is_a_limit(model, most):
    """The rounds of a document's choices end at it, also where the last round is small."""
    context = text(71, 6)
    choices = [Request(context, text(72 + size, size), "document") for size in (4, 7, 9, 12)]
    for settings in ({}, {"decide_at": 0.0}, {"decide_at": 1e9}):
        scores = scored(model, choices, num_mc=most, only_mc_nll=True, **settings)
        assert all(1 < score.samples <= most and np.isfinite(score.log_likelihood) for score in scores)
        assert settings == {} or all(score.samples > most - 4 or not score.standard_error for score in scores)


@pytest.mark.parametrize("settings", [{}, {"only_generate": True}])
def test_greedy_is_what_the_model_says_itself(model, settings):
    for seed, size in ((71, 1), (72, 2), (73, 6), (74, 12)):
        context = text(seed, 5)
        greedy = greedy_masked(model, context, size)
        other = [*greedy[:-1], (greedy[-1] + 1) % EOD]
        scores = scored(model, [Request(context, greedy), Request(context, other)], **settings)
        assert [score.is_greedy for score in scores] == [True, False]
        if settings:
            assert all(np.isnan(score.log_likelihood) for score in scores)  # not evaluated; 0 would look like a value


# ------------------------------------------------------------------------------------ masked diffusion: the chain rule


@pytest.mark.parametrize("order", ["left-to-right", "right-to-left", "random"])
def test_the_chain_rule_of_one_order(model, order):
    context, continuation = text(81, 4), text(82, 4)
    (score,) = scored(model, [Request(context, continuation)], likelihood="chain", chain_order=order)
    nats = order_nlls(model, context, continuation)
    expected = {"left-to-right": nats[:1], "right-to-left": nats[-1:], "random": nats}[order]
    assert np.abs(-score.log_likelihood - expected).min() < 1e-5
    assert score.samples == 4 and score.standard_error == 0 and not score.upper_bound


@pytest.mark.parametrize("size", [40, 500])
def test_the_chain_rule_never_sees_a_later_token(sequences, size):
    model = build(4, num_layers=1, hidden_size=4, num_attention_heads=1)
    context, continuation = text(83, 3), text(84, size)
    (score,) = scored(model, [Request(context, continuation)], seq_length=512, likelihood="chain")
    assert len(sequences) == score.samples == size
    for index, sequence in enumerate(sequences):
        assert sequence.positions.tolist() == [3 + index] and len(sequence.tokens) == 3 + size
        assert sequence.tokens[: 3 + index].tolist() == [*context, *continuation[:index]]
        assert (sequence.tokens[3 + index :] == VOCABULARY.mask_id).all()
    if size == 40:
        nats = [masked_nll(model, context, continuation, range(index, size))[index] for index in range(size)]
        assert score.log_likelihood == pytest.approx(-sum(nats), abs=1e-3)


def test_a_chain_is_greedy_where_every_token_is_the_first_choice(model):
    tokens, context = [*text(85, 4), *[VOCABULARY.mask_id] * 5], text(85, 4)
    for position in range(4, 9):
        tokens[position] = int(log_softmax(model, tokens, causal=False)[position].argmax())
    greedy = tokens[4:]
    requests = [Request(context, greedy), Request(context, [*greedy[:-1], (greedy[-1] + 1) % EOD])]
    assert [score.is_greedy for score in scored(model, requests, likelihood="chain")] == [True, False]


def test_guidance_moves_away_from_what_is_said_without_a_context(model):
    context, continuation = text(91, 5), [2]
    tokens = [*context, VOCABULARY.mask_id]
    with torch.no_grad():
        conditional = model.logits(torch.tensor([tokens]), False)[0, -1].double()
        unconditional = model.logits(torch.tensor([[VOCABULARY.mask_id] * 6]), False)[0, -1].double()
    guided = (1.7 * conditional - 0.7 * unconditional).log_softmax(-1)
    (score,) = scored(model, [Request(context, continuation)], cfg=0.7)
    assert score.log_likelihood == pytest.approx(float(guided[2]), abs=1e-4)
    plain, zero = (scored(model, [Request(context, continuation)], **settings)[0] for settings in ({}, {"cfg": 0.0}))
    assert plain == zero and plain.log_likelihood != pytest.approx(score.log_likelihood, abs=1e-3)


# ------------------------------------------------------------------------------------ faults of the published scorers


def test_a_score_depends_on_its_request_alone(model):
    requests = [Request(text(seed, 3 + seed % 4), text(seed + 50, 1 + seed % 9), f"q{seed}") for seed in range(12)]
    together = scored(model, requests)
    reversed_ = scored(model, requests[::-1], batch_tokens=37)[::-1]
    for expected, other, request in zip(together, reversed_, requests, strict=True):
        (alone,) = scored(model, [request])
        for result in (other, alone):
            assert result.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert (result.samples, result.is_greedy) == (expected.samples, expected.is_greedy)
    assert scored(model, requests, eval_seed=1)[8].log_likelihood != together[8].log_likelihood


def test_nothing_stands_behind_an_answer_and_one_token_costs_one_row(model, sequences):
    scored(model, [Request(text(1, 6), [3]), Request(text(2, 4), text(3, 9))], num_mc=9)
    assert sum(len(sequence.tokens) == 7 for sequence in sequences) == 1
    for sequence in sequences:
        context = 6 if len(sequence.tokens) == 7 else 4
        assert len(sequence.tokens) in (7, 13) and not (sequence.tokens[:context] == VOCABULARY.mask_id).any()


def test_a_long_context_is_cut_on_the_left(model, sequences):
    context, continuation = text(5, 60), text(6, 4)
    (score,) = scored(model, [Request(context, continuation)], num_mc=9)
    assert score.truncated_tokens == 60 - 20
    assert {len(sequence.tokens) for sequence in sequences} == {SEQ_LENGTH}
    assert all(sequence.tokens[:20].tolist() == context[-20:] for sequence in sequences)


def test_logits_are_made_where_something_is_asked(model, monkeypatch):
    sizes = []
    plain = Transformer.head
    monkeypatch.setattr(Transformer, "head", lambda self, hidden: sizes.append(len(hidden)) or plain(self, hidden))
    scored(model, [Request(text(1, 15), text(2, 2))], only_mc_nll=True)
    assert sum(sizes) == 2 + 1 + 1
    sizes.clear()
    scored(model, [Request(text(1, 15), text(size, size)) for size in (2, 3)], "ar")
    assert sum(sizes) == 2 + 3


def test_batches_hold_what_they_may():
    lengths = [3, 9, 1, 9, 4, 30]
    for limits in (Limits(18), Limits(18, 1), Limits(1000, 4), Limits(1)):
        chunks = list(batches(lengths, limits))
        assert sorted(index for batch in chunks for index in batch) == list(range(6))
        for batch in chunks:
            longest = max(lengths[index] for index in batch)
            assert len(batch) == 1 or longest * len(batch) <= limits.tokens
            assert len(batch) <= (limits.sequences or 6)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "objective, settings, message",
    [
        ("ar", {"cfg": 0.5}, "--cfg 0.5: acts in masked diffusion, and this run was trained with --objective ar"),
        (
            "dual",
            {"num_mc": 64},
            "--num-mc 64: has no effect on the likelihood from left to right; leave it out, or give --likelihood",
        ),
        ("mdm", {"likelihood": "chain", "num_mc": 64}, "--num-mc 64: has no effect with --likelihood chain"),
        ("mdm", {"likelihood": "iwae", "decide_at": 0.0}, "--decide-at 0.0: has no effect with --likelihood iwae"),
        ("mdm", {"chain_order": "random"}, "--chain-order random: does nothing without --likelihood chain; give both"),
        ("mdm", {"num_orders": 4}, "--num-orders 4: does nothing without --likelihood iwae; give both or neither"),
        ("mdm", {"likelihood": "iwae", "num_orders": 1}, "--num-orders 1: must be at least 2"),
        ("mdm", {"likelihood": "chain", "tokens_per_step": 0}, "--tokens-per-step 0: must be at least 1"),
        ("mdm", {"likelihood": "chain", "block_length": 0}, "--block-length 0: must be at least 1"),
        (
            "mdm",
            {"likelihood": "chain", "tokens_per_step": 24},
            "--tokens-per-step 24: is more than the 23 tokens of the longest continuation; give fewer",
        ),
        ("ar", {"likelihood": "chain"}, "--likelihood chain: acts in masked diffusion, and this run was trained with"),
        (
            "block-diffusion",
            {"likelihood": "chain", "tokens_per_step": 17},
            "--tokens-per-step 17: is more than the 16 tokens of a block (--diffusion-block-size); give fewer",
        ),
        (
            "block-diffusion",
            {"likelihood": "chain", "block_length": 4},
            "--block-length 4: has no effect on a model that has blocks of its own; leave it out",
        ),
        ("block-diffusion", {"cfg": 1.0}, "--cfg 1.0: masks the context, which block diffusion reads unmasked"),
        ("any-order", {"eval_seed": 3}, "--eval-seed 3: has no effect on the likelihood from left to right; leave it"),
        (
            "any-order",
            {"likelihood": "bound", "cfg": 1.0},
            "--cfg 1.0: acts in masked diffusion, and this model predic",
        ),
        (
            "any-order",
            {"likelihood": "chain", "tokens_per_step": 2},
            "--tokens-per-step 2: is not supported, this model predicts one token after another; leave it out",
        ),
        (
            "any-order",
            {"likelihood": "chain", "chain_order": "margin"},
            "--chain-order margin: needs a prediction for every remaining token at each step, and this model predicts",
        ),
        ("mdm", {"num_mc": 4}, "--num-mc 4: must be at least 5: the fully masked sequence, and 4 replicates"),
        ("mdm", {"only_mc_nll": True, "only_generate": True}, "--only_mc_nll and --only_generate: together leave"),
        ("mdm", {"likelihood": "order"}, "--likelihood order: is not one of bound, chain, iwae"),
        ("mdm", {"likelihood": "chain", "chain_order": "up"}, "--chain-order up: is not one of confidence, margin"),
    ],
)
def test_what_has_no_meaning_is_refused(model, objective, settings, message):
    with pytest.raises(ConfigurationError) as caught:
        scored(model, [Request([1], [2])], objective, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_models_of_separate_documents_have_not_read_behind_an_end(model):
    data = DataConfig(train_data_path=("x",), reset_attention_mask=True)
    score(model, "ar", [Request([1], [2])], Scoring(), eod=EOD, seq_length=SEQ_LENGTH, data=data)
    with pytest.raises(
        ConfigurationError, match="--reset-attention-mask: this model was not trained to predict a document after"
    ):
        score(model, "ar", [Request([], [2])], Scoring(), eod=EOD, seq_length=SEQ_LENGTH, data=data)
