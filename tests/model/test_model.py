"""The transformer: losses, initial weights, dropout, variants, compilation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.batch import Batch
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.norm import normalisation
from megatron.model.transformer import Transformer

VOCABULARY = Vocabulary(97)
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def build(seed=1, **options):
    config = ModelConfig(**SMALL | options)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed)
    return model


def example(causal=True, scored_share=0.5, position_ids=None):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY.size, (3, 10), generator=generator)
    targets = torch.randint(VOCABULARY.size, (3, 10), generator=generator)
    scored = torch.rand(3, 10, generator=generator) < scored_share
    weights = torch.where(scored, torch.rand(3, 10, generator=generator) + 0.5, 0.0)
    return Batch(tokens, targets, weights, np.full(3, 10), causal, position_ids)


def plain_loss(model, batch, label_smoothing=0.0, z_loss=0.0):
    logits = model.logits(batch.tokens, batch.causal, batch.position_ids)
    if model.config.softmax_over_padding:
        logits = F.linear(model.hidden_states(batch), model.lm_weight())
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), **options).view_as(batch.targets)
    return loss + z_loss * logits.logsumexp(-1).square()


TERMS = {"label_smoothing": 0.2, "z_loss": 0.05}


@pytest.mark.parametrize("terms", [{}, TERMS], ids=["nll", "terms"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_loss_and_gradients_equal_full_logits(untied, causal, padded, terms):
    options = {"untie_embeddings_and_output_weights": untied, "softmax_over_padding": padded}
    model, batch = build(**options, **terms, init_method_std=0.2), example(causal)
    loss = model(batch)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = (plain_loss(model, batch, **terms) * batch.weights).sum()[None]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)


def test_terms_of_the_loss_act_in_training_only():
    model, plain, batch = build(**TERMS), build(), example()
    assert model(batch) > plain(batch)
    for mode in (model.train(), model.eval()):
        assert torch.equal(mode(batch, per_position=True), plain(batch, per_position=True))
    assert torch.equal(model.eval()(batch), plain.eval()(batch))


def test_nothing_scored_trains_nothing():
    model = build()
    loss = model(example(scored_share=0.0))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_per_position_is_the_unweighted_nll():
    model, batch = build(), example()
    nll = model(batch, per_position=True)
    assert nll.shape == batch.tokens.shape and not nll.requires_grad
    expected = torch.where(batch.weights > 0, plain_loss(model, batch), 0.0)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("untied", [False, True])
def test_a_zero_head_scores_log_of_the_tokenizers_vocabulary(untied):
    model, batch = build(untie_embeddings_and_output_weights=untied), example(scored_share=1.1)
    model.lm_weight().data.zero_()
    nll = model(batch, per_position=True)
    assert (nll - math.log(VOCABULARY.size)).abs().max() < 1e-6
    assert abs(model(batch).item() / batch.weights.sum().item() - math.log(VOCABULARY.size)) < 1e-6


def test_a_zero_head_scores_log_of_the_padded_vocabulary_with_softmax_over_padding():
    model, batch = build(softmax_over_padding=True, untie_embeddings_and_output_weights=True), example(scored_share=1.0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    nll = model(batch, per_position=True)
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(VOCABULARY.padded_size)))
    # scoring and generation are always over the tokenizer's ids
    assert model.logits(batch.tokens, True).shape[-1] == VOCABULARY.size


def test_causal_attention_never_sees_the_future_and_bidirectional_does():
    model, tokens = build(init_method_std=0.2), example().tokens
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY.size
    with torch.no_grad():
        assert torch.equal(model.logits(tokens, True)[:, :-1], model.logits(changed, True)[:, :-1])
        assert not torch.allclose(model.logits(tokens, False)[:, :-1], model.logits(changed, False)[:, :-1])


def test_positions_default_to_a_count_and_only_differences_matter():
    model, tokens = build(init_method_std=0.2), example().tokens
    position_ids = torch.arange(10).expand(3, 10)
    with torch.no_grad():
        plain = model.logits(tokens, False)
        torch.testing.assert_close(model.logits(tokens, False, position_ids), plain)
        torch.testing.assert_close(model.logits(tokens, False, position_ids + 7), plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.logits(tokens, False, position_ids * 2), plain, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "layernorm", "swiglu": False, "add_bias_linear": True},
        {"group_query_attention": True, "num_query_groups": 2, "kv_channels": 6, "qk_layernorm": True},
        {"normalization": "layernorm", "qk_layernorm": True, "ffn_hidden_size": 48},
    ],
)
def test_variants_train_every_parameter(options):
    model = build(**options)
    model(example()).backward()
    untrained = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not untrained
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters()) == ("add_bias_linear" in options)


def test_initial_weights_depend_on_seed_and_name_only():
    shallow = dict(build().named_parameters())
    deep = dict(build(num_layers=3).named_parameters())
    other_seed = dict(build(seed=2).named_parameters())
    for name, parameter in shallow.items():
        depth_scale = math.sqrt(3 / 2) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(parameter, deep[name] * depth_scale)
    query = "layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(shallow[query], shallow["layers.1.self_attn.q_proj.weight"])
    assert not torch.allclose(shallow[query], other_seed[query])


def test_initial_weights_have_the_configured_std():
    model = build(hidden_size=128, init_method_std=0.03, add_bias_linear=True)
    attention = model.layers["0"].self_attn
    assert attention.q_proj.weight.std().item() == pytest.approx(0.03, rel=0.03)
    assert attention.o_proj.weight.std().item() == pytest.approx(0.03 / 2, rel=0.03)
    assert model.layers["1"].mlp.down_proj.weight.std().item() == pytest.approx(0.03 / 2, rel=0.03)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.03, rel=0.03)
    assert attention.q_proj.bias.abs().max() == 0 and (model.norm.weight == 1).all()


@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout", "mlp_dropout", "embedding_dropout"])
def test_dropouts_act_in_training_only(name):
    torch.manual_seed(0)
    model, plain, tokens = build(**{name: 0.5}), build(), example().tokens
    with torch.no_grad():
        assert not torch.equal(model.logits(tokens, True), model.logits(tokens, True))
        assert torch.equal(model.eval().logits(tokens, True), plain.eval().logits(tokens, True))


@pytest.mark.parametrize("normalization", ["rmsnorm", "layernorm"])
def test_norms_compute_in_fp32(normalization):
    layer = normalisation(ModelConfig(**SMALL, normalization=normalization), 4096)
    hidden = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) * 30 + 5).bfloat16()
    assert torch.equal(layer.bfloat16()(hidden), layer.float()(hidden.float()).bfloat16())


def test_bfloat16_model_trains():
    model = build().bfloat16()
    loss = model(example())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_blocks_compile_as_one_graph():
    model, batch = build(), example()
    expected = model(batch)
    for block in model.layers.values():
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
