"""The last block finishes the scored positions only: the same numbers as finishing all of them, with less work."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.model.scored_positions import Selection
from tests.model.test_model import VOCABULARY, build

POSITIONS = 4 * 40

VARIANTS = [
    {},
    {"normalization": "layernorm", "swiglu": False, "add_bias_linear": True},
    {"qk_layernorm": True, "group_query_attention": True, "num_query_groups": 2},
]


def example(share):
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY.size, (2, 4, 40), generator=generator)
    scored = torch.rand(4, 40, generator=generator) < share
    weights = torch.where(scored, torch.rand(4, 40, generator=generator) + 0.5, 0.0)
    return Batch(tokens, targets, weights, np.full(4, 40), causal=False)


def results(model, batch, early):
    """Return loss, nll by position, gradients, and how many positions the last block finished."""
    model.selects_scored_positions, finished = early, []
    last = model.layers[str(len(model.layers) - 1)]
    hook = last.mlp.register_forward_hook(lambda mlp, inputs, output: finished.append(output.shape[:-1].numel()))
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    count = sum(finished)
    nll = model(batch, per_position=True)
    hook.remove()
    return loss.detach(), nll, gradients, count


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_selected_positions_give_the_same_loss_and_gradients(options, share):
    model, batch = build(**options, init_method_std=0.2).double(), example(share)
    late, early = results(model, batch, False), results(model, batch, True)
    assert late[3] == POSITIONS and len(batch.scored_positions) <= early[3] < min(
        POSITIONS, len(batch.scored_positions) + 32
    )
    for ours, expected in zip(early[:2], late[:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (early[1].flatten()[batch.scored_positions] > 0).all() and not early[1][batch.weights == 0].any()
    for name, gradient in early[2].items():
        torch.testing.assert_close(gradient, late[2][name], rtol=1e-6, atol=1e-9, msg=name)


def test_branches_go_with_their_sequences():
    model, batch = build(init_method_std=0.2), example(0.5)
    batch = replace(batch, residual_scales=torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 3.0], [1.0, 1.0]]))
    late, early = results(model, batch, False), results(model, batch, True)
    torch.testing.assert_close(early[1], late[1], rtol=1e-5, atol=1e-6)
    assert early[3] < late[3]


def test_nothing_scored_is_a_loss_of_zero_and_no_gradient():
    model, batch = build(), example(0.0)
    loss, nll, gradients, count = results(model, batch, True)
    assert loss.item() == 0 and not nll.any() and count == 32
    assert not any(gradient.any() for gradient in gradients.values())


def test_where_almost_all_positions_are_scored_none_is_selected():
    assert Selection.of(torch.arange(128), POSITIONS).size == 32
    assert Selection.of(torch.arange(129), POSITIONS) is None
    model, batch = build(), example(1.0)
    assert results(model, batch, True)[3] == POSITIONS
