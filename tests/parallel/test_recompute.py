"""Activation checkpointing: recomputed blocks have the dropout masks of the forward pass."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel import recompute as recomputation
from megatron.parallel.recompute import recompute

DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.2, "mlp_dropout": 0.3, "embedding_dropout": 0.1}


@torch.library.custom_op("tests::drawing_attention", mutates_args=())
def drawing_attention(value: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for attention on CUDA, which draws its dropout mask inside one operator: return values and mask."""
    mask = (torch.rand_like(value) >= dropout) / (1 - dropout)
    return value * mask, mask


torch.library.register_autograd(
    "tests::drawing_attention",
    lambda ctx, grad, _: (grad * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)
OPERATOR = torch.ops.tests.drawing_attention.default


def gradients(granularity: str | None, blocks: int | None = None) -> torch.Tensor:
    """Return all gradients of one pass with every kind of dropout, from one RNG state."""
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, **DROPOUT)
    model = Transformer(config, Vocabulary(61))
    initialise(model, config, 1)
    recompute(model, ParallelConfig(recompute_granularity=granularity, recompute_num_layers=blocks))
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    model(Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16), np.full(2, 16), True)).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def let_attention_draw(monkeypatch) -> None:
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, dropout_p, **_: drawing_attention(q + k + v, dropout_p)[0]
    )
    monkeypatch.setattr(recomputation, "ATTENTION", {OPERATOR})


@pytest.fixture(params=[False, True], ids=["the CPU's attention", "attention that draws"])
def attention(request, monkeypatch):
    if request.param:
        let_attention_draw(monkeypatch)


@pytest.mark.parametrize("granularity, blocks", [("full", None), ("full", 1), ("selective", None)])
def test_gradients_are_those_without_recomputation(attention, granularity, blocks):
    assert torch.equal(gradients(granularity, blocks), gradients(None))


def test_a_planted_stored_attention_is_detected(monkeypatch):
    let_attention_draw(monkeypatch)
    monkeypatch.setattr(recomputation, "PRODUCTS", recomputation.PRODUCTS | {OPERATOR})
    assert not torch.allclose(gradients("selective"), gradients(None), rtol=0.01)


def test_a_planted_rng_that_is_not_restored_is_detected(attention, monkeypatch):
    without_rng_state = partial(recomputation.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(recomputation, "checkpoint", without_rng_state)
    for granularity in ("full", "selective"):
        assert not torch.allclose(gradients(granularity), gradients(None), rtol=0.01)
