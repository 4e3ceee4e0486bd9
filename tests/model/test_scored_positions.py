"""o_proj and the MLP of the last block at scored positions only: same results as at all positions, less work."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.config.sections import ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.linear_cross_entropy import CHUNK_ROWS
from megatron.model.scored_positions import Selection
from megatron.objectives.registry import build_objective
from tests.model.test_model import VOCABULARY, build

POSITIONS = 4 * 40

VARIANTS = [
    {},
    {"normalization": "layernorm", "swiglu": False, "add_bias_linear": True},
    {"qk_layernorm": True, "group_query_attention": True, "num_query_groups": 2},
]


def example(scored_share):
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY.size, (2, 4, 40), generator=generator)
    scored = torch.rand(4, 40, generator=generator) < scored_share
    weights = torch.where(scored, torch.rand(4, 40, generator=generator) + 0.5, 0.0)
    return Batch(tokens, targets, weights, np.full(4, 40), causal=False)


def results(model, batch, selects):
    """Return loss, nll per position, gradients, and the number of positions the last block's MLP computed."""
    model.selects_scored_positions = selects
    computed = []
    last = model.layers[str(len(model.layers) - 1)]
    hook = last.mlp.register_forward_hook(lambda mlp, inputs, output: computed.append(output.shape[:-1].numel()))
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    count = sum(computed)
    nll = model(batch, per_position=True)
    hook.remove()
    return loss.detach(), nll, gradients, count


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("scored_share", [0.1, 0.5, 0.8])
def test_selected_positions_give_the_same_loss_and_gradients(options, scored_share):
    model, batch = build(**options, init_method_std=0.2).double(), example(scored_share)
    expected_loss, expected_nll, expected_gradients, full_count = results(model, batch, selects=False)
    loss, nll, gradients, count = results(model, batch, selects=True)
    scored = len(batch.scored_positions)
    assert full_count == POSITIONS and scored <= count < min(POSITIONS, scored + 32)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-6)
    assert (nll.flatten()[batch.scored_positions] > 0).all() and not nll[batch.weights == 0].any()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-6, atol=1e-9, msg=name)


def test_residual_scales_go_with_their_sequences():
    model, batch = build(init_method_std=0.2), example(0.5)
    batch = replace(batch, residual_scales=torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 3.0], [1.0, 1.0]]))
    _, expected_nll, _, full_count = results(model, batch, selects=False)
    _, nll, _, count = results(model, batch, selects=True)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-6)
    assert count < full_count


def test_nothing_scored_is_a_loss_of_zero_and_no_gradient():
    model, batch = build(), example(0.0)
    loss, nll, gradients, count = results(model, batch, selects=True)
    assert loss.item() == 0 and not nll.any() and count == 32
    assert not any(gradient.any() for gradient in gradients.values())


def test_causal_batches_select_nothing():
    """Otherwise the last, short step of a run would compile another graph."""
    batch = replace(example(0.5), causal=True)
    assert results(build(), batch, selects=True)[3] == POSITIONS


def test_a_chunk_of_the_head_on_cuda_holds_what_masked_diffusion_scores():
    """Of 8 x 2048 positions half are scored; another chunk of 1,024 for a few more costs half a percent of a step."""
    objective = build_objective(ObjectiveConfig(objective="mdm"), Vocabulary(1000), 64)
    ids = np.zeros((8, 2049), np.int64)
    scored = [len(objective.prepare(ids, range(start, start + 8), 1).scored_positions) for start in range(0, 512, 8)]
    assert np.mean(np.array(scored) > 8192) > 0.4 and np.mean(np.array(scored) > CHUNK_ROWS["cuda"]) < 0.05


def test_where_almost_all_positions_are_scored_none_is_selected():
    assert Selection.of(torch.arange(128), POSITIONS).size == 32
    assert Selection.of(torch.arange(129), POSITIONS) is None
    model, batch = build(), example(1.0)
    assert results(model, batch, selects=True)[3] == POSITIONS
