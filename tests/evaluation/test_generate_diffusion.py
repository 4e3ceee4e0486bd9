"""Filling in: texts are distributed as the any-order model says; schedules, blocks, hiding again, gaps."""

import itertools
from collections import Counter

import pytest
import torch

from megatron.errors import ConfigurationError
from megatron.evaluation.generate import generate, infill
from megatron.evaluation.generate_diffusion import _Filling, certainty, fill
from megatron.evaluation.sampling import ORDERS, Sampling, keys
from tests.evaluation.test_generate import EOD, NEVER, PROMPTS, SIZE, model
from tests.frequencies import chi_square

MASK = SIZE


class Steps:
    """What `on_step` is told, one text apart from another."""

    def __init__(self, texts):
        self.seen = {row: [] for row in range(len(texts))}

    def __call__(self, step, rows, tokens):
        for row, text in zip(rows, tokens.tolist(), strict=True):
            assert len(self.seen[row]) == step - 1
            self.seen[row].append(text)


def filled(network, texts, sampling, batch_size=8):
    """Return the filled texts, in which any token may stand, and each after each step."""
    steps = Steps(texts)
    made = fill(network, texts, sampling, batch_size, keys(texts), NEVER, True, on_step=steps)
    return made, steps.seen


# ----------------------------------------------------------------------------------- what is drawn


@torch.no_grad()
def any_order_distribution(network, text: list[int]) -> dict:
    """Return the probability of every filling of three gaps: the mean, over all orders, of the chain rule."""
    size = network.vocabulary.size
    gaps = [place for place, token in enumerate(text) if token == size]
    found = {}
    for tokens in itertools.product(range(size), repeat=len(gaps)):
        chances = []
        for order in itertools.permutations(range(len(gaps))):
            state, chance = list(text), 1.0
            for turn in order:
                logits = network.logits(torch.tensor([state]), causal=False)[0, gaps[turn]]
                chance *= float(logits.double().softmax(-1)[tokens[turn]])
                state[gaps[turn]] = tokens[turn]
            chances.append(chance)
        found[tokens] = sum(chances) / len(chances)
    return found


@pytest.fixture(scope="module")
def tiny():
    """A model of three tokens, a text with three gaps, and how its fillings are distributed."""
    network, text = model(3, init_method_std=0.6), [1, 3, 3, 0, 3]
    return network, text, any_order_distribution(network, text)


def frequencies(network, text, count: int, **settings) -> Counter:
    sampling = Sampling(**{"temperature": 1.0, "order": "random", "seed": 6, **settings})
    made, _ = filled(network, [text] * count, sampling, batch_size=count)
    return Counter(tuple(new[place] for place, token in enumerate(text) if token == 3) for new in made)


def test_one_place_a_step_draws_from_the_any_order_model(tiny):
    network, text, expected = tiny
    assert chi_square(frequencies(network, text, 6000), expected, 6000) > 1e-3


@pytest.mark.parametrize("settings", [{"steps": 1}, {"temperature": 0.7}, {"order": "confidence"}], ids=str)
def test_other_ways_draw_from_something_else(tiny, settings):
    network, text, expected = tiny
    assert chi_square(frequencies(network, text, 6000, **settings), expected, 6000) < 1e-6


def test_one_step_draws_each_place_by_itself(tiny):
    network, text, _ = tiny
    with torch.no_grad():
        alone = network.logits(torch.tensor([text]), causal=False)[0, [1, 2, 4]].double().softmax(-1)
    expected = {
        tokens: float(alone[0, tokens[0]] * alone[1, tokens[1]] * alone[2, tokens[2]])
        for tokens in itertools.product(range(3), repeat=3)
    }
    assert chi_square(frequencies(network, text, 6000, steps=1), expected, 6000) > 1e-3


# ------------------------------------------------------------------------------ which places, when


