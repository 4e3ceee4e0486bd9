"""Likelihoods of continuations: against brute force, enumeration over all orders, and their own reported errors."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.config.sections import DataConfig, ModelConfig, Vocabulary
from megatron.errors import ConfigurationError
from megatron.evaluation import score_masked
from megatron.evaluation.batched_forward import Limits, batches
from megatron.evaluation.mask_designs import all_sets, balanced
from megatron.evaluation.requests import Request, Scoring
from megatron.evaluation.score import score, windows
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer

VOCABULARY, EOD, SEQ_LENGTH = Vocabulary(7), 6, 24


def made(seed: int, std: float = 0.6, **changes) -> Transformer:
    config = ModelConfig(
        **{"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2} | changes, init_method_std=std
    )
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made(3)


def text(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, EOD, size).tolist()


def scored(model, requests, objective="mdm", seq_length=SEQ_LENGTH, finished=lambda *_: None, **settings):
    return score(model, objective, requests, Scoring(**settings), EOD, seq_length, finished=finished)


@pytest.fixture
def rows(monkeypatch):
    """Every row that a masked-diffusion model is asked."""
    seen, plain = [], score_masked.ask
    monkeypatch.setattr(
        score_masked, "ask", lambda model, asked, *rest: seen.extend(asked) or plain(model, asked, *rest)
    )
    return seen


@torch.no_grad()
def log_softmax(model, tokens, causal: bool) -> np.ndarray:
    """Return log-probabilities [T, V] of a sequence, by a plain pass."""
    return model.logits(torch.tensor([tokens]), causal)[0].double().log_softmax(-1).numpy()


def hidden_nll(model, context, continuation, hidden) -> dict[int, float]:
    """Return the nll of each hidden place of the continuation, all of them hidden at once."""
    tokens = [*context, *continuation]
    for place in hidden:
        tokens[len(context) + place] = VOCABULARY.mask_id
    logs = log_softmax(model, tokens, causal=False)
    return {place: -logs[len(context) + place, continuation[place]] for place in hidden}


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
    found = scored(model, requests, "ar", **limits)
    for request, one in zip(requests, found, strict=True):
        nats, greedy = expected_causal(model, request)
        assert one.log_likelihood == pytest.approx(nats, abs=1e-4) and one.is_greedy == greedy
        assert one.standard_error == 0 and not one.upper_bound
    assert found[-1].is_greedy and found[-2].is_greedy


def test_a_shared_context_is_read_once(model):
    context, sizes = text(1, 12), (1, 3, 6)
    found = scored(model, [Request(context, text(size, size)) for size in sizes], "ar")
    assert sum(one.forward_tokens for one in found) == 12 + 2 + 5
    alone = scored(model, [Request(text(2, 12), text(3, 4))], "ar")
    assert alone[0].forward_tokens == 12 + 3


def test_equal_requests_are_scored_once_and_told_of_each(model):
    request, told = Request(text(1, 5), text(2, 3), "q"), []
    for objective in ("ar", "mdm", "dual"):
        told.clear()
        found = scored(
            model, [request, Request([], [1]), request], objective, finished=lambda index, _: told.append(index)
        )
        assert found[0] == found[2] and sorted(told) == [0, 1, 2]
    assert scored(model, [Request(text(1, 3), [])], "ar")[0].log_likelihood == 0


def test_windows_are_those_of_lm_eval():
    for size in (1, 2, 7, 8, 9, 15, 16, 17, 40):
        for longest in (2, 7, 8):
            tokens = list(range(size))
            theirs = get_rolling_token_windows(tokens, prefix_token=99, max_seq_len=longest, context_len=1)
            expected = [make_disjoint_window(pair) for pair in theirs]
            found = [(list(pair.context), list(pair.continuation)) for pair in windows((99,), tuple(tokens), longest)]
            assert found == expected


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_long_text_is_the_sum_of_its_windows(model, objective):
    tokens, longest = text(4, 30), 8 - (objective == "mdm")
    found = scored(model, [Request([], tokens)], objective, seq_length=8)[0]
    assert found.truncated_tokens == 0
    parts = [
        scored(model, [Request(pair.context, pair.continuation, "x" if number == 0 else f"x/{number}")], objective, 8)[
            0
        ]
        for number, pair in enumerate(windows((EOD,), tuple(tokens), longest))
    ]
    named = scored(model, [Request([], tokens, "x")], objective, seq_length=8)[0]
    assert named.log_likelihood == pytest.approx(sum(part.log_likelihood for part in parts), abs=1e-4)
    assert named.standard_error == pytest.approx(np.sqrt(sum(part.standard_error**2 for part in parts)), abs=1e-5)
    assert found.log_likelihood == pytest.approx(named.log_likelihood, abs=10 * named.standard_error + 1e-4)


# ------------------------------------------------------------------------------------ masked diffusion: the bound


def order_nlls(model, context, continuation) -> np.ndarray:
    """Return the negative log of the chain rule in every order of the continuation, [n!]."""
    n = len(continuation)
    known = {s: hidden_nll(model, context, continuation, s) for k in range(1, n + 1) for s in combinations(range(n), k)}
    return np.array(
        [sum(known[tuple(sorted(order[i:]))][order[i]] for i in range(n)) for order in permutations(range(n))]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_short_answers_are_exact(model, rows, size):
    context, continuation = text(11, 6), text(12 + size, size)
    (found,) = scored(model, [Request(context, continuation)], only_mc_nll=True)
    orders = order_nlls(model, context, continuation)
    assert found.log_likelihood == pytest.approx(-orders.mean(), abs=1e-5)
    assert found.standard_error == 0 and found.samples == len(rows) == 2**size - 1
    # the mean over orders of the products is no more than the bound says (Jensen), and is it for one token
    assert found.upper_bound == (size > 1)
    assert -np.log(np.exp(-orders).mean()) <= orders.mean() + 1e-9


def test_the_estimate_is_unbiased_and_its_error_honest(model):
    context, continuation = text(21, 5), text(22, 8)
    design = all_sets(8)
    means = [np.mean([*hidden_nll(model, context, continuation, mask.nonzero()[0]).values()]) for mask in design.hidden]
    exact, errors = design.weights @ np.array(means), {}
    for num_mc in (5, 17, 65):
        repeated = [Request(context, continuation, f"draw {number}") for number in range(250)]
        found = scored(model, repeated, num_mc=num_mc, only_mc_nll=True)
        nats = np.array([-one.log_likelihood for one in found])
        errors[num_mc] = nats.std(ddof=1)
        assert abs(nats.mean() - exact) < 4 * errors[num_mc] / np.sqrt(250)
        reported = np.sqrt(np.mean([one.standard_error**2 for one in found]))
        assert reported == pytest.approx(errors[num_mc], rel=0.2)
        assert {one.samples for one in found} == {num_mc}
    assert errors[65] < errors[17] * np.sqrt(16 / 64) * 1.15 and errors[17] < errors[5] * np.sqrt(4 / 16) * 1.15


@pytest.mark.parametrize("n, rows", [(2, 1), (4, 2), (5, 4), (9, 1), (9, 3), (9, 8), (9, 11), (64, 7), (500, 9)])
def test_designs_are_unbiased_in_every_level(n, rows):
    shifts = (np.arange(500) + 0.5) / 500
    counted = np.zeros(n)
    for shift in shifts:
        design = balanced(n, rows, shift, np.arange(n))
        sizes = design.hidden.sum(1)
        assert sizes.min() >= 1 and sizes.max() < n and len(sizes) == rows
        np.add.at(counted, sizes, design.weights)
    np.testing.assert_allclose(counted[1:] / len(shifts), 1, atol=0.05 * max(1, n / 50))
    # each token counts about as much as any other, whatever the plan
    design = balanced(n, max(rows, 8), 0.3, np.random.default_rng(0).permutation(n))
    share = (design.weights / design.hidden.sum(1)) @ design.hidden
    assert (
        share.sum() == pytest.approx(n - 1)
        and share.max() - share.min() <= (design.weights / design.hidden.sum(1)).max()
    )


def test_the_published_estimator_has_many_times_the_variance(model):
    for size, times in ((1, 100), (4, 20), (16, 5)):
        context, continuation = text(31, 6), text(32, size)
        draws = [published(model, context, continuation, 32, seed) for seed in range(60)]
        repeated = [Request(context, continuation, f"draw {number}") for number in range(60)]
        ours = [-one.log_likelihood for one in scored(model, repeated, only_mc_nll=True)]
        assert np.mean(draws) == pytest.approx(np.mean(ours), abs=5 * np.std(draws) / np.sqrt(60))
        assert np.var(draws) > times * np.var(ours)


def published(model, context, continuation, rows, seed) -> float:
    """Return the published estimate: shares (u + k / K) mod 1, each token hidden independently, nll over the share."""
    draw, n = np.random.default_rng(seed), len(continuation)
    shares = (draw.random() + np.arange(rows) / rows) % 1
    hidden = draw.random((rows, n)) < shares[:, None]
    tokens = np.tile(np.array([*context, *continuation]), (rows, 1))
    tokens[:, len(context) :][hidden] = VOCABULARY.mask_id
    with torch.no_grad():
        logs = model.logits(torch.from_numpy(tokens), causal=False).double().log_softmax(-1)[:, len(context) :]
    nll = -logs[:, range(n), continuation].numpy()
    return float((nll * hidden / shares[:, None]).sum() / rows)


def test_rivals_share_their_masks(model, rows):
    context = text(41, 5)
    rivals = [Request(context, text(seed, 9), "q") for seed in (42, 43)] + [Request(context, text(44, 10), "q")]
    scored(model, rivals, num_mc=61, only_mc_nll=True, decide_at=0.0)
    found = [[row.tokens[5:] == VOCABULARY.mask_id for row in rows if len(row.tokens) == 5 + n] for n in (9, 10)]
    one, other = np.split(np.array(found[0])[2:], 2)
    assert np.array_equal(one, other)
    # a longer one has the same draws: where its rows hide as many tokens, they are mostly the same
    longer = np.array(found[1])[1:, :9]
    assert np.mean(longer == one) > 0.6 > np.mean(longer == one[::-1]) + 0.05


def test_a_difference_of_rivals_has_less_noise(model):
    context, one = text(51, 6), text(52, 10)
    other = [*one[:-1], (one[-1] + 1) % EOD]
    pairs = [Request(context, answer, f"q{number}") for number in range(100) for answer in (one, other)]
    nats = np.array([found.log_likelihood for found in scored(model, pairs, decide_at=0.0, only_mc_nll=True)])
    first, second = nats.reshape(100, 2).T
    assert np.var(first - second) < 0.5 * (np.var(first) + np.var(second))


def test_samples_are_spent_where_the_best_is_not_known(model):
    context = text(61, 6)
    likely = greedy_masked(model, context, 8)
    clear = [Request(context, likely, "clear")] + [Request(context, text(seed, 8), "clear") for seed in (62, 63)]
    lone = [Request(context, text(67, 8), "lone")]
    found = scored(model, [*clear, *lone], num_mc=128, only_mc_nll=True)
    spent = [one.samples for one in found]
    assert max(spent[:3]) < 128 and spent[3] > 120
    all_spent = scored(model, clear, num_mc=128, decide_at=0.0, only_mc_nll=True)
    assert min(one.samples for one in all_spent) > 120
    best = np.argmax([one.log_likelihood for one in all_spent])
    assert np.argmax([one.log_likelihood for one in found[:3]]) == best == 0


def test_stopping_favours_the_leader_by_less_than_its_error(model):
    """What docs/scoring.md says of --decide-at, where all hidden sets of 8 tokens can be listed."""
    context, answers = text(64, 6), [text(seed, 8) for seed in (65, 66, 68)]
    exact = [-one.log_likelihood for one in scored(model, [Request(context, each) for each in answers], num_mc=255)]
    leader, repeats = int(np.argmin(exact)), 150
    for settings, most in (({}, 0.6), ({"decide_at": 0.0}, 0.3)):
        asked = [Request(context, each, f"draw {number}") for number in range(repeats) for each in answers]
        found = scored(model, asked, num_mc=64, only_mc_nll=True, **settings)
        nats = -np.array([one.log_likelihood for one in found]).reshape(repeats, -1)[:, leader]
        reported = np.sqrt(np.mean([one.standard_error**2 for one in found[leader :: len(answers)]]))
        assert abs(nats.mean() - exact[leader]) < most * reported
        assert reported == pytest.approx(nats.std(ddof=1), rel=0.3)


def greedy_masked(model, context, size) -> list[int]:
    """Return what a model says, the surest token first, by plain passes."""
    tokens, hidden = [*context, *[VOCABULARY.mask_id] * size], set(range(size))
    while hidden:
        logs = log_softmax(model, tokens, causal=False)
        place = max(hidden, key=lambda place: logs[len(context) + place].max())
        tokens[len(context) + place] = int(logs[len(context) + place].argmax())
        hidden.remove(place)
    return tokens[len(context) :]


@pytest.mark.parametrize("most", [5, 6, 9, 10, 12, 13, 17, 20, 21, 40])
def test_any_number_of_samples_is_a_limit(model, most):
    """The rounds of rivals end at it, also where little of it is left for the last."""
    context = text(71, 6)
    asked = [Request(context, text(72 + size, size), "rivals") for size in (4, 7, 9, 12)]
    for settings in ({}, {"decide_at": 0.0}, {"decide_at": 1e9}):
        found = scored(model, asked, num_mc=most, only_mc_nll=True, **settings)
        assert all(1 < one.samples <= most and np.isfinite(one.log_likelihood) for one in found)
        assert settings == {} or all(one.samples > most - 4 or not one.standard_error for one in found)


@pytest.mark.parametrize("settings", [{}, {"only_generate": True}])
def test_greedy_is_what_the_model_says_itself(model, settings):
    for seed, size in ((71, 1), (72, 2), (73, 6), (74, 12)):
        context = text(seed, 5)
        own = greedy_masked(model, context, size)
        other = [*own[:-1], (own[-1] + 1) % EOD]
        found = scored(model, [Request(context, own), Request(context, other)], **settings)
        assert [one.is_greedy for one in found] == [True, False]
        if settings:
            assert all(np.isnan(one.log_likelihood) for one in found)  # not evaluated, which 0 would hide


# ------------------------------------------------------------------------------------ masked diffusion: the chain rule


@pytest.mark.parametrize("order", ["left-to-right", "right-to-left", "random"])
def test_the_chain_rule_of_one_order(model, order):
    context, continuation = text(81, 4), text(82, 4)
    (found,) = scored(model, [Request(context, continuation)], method="chain", chain_order=order)
    nats = order_nlls(model, context, continuation)
    expected = {"left-to-right": nats[:1], "right-to-left": nats[-1:], "random": nats}[order]
    assert np.abs(-found.log_likelihood - expected).min() < 1e-5
    assert found.samples == 4 and found.standard_error == 0 and not found.upper_bound


@pytest.mark.parametrize("size", [40, 500])
def test_the_chain_rule_never_sees_a_later_token(rows, size):
    model = made(4, num_layers=1, hidden_size=4, num_attention_heads=1)
    context, continuation = text(83, 3), text(84, size)
    (found,) = scored(model, [Request(context, continuation)], seq_length=512, method="chain")
    assert len(rows) == found.samples == size
    for place, row in enumerate(rows):
        assert row.places.tolist() == [3 + place] and len(row.tokens) == 3 + size
        assert row.tokens[: 3 + place].tolist() == [*context, *continuation[:place]]
        assert (row.tokens[3 + place :] == VOCABULARY.mask_id).all()
    if size == 40:
        nats = [hidden_nll(model, context, continuation, range(place, size))[place] for place in range(size)]
        assert found.log_likelihood == pytest.approx(-sum(nats), abs=1e-3)


def test_a_chain_is_greedy_where_every_token_is_the_first_choice(model):
    tokens, context = [*text(85, 4), *[VOCABULARY.mask_id] * 5], text(85, 4)
    for place in range(4, 9):
        tokens[place] = int(log_softmax(model, tokens, causal=False)[place].argmax())
    own = tokens[4:]
    pair = [Request(context, own), Request(context, [*own[:-1], (own[-1] + 1) % EOD])]
    assert [one.is_greedy for one in scored(model, pair, method="chain")] == [True, False]


def test_guidance_moves_away_from_what_is_said_without_a_context(model):
    context, continuation = text(91, 5), [2]
    tokens = [*context, VOCABULARY.mask_id]
    with torch.no_grad():
        with_context = model.logits(torch.tensor([tokens]), False)[0, -1].double()
        without = model.logits(torch.tensor([[VOCABULARY.mask_id] * 6]), False)[0, -1].double()
    guided = (1.7 * with_context - 0.7 * without).log_softmax(-1)
    (found,) = scored(model, [Request(context, continuation)], cfg=0.7)
    assert found.log_likelihood == pytest.approx(float(guided[2]), abs=1e-4)
    plain, zero = (scored(model, [Request(context, continuation)], **given)[0] for given in ({}, {"cfg": 0.0}))
    assert plain == zero and plain.log_likelihood != pytest.approx(found.log_likelihood, abs=1e-3)


# ------------------------------------------------------------------------------------ faults of the published scorers


def test_a_score_depends_on_its_request_alone(model):
    requests = [Request(text(seed, 3 + seed % 4), text(seed + 50, 1 + seed % 9), f"q{seed}") for seed in range(12)]
    together = scored(model, requests)
    reversed_ = scored(model, requests[::-1], batch_tokens=37)[::-1]
    for one, other, request in zip(together, reversed_, requests, strict=True):
        (alone,) = scored(model, [request])
        for found in (other, alone):
            assert found.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-4)
            assert (found.samples, found.is_greedy) == (one.samples, one.is_greedy)
    assert scored(model, requests, eval_seed=1)[8].log_likelihood != together[8].log_likelihood


def test_nothing_stands_behind_an_answer_and_one_token_costs_one_row(model, rows):
    scored(model, [Request(text(1, 6), [3]), Request(text(2, 4), text(3, 9))], num_mc=9)
    assert sum(len(row.tokens) == 7 for row in rows) == 1
    for row in rows:
        context = 6 if len(row.tokens) == 7 else 4
        assert len(row.tokens) in (7, 13) and not (row.tokens[:context] == VOCABULARY.mask_id).any()


def test_a_long_context_is_cut_on_the_left(model, rows):
    context, continuation = text(5, 60), text(6, 4)
    (found,) = scored(model, [Request(context, continuation)], num_mc=9)
    assert found.truncated_tokens == 60 - 20
    assert {len(row.tokens) for row in rows} == {SEQ_LENGTH}
    assert all(row.tokens[:20].tolist() == context[-20:] for row in rows)


def test_logits_are_made_where_something_is_asked(model, monkeypatch):
    seen = []
    plain = Transformer.head
    monkeypatch.setattr(Transformer, "head", lambda self, hidden: seen.append(len(hidden)) or plain(self, hidden))
    scored(model, [Request(text(1, 15), text(2, 2))], only_mc_nll=True)
    assert sum(seen) == 2 + 1 + 1
    seen.clear()
    scored(model, [Request(text(1, 15), text(size, size)) for size in (2, 3)], "ar")
    assert sum(seen) == 2 + 3


def test_batches_hold_what_they_may():
    lengths = [3, 9, 1, 9, 4, 30]
    for limits in (Limits(18), Limits(18, 1), Limits(1000, 4), Limits(1)):
        found = list(batches(lengths, limits))
        assert sorted(index for batch in found for index in batch) == list(range(6))
        for batch in found:
            longest = max(lengths[index] for index in batch)
            assert len(batch) == 1 or longest * len(batch) <= limits.tokens
            assert len(batch) <= (limits.rows or 6)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "objective, settings, said",
    [
        ("any-order", {}, "--objective any-order: such a model is told the place of each token it must say"),
        ("block-diffusion", {}, "--objective block-diffusion: such a model reads a text twice"),
        ("ar", {"cfg": 0.5}, "--cfg 0.5: acts in masked diffusion, and this run was trained with --objective ar"),
        (
            "dual",
            {"num_mc": 64},
            "--num-mc 64: acts in masked diffusion, and this run was trained with --objective dual",
        ),
        ("mdm", {"method": "chain", "num_mc": 64}, "--num-mc 64: has no effect beside --method chain"),
        ("mdm", {"chain_order": "random"}, "--chain-order random: has no effect beside --method bound"),
        ("mdm", {"num_mc": 4}, "--num-mc 4: must be at least 5: a row that hides all, and 4 replicates"),
        ("mdm", {"only_mc_nll": True, "only_generate": True}, "--only_mc_nll and --only_generate: together leave"),
        ("mdm", {"method": "order"}, "--method order: is not one of bound, chain"),
    ],
)
def test_what_has_no_meaning_is_refused(model, objective, settings, said):
    with pytest.raises(ConfigurationError) as caught:
        scored(model, [Request([1], [2])], objective, **settings)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_models_of_separate_documents_have_not_read_behind_an_end(model):
    data = DataConfig(train_data_path=("x",), reset_attention_mask=True)
    score(model, "ar", [Request([1], [2])], Scoring(), EOD, SEQ_LENGTH, data)
    with pytest.raises(ConfigurationError, match="--reset-attention-mask: this model has never read on behind the end"):
        score(model, "ar", [Request([], [2])], Scoring(), EOD, SEQ_LENGTH, data)
