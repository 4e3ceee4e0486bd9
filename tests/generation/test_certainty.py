"""Certainties and NLL from sums over blocks of the vocabulary, against the softmax over all of it."""

import pytest
import torch

from megatron.config.policies import CERTAINTIES
from megatron.generation import certainty as module
from megatron.generation.certainty import certainty, predictions
from tests.generation.test_generate import model


def reference(logits: torch.Tensor, order: str) -> torch.Tensor:
    probabilities = logits.double().softmax(-1)
    if order == "entropy":
        return torch.special.entr(probabilities).sum(-1).neg()
    first, second = probabilities.topk(2).values.unbind(1)
    return first if order == "confidence" else first - second


@pytest.mark.parametrize("order", CERTAINTIES)
@pytest.mark.parametrize("size", [2, 15, 16, 17, 100])
def test_certainty_of_any_size_with_ties_and_excluded_ids(size, order):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(-6, 7, (100, size), generator=generator) / 2
    logits[:20, 0] = float("-inf")
    copy = logits.clone()
    assert torch.allclose(certainty(logits, order).double(), reference(logits, order), atol=1e-6)
    assert torch.equal(logits, copy)


@pytest.mark.parametrize("order", [*CERTAINTIES, "random"])
@pytest.mark.parametrize("width", [1000, 333, 37])
@pytest.mark.parametrize("padded", [False, True])
def test_predictions_are_those_of_the_whole_vocabulary(monkeypatch, order, width, padded):
    """The NLL is of the model's softmax, and certainties are over the ids that generation chooses from."""
    monkeypatch.setattr(module, "CACHED_LOGITS", 50 * width)
    transformer = model(1000, init_method_std=0.3, softmax_over_padding=padded)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(50, transformer.config.hidden_size, generator=generator)
    targets = torch.randint(0, 1000, (50,), generator=generator)
    nll, certainties = predictions(transformer, states, targets, order)
    with torch.no_grad():
        logits = transformer.head(states)
        softmax_logits = (states @ transformer.lm_weight().T)[:, : 1024 if padded else 1000]
    expected = torch.nn.functional.cross_entropy(softmax_logits.double(), targets, reduction="none")
    assert torch.allclose(nll.double(), expected, rtol=1e-5, atol=1e-5)
    if order in CERTAINTIES:
        assert torch.allclose(certainties.double(), reference(logits, order), rtol=1e-5, atol=1e-5)
