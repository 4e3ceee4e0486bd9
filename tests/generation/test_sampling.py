"""Tokens are sampled from the distribution of transformers' filters; settings without effect are refused."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron.errors import ConfigurationError
from megatron.generation.sampling import Sampling, choose, draw_keys, probabilities

SMALLEST, LARGEST = 0.0, 1 - 2**-53  # uniform numbers in [0, 1)


def logits(*shape):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "temperature, top_k, top_p", list(itertools.product((0.3, 1.0, 2.0), (0, 1, 7, 100), (1.0, 0.9, 0.4, 1e-6)))
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    inputs = logits(16, 40)
    inputs[3, 10:20] = inputs[3, 5]  # ties
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = warpers(None, inputs.double()).softmax(-1)
    probs = probabilities(inputs, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    sizes = probs.count_nonzero(-1)
    assert torch.equal(sizes, expected.count_nonzero(-1))
    # the sort decides which of several equally probable tokens top-p keeps
    rows = [row for row in range(16) if row != 3]
    torch.testing.assert_close(probs[rows], expected[rows])
    torch.testing.assert_close(probs[3].sort().values, expected[3].sort().values)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.5}], ids=str)
def test_draws_follow_the_probabilities(settings):
    sampling = Sampling(**{"temperature": 1.0, **settings})
    (inputs,), count = logits(1, 12), 20000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(inputs.expand(count, -1), sampling, uniforms)
    frequencies = torch.bincount(tokens, minlength=12) / count
    torch.testing.assert_close(frequencies.double(), probabilities(inputs[None], sampling)[0], rtol=0, atol=2 / count)


def test_a_token_that_is_filtered_out_is_never_drawn():
    inputs = logits(64, 40)
    for uniform in (SMALLEST, LARGEST, 1.0):  # 1 by rounding
        sampling = Sampling(temperature=1.0, top_k=3, top_p=0.99)
        tokens = choose(inputs, sampling, torch.full((64,), uniform, dtype=torch.float64))
        assert (probabilities(inputs, sampling).gather(1, tokens[:, None]) > 0).all()


def test_without_a_temperature_the_most_probable_token_is_taken():
    inputs = logits(8, 40)
    assert torch.equal(choose(inputs, Sampling(), torch.rand(8)), inputs.argmax(-1))
    assert torch.equal(choose(inputs, Sampling(temperature=1.0, top_k=1), torch.rand(8)), inputs.argmax(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    inputs = logits(8, 40)
    inputs[3, 7] = value
    with pytest.raises(ConfigurationError, match="are not finite"):
        choose(inputs, Sampling(temperature=temperature), torch.rand(8))


def test_draws_are_keyed_by_the_prompt():
    keys = draw_keys([[1, 2], [3], [1, 2], [], [1, 2]])
    assert len(set(keys)) == 5 and [copy for _, copy in keys] == [0, 0, 1, 0, 2]
    assert len({key for key, _ in keys}) == 3 and all(0 <= key < 2**64 for key, _ in keys)
    assert draw_keys([[3], [1, 2]]) == [keys[1], keys[0]]
    assert draw_keys([[1], [0, 1], [1, 0]]) != draw_keys([[1], [1, 0], [0, 1]])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"),
        ({"temperature": -1.0}, "--temperature -1.0: must not be negative"),
        ({"top_k": -1}, "--top-k -1: must not be negative"),
        ({"top_p": 0.0}, "--top-p 0.0: is a probability above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p 1.5: is a probability"),
        ({"seed": -1}, "--seed -1: lies in [0, 2**64)"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"block_length": 0}, "--block-length 0: must be at least 1"),
        ({"order": "best"}, "--order best: is not one of confidence, margin, entropy, random"),
        ({"remask": 1.0}, "--remask 1.0: is a probability below 1"),
        ({"top_k": 4}, "--top-k 4: has no effect on greedy decoding (--temperature 0)"),
        ({"top_p": 0.9}, "--top-p 0.9: has no effect on greedy decoding"),
        ({"remask": 0.1, "block_length": 4}, "--remask 0.1 --block-length 4: a block is finished before"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigurationError) as caught:
        Sampling(**settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
