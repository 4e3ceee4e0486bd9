"""Masked-diffusion generation: samples of the any-order model; schedules, blocks, remasking, gaps."""

import itertools
from collections import Counter

import pytest
import torch

from megatron.errors import ConfigurationError
from megatron.generation.certainty import certainty
from megatron.generation.diffusion import Filling, fill
from megatron.generation.generate import generate, infill
from megatron.generation.sampling import ORDERS, Sampling, draw_keys
from tests.frequencies import chi_square
from tests.generation.test_generate import EOD, NEVER, PROMPTS, SIZE, model

MASK = SIZE


class Steps:
    """An `on_step` that collects the states of each text."""

    def __init__(self, texts):
        self.states = {row: [] for row in range(len(texts))}

    def __call__(self, step, rows, tokens):
        for row, text in zip(rows, tokens.tolist(), strict=True):
            assert len(self.states[row]) == step - 1
            self.states[row].append(text)


def filled(transformer, texts, sampling, batch_size=8):
    """Return the filled texts, in which any token may occur, and the state of each text after each step."""
    steps = Steps(texts)
    settings = {"batch_size": batch_size, "eod": NEVER, "open_end": True, "on_step": steps}
    outputs = fill(transformer, texts, draw_keys(texts), sampling, **settings)
    return outputs, steps.states


# ------------------------------------------------------------------------------ the distribution of texts


@torch.no_grad()
def any_order_distribution(transformer, text: list[int]) -> dict:
    """Return the probability of every filling of the gaps: the mean, over all orders, of the chain rule."""
    size = transformer.vocabulary.size
    gaps = [position for position, token in enumerate(text) if token == size]
    distribution = {}
    for tokens in itertools.product(range(size), repeat=len(gaps)):
        probabilities = []
        for order in itertools.permutations(range(len(gaps))):
            state, probability = list(text), 1.0
            for turn in order:
                logits = transformer.logits(torch.tensor([state]), causal=False)[0, gaps[turn]]
                probability *= float(logits.double().softmax(-1)[tokens[turn]])
                state[gaps[turn]] = tokens[turn]
            probabilities.append(probability)
        distribution[tokens] = sum(probabilities) / len(probabilities)
    return distribution


@pytest.fixture(scope="module")
def tiny():
    """A model of three tokens, a text with three gaps, and the distribution of its fillings."""
    transformer, text = model(3, init_method_std=0.6), [1, 3, 3, 0, 3]
    return transformer, text, any_order_distribution(transformer, text)


def frequencies(transformer, text, count: int, **settings) -> Counter:
    sampling = Sampling(**{"temperature": 1.0, "order": "random", "seed": 6, **settings})
    outputs, _ = filled(transformer, [text] * count, sampling, batch_size=count)
    return Counter(tuple(output[position] for position, token in enumerate(text) if token == 3) for output in outputs)


def test_one_place_a_step_draws_from_the_any_order_model(tiny):
    transformer, text, expected = tiny
    assert chi_square(frequencies(transformer, text, 6000), expected, 6000) > 1e-3


@pytest.mark.parametrize("settings", [{"steps": 1}, {"temperature": 0.7}, {"order": "confidence"}], ids=str)
def test_other_ways_draw_from_something_else(tiny, settings):
    transformer, text, expected = tiny
    assert chi_square(frequencies(transformer, text, 6000, **settings), expected, 6000) < 1e-6


def test_one_step_draws_each_place_by_itself(tiny):
    transformer, text, _ = tiny
    with torch.no_grad():
        alone = transformer.logits(torch.tensor([text]), causal=False)[0, [1, 2, 4]].double().softmax(-1)
    expected = {
        tokens: float(alone[0, tokens[0]] * alone[1, tokens[1]] * alone[2, tokens[2]])
        for tokens in itertools.product(range(3), repeat=3)
    }
    assert chi_square(frequencies(transformer, text, 6000, steps=1), expected, 6000) > 1e-3


# ------------------------------------------------------------------------------ positions and schedule