@torch.no_grad()
def by_hand(network, prompt: list[int], length: int, steps: int, block: int, order: str) -> list[int]:
    """Return a greedy filling, worked out place by place with plain loops."""
    state, done = list(prompt) + [MASK] * length, 0
    for step in range(steps):
        probabilities = network.logits(torch.tensor([state]), causal=False)[0].double().softmax(-1)
        ranked = []
        for place in range(len(prompt), len(state)):
            if state[place] == MASK:
                chances = sorted(probabilities[place].tolist(), reverse=True)
                sure = {
                    "confidence": chances[0],
                    "margin": chances[0] - chances[1],
                    "entropy": sum(p * torch.tensor(p).log().item() for p in chances if p > 0),
                }[order]
                ranked.append(((place - len(prompt)) // block, -sure, place))
        target = length * (step + 1) // steps
        for _, _, place in sorted(ranked)[: target - done]:
            state[place] = int(probabilities[place].argmax())
        done = target
    return state[len(prompt) :]


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("steps, block", [(None, None), (5, None), (12, 4), (5, 4), (2, 3), (7, 5)], ids=str)
def test_greedy_fillings_equal_plain_loops(order, steps, block):
    network = model()
    sampling = Sampling(max_new_tokens=12, order=order, steps=steps, block_length=block)
    found = generate(network, "mdm", PROMPTS[:3], sampling, eod=NEVER)
    assert found == [by_hand(network, prompt, 12, steps or 12, block or 12, order) for prompt in PROMPTS[:3]]


def test_orders_differ_and_random_ones_with_the_seed():
    network, texts = model(), [[5, 3, *[MASK] * 24]]
    found = {order: filled(network, texts, Sampling(order=order))[1][0] for order in ORDERS}
    places = [tuple(tuple(token == MASK for token in state) for state in states) for states in found.values()]
    assert len(set(places)) == len(ORDERS)
    assert filled(network, texts, Sampling(order="random"))[1][0] == found["random"]
    assert filled(network, texts, Sampling(order="random", seed=1))[1][0] != found["random"]


def test_certainty():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    assert certainty(logits, "confidence").tolist() == pytest.approx([0.7, 0.5, 1.0])
    assert certainty(logits, "margin").tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert certainty(logits, "entropy").tolist() == pytest.approx([-0.80182, -0.69315, 0.0], abs=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", [0.0, 0.4])
@pytest.mark.parametrize("length, steps", [(12, 12), (12, 5), (12, 1), (7, 3), (5, 5), (1, 1)])
def test_steps_fill_evenly_and_exactly(length, steps, order, remask):
    texts = [[*prompt, *[MASK] * length] for prompt in PROMPTS]
    sampling = Sampling(steps=steps, order=order, temperature=1.0, remask=remask)
    made, seen = filled(model(), texts, sampling)
    for row, text in enumerate(texts):
        known = len(text) - length
        hidden = [state.count(MASK) for state in seen[row]]
        assert hidden == [length - length * (step + 1) // steps for step in range(steps)] and hidden[-1] == 0
        assert all(state[:known] == text[:known] for state in seen[row]) and made[row] == seen[row][-1]
        if not remask:  # what is there stays
            for before, after in itertools.pairwise([text, *seen[row]]):
                assert all(token in (MASK, new) for token, new in zip(before, after))


@pytest.mark.parametrize("block, steps", [(4, 12), (4, 3), (5, 6), (1, 12), (3, 5)])
def test_blocks_are_filled_from_left_to_right(block, steps):
    texts = [[*prompt, *[MASK] * 12] for prompt in PROMPTS]
    sampling = Sampling(steps=steps, block_length=block, order="random")
    for row, states in filled(model(), texts, sampling)[1].items():
        for state in states:
            hidden = [place // block for place, token in enumerate(state[len(PROMPTS[row]) :]) if token == MASK]
            there = [place // block for place, token in enumerate(state[len(PROMPTS[row]) :]) if token != MASK]
            assert not hidden or max(there) <= min(hidden)


def test_tokens_are_hidden_again_as_often_as_asked():
    network, length, steps, share = model(5), 16, 16, 0.2
    texts = [[1, *[5] * length]] * 400
    made, seen = filled(network, texts, Sampling(order="random", temperature=1.0, remask=share), batch_size=400)
    for step in range(steps):
        before = [[1, *[5] * length]] * 400 if step == 0 else [seen[row][step - 1] for row in range(400)]
        lost = [sum(a != 5 and b == 5 for a, b in zip(x, seen[row][step])) for row, x in enumerate(before)]
        room = length - step - 1
        assert max(lost) <= room
        if step and step * share < room / 3:  # where the limit of what fits is far
            mean, error = sum(lost) / 400, (step * share * (1 - share) / 400) ** 0.5
            assert abs(mean - step * share) < 4 * error
    assert not any(5 in text for text in made)


def test_more_steps_than_tokens_go_with_hiding_again():
    texts = [[1, *[MASK] * 6]]
    made, seen = filled(model(), texts, Sampling(steps=20, remask=0.3, temperature=1.0))
    assert MASK not in made[0] and len(seen[0]) == 20
    assert any(
        before != after and before.count(MASK) == after.count(MASK) for before, after in itertools.pairwise(seen[0])
    )


# -------------------------------------------------------------------------------------- what is read


def test_hidden_tokens_are_masks_to_the_model_and_no_filler_is_read(monkeypatch):
    network, read = model(), []
    plain = network.hidden_states
    monkeypatch.setattr(network, "hidden_states", lambda batch: read.append(batch) or plain(batch))
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    found = generate(network, "mdm", PROMPTS, sampling, eod=NEVER, batch_size=2)
    whole = {(*prompt, *text) for prompt, text in zip(PROMPTS, found, strict=True)}
    for batch in read:
        assert not batch.causal and batch.visible() is None
        for tokens in batch.tokens.tolist():
            equally_long = [text for text in whole if len(text) == len(tokens)]
            assert any(all(a in (MASK, b) for a, b in zip(tokens, text)) for text in equally_long)
    # prompts of four lengths, of which the two of one length go together
    assert len(read) == 4 * 6 and sorted({len(batch.tokens) for batch in read}) == [1, 2]


@pytest.mark.parametrize("settings", [{}, {"steps": 4}, {"block_length": 3}, {"order": "random"}], ids=str)
def test_texts_that_are_decided_are_read_no_more(monkeypatch, settings):
    network = model()
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 2, **settings})
    whole = generate(network, "mdm", PROMPTS, sampling, eod=NEVER)[2]
    end = whole[3]
    told, read, plain = [], [], network.hidden_states
    monkeypatch.setattr(network, "hidden_states", lambda batch: read.append(len(batch.tokens)) or plain(batch))
    found = generate(network, "mdm", PROMPTS, sampling, end, advance=told.append)
    reads = sum(read)
    monkeypatch.setattr(_Filling, "_leave", lambda *_: None)
    assert generate(network, "mdm", PROMPTS, sampling, end) == found
    assert sum(told) == 12 * len(PROMPTS) and found[2] == whole[: whole.index(end)]
    assert reads < sum(read) - reads or "steps" in settings  # a few steps may all be needed


# -------------------------------------------------------------------------------------------- gaps


def test_gaps_are_filled_and_all_else_stays():
    network = model()
    texts = [[1, MASK, MASK, 2, MASK, 3], [MASK, 4], [5, *[MASK] * 7], [1, MASK, MASK, 2, MASK, 3]]
    sampling = Sampling(temperature=1.0)
    found = infill(network, "mdm", texts, sampling, EOD, batch_size=1)
    for text, new in zip(texts, found, strict=True):
        assert len(new) == len(text) and all(old in (MASK, token) for old, token in zip(text, new))
        assert all(0 <= token < SIZE for token in new)
    assert found[0] != found[3] and infill(network, "mdm", texts, sampling, EOD, batch_size=4) == found


def test_a_gap_is_filled_by_what_stands_on_both_sides():
    network = model()
    left = [infill(network, "mdm", [[a, MASK, MASK, MASK, 7]], Sampling(), EOD)[0][1:4] for a in range(10)]
    right = [infill(network, "mdm", [[7, MASK, MASK, MASK, b]], Sampling(), EOD)[0][1:4] for b in range(10)]
    assert len(set(map(tuple, left))) > 3 and len(set(map(tuple, right))) > 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(order="margin", steps=2)])
def test_no_document_ends_in_a_gap(sampling):
    network = model()
    text = [1, MASK, MASK, MASK, 2, MASK]
    end = infill(network, "mdm", [text], sampling, EOD)[0][2]
    found = infill(network, "mdm", [text], sampling, end)[0]
    assert end not in [token for token, old in zip(found, text) if old == MASK]


def test_gaps_that_cannot_be_filled_are_refused():
    network = model()
    for texts, settings, said in (
        ([[1, 2]], {}, "--infill: a text has no gap; write one as {{8}}"),
        ([[1, MASK, *[2] * 9]], {}, "--infill: a text has 11 tokens, gaps counted, and this model was trained on 10"),
        ([[MASK] * 5, [MASK]], {"steps": 3}, "--steps 3: is more than the 1 tokens of the gaps"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            infill(network, "mdm", texts, Sampling(**settings), EOD, seq_length=10)
        assert str(caught.value).startswith(said)
    assert infill(network, "mdm", [[MASK]], Sampling(steps=3, remask=0.1), EOD, seq_length=10)