@torch.no_grad()
def by_hand(transformer, prompt: list[int], length: int, steps: int, block: int, order: str) -> list[int]:
    """Return a greedy filling by plain loops over positions."""
    state, num_filled = list(prompt) + [MASK] * length, 0
    for step in range(steps):
        probabilities = transformer.logits(torch.tensor([state]), causal=False)[0].double().softmax(-1)
        ranking = []
        for position in range(len(prompt), len(state)):
            if state[position] == MASK:
                ordered = sorted(probabilities[position].tolist(), reverse=True)
                score = {
                    "confidence": ordered[0],
                    "margin": ordered[0] - ordered[1],
                    "entropy": sum(p * torch.tensor(p).log().item() for p in ordered if p > 0),
                }[order]
                ranking.append(((position - len(prompt)) // block, -score, position))
        target = length * (step + 1) // steps
        for _, _, position in sorted(ranking)[: target - num_filled]:
            state[position] = int(probabilities[position].argmax())
        num_filled = target
    return state[len(prompt) :]


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("steps, block", [(None, None), (5, None), (12, 4), (5, 4), (2, 3), (7, 5)], ids=str)
def test_greedy_fillings_equal_plain_loops(order, steps, block):
    transformer = model()
    sampling = Sampling(max_new_tokens=12, order=order, steps=steps, block_length=block)
    outputs = generate(transformer, "mdm", PROMPTS[:3], sampling, eod=NEVER)
    assert outputs == [by_hand(transformer, prompt, 12, steps or 12, block or 12, order) for prompt in PROMPTS[:3]]


def test_orders_differ_and_random_ones_with_the_seed():
    transformer, texts = model(), [[5, 3, *[MASK] * 24]]
    states_of = {order: filled(transformer, texts, Sampling(order=order))[1][0] for order in ORDERS}
    patterns = [tuple(tuple(token == MASK for token in state) for state in states) for states in states_of.values()]
    assert len(set(patterns)) == len(ORDERS)
    assert filled(transformer, texts, Sampling(order="random"))[1][0] == states_of["random"]
    assert filled(transformer, texts, Sampling(order="random", seed=1))[1][0] != states_of["random"]


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
    outputs, states_of = filled(model(), texts, sampling)
    for row, text in enumerate(texts):
        prompt_length = len(text) - length
        num_masked = [state.count(MASK) for state in states_of[row]]
        assert num_masked == [length - length * (step + 1) // steps for step in range(steps)] and num_masked[-1] == 0
        assert (
            all(state[:prompt_length] == text[:prompt_length] for state in states_of[row])
            and outputs[row] == states_of[row][-1]
        )
        if not remask:  # filled tokens stay
            for before, after in itertools.pairwise([text, *states_of[row]]):
                assert all(token in (MASK, new) for token, new in zip(before, after))


@pytest.mark.parametrize("block, steps", [(4, 12), (4, 3), (5, 6), (1, 12), (3, 5)])
def test_blocks_are_filled_from_left_to_right(block, steps):
    texts = [[*prompt, *[MASK] * 12] for prompt in PROMPTS]
    sampling = Sampling(steps=steps, block_length=block, order="random")
    for row, states in filled(model(), texts, sampling)[1].items():
        for state in states:
            masked_blocks = [
                position // block for position, token in enumerate(state[len(PROMPTS[row]) :]) if token == MASK
            ]
            filled_blocks = [
                position // block for position, token in enumerate(state[len(PROMPTS[row]) :]) if token != MASK
            ]
            assert not masked_blocks or max(filled_blocks) <= min(masked_blocks)


def test_tokens_are_hidden_again_as_often_as_asked():
    transformer, length, steps, probability = model(5), 16, 16, 0.2
    texts = [[1, *[5] * length]] * 400
    outputs, states_of = filled(
        transformer, texts, Sampling(order="random", temperature=1.0, remask=probability), batch_size=400
    )
    for step in range(steps):
        before = [[1, *[5] * length]] * 400 if step == 0 else [states_of[row][step - 1] for row in range(400)]
        num_remasked = [sum(a != 5 and b == 5 for a, b in zip(x, states_of[row][step])) for row, x in enumerate(before)]
        room = length - step - 1
        assert max(num_remasked) <= room
        if step and step * probability < room / 3:  # where the cap is far
            mean, error = sum(num_remasked) / 400, (step * probability * (1 - probability) / 400) ** 0.5
            assert abs(mean - step * probability) < 4 * error
    assert not any(5 in text for text in outputs)


def test_more_steps_than_tokens_go_with_hiding_again():
    texts = [[1, *[MASK] * 6]]
    outputs, states_of = filled(model(), texts, Sampling(steps=20, remask=0.3, temperature=1.0))
    assert MASK not in outputs[0] and len(states_of[0]) == 20
    assert any(
        before != after and before.count(MASK) == after.count(MASK)
        for before, after in itertools.pairwise(states_of[0])
    )


# ------------------------------------------------------------------------------ inputs of the model


def test_hidden_tokens_are_masks_to_the_model_and_no_filler_is_read(monkeypatch):
    transformer, batches = model(), []
    plain = transformer.hidden_states
    monkeypatch.setattr(transformer, "hidden_states", lambda batch: batches.append(batch) or plain(batch))
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    outputs = generate(transformer, "mdm", PROMPTS, sampling, eod=NEVER, batch_size=2)
    texts = {(*prompt, *text) for prompt, text in zip(PROMPTS, outputs, strict=True)}
    for batch in batches:
        assert not batch.causal and batch.visible() is None
        for tokens in batch.tokens.tolist():
            equally_long = [text for text in texts if len(text) == len(tokens)]
            assert any(all(a in (MASK, b) for a, b in zip(tokens, text)) for text in equally_long)
    # prompts of four lengths; two of the same length share a batch
    assert len(batches) == 4 * 6 and sorted({len(batch.tokens) for batch in batches}) == [1, 2]


@pytest.mark.parametrize("settings", [{}, {"steps": 4}, {"block_length": 3}, {"order": "random"}], ids=str)
def test_texts_that_are_decided_are_read_no_more(monkeypatch, settings):
    transformer = model()
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 2, **settings})
    whole = generate(transformer, "mdm", PROMPTS, sampling, eod=NEVER)[2]
    end = whole[3]
    advances, batch_sizes, plain = [], [], transformer.hidden_states
    monkeypatch.setattr(
        transformer, "hidden_states", lambda batch: batch_sizes.append(len(batch.tokens)) or plain(batch)
    )
    outputs = generate(transformer, "mdm", PROMPTS, sampling, eod=end, advance=advances.append)
    num_rows = sum(batch_sizes)
    monkeypatch.setattr(Filling, "_drop_decided", lambda *_: None)
    assert generate(transformer, "mdm", PROMPTS, sampling, eod=end) == outputs
    assert sum(advances) == 12 * len(PROMPTS) and outputs[2] == whole[: whole.index(end)]
    assert num_rows < sum(batch_sizes) - num_rows or "steps" in settings  # few steps may all be needed


# -------------------------------------------------------------------------------------------- gaps


def test_gaps_are_filled_and_all_else_stays():
    transformer = model()
    texts = [[1, MASK, MASK, 2, MASK, 3], [MASK, 4], [5, *[MASK] * 7], [1, MASK, MASK, 2, MASK, 3]]
    sampling = Sampling(temperature=1.0)
    outputs = infill(transformer, "mdm", texts, sampling, eod=EOD, batch_size=1)
    for text, output in zip(texts, outputs, strict=True):
        assert len(output) == len(text) and all(before in (MASK, token) for before, token in zip(text, output))
        assert all(0 <= token < SIZE for token in output)
    assert outputs[0] != outputs[3] and infill(transformer, "mdm", texts, sampling, eod=EOD, batch_size=4) == outputs


def test_a_gap_is_filled_by_what_stands_on_both_sides():
    transformer = model()
    left = [infill(transformer, "mdm", [[a, MASK, MASK, MASK, 7]], Sampling(), eod=EOD)[0][1:4] for a in range(10)]
    right = [infill(transformer, "mdm", [[7, MASK, MASK, MASK, b]], Sampling(), eod=EOD)[0][1:4] for b in range(10)]
    assert len(set(map(tuple, left))) > 3 and len(set(map(tuple, right))) > 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(order="margin", steps=2)])
def test_no_document_ends_in_a_gap(sampling):
    transformer = model()
    text = [1, MASK, MASK, MASK, 2, MASK]
    end = infill(transformer, "mdm", [text], sampling, eod=EOD)[0][2]
    output = infill(transformer, "mdm", [text], sampling, eod=end)[0]
    assert end not in [token for token, before in zip(output, text) if before == MASK]


def test_gaps_that_cannot_be_filled_are_refused():
    transformer = model()
    for texts, settings, message in (
        ([[1, 2]], {}, "--infill: a text has no gap; write one as {{8}}"),
        ([[1, MASK, *[2] * 9]], {}, "--infill: a text has 11 tokens, gaps included, and this model was trained on 10"),
        ([[MASK] * 5, [MASK]], {"steps": 3}, "--steps 3: is more than the 1 tokens of the gaps"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            infill(transformer, "mdm", texts, Sampling(**settings), eod=EOD, seq_length=10)
        assert str(caught.value).startswith(message)
    assert infill(transformer, "mdm", [[MASK]], Sampling(steps=3, remask=0.1), eod=EOD, seq_length=10)
