"""muP and CompleteP: the factors of the papers' tables, the forward pass by folded weights, the coordinate check."""

import numpy as np
import pytest
import torch

from megatron.config.parametrization import Parametrization, standard_settings
from megatron.config.sections import ModelConfig, OptimizerConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer
from megatron.training.command_line import parse_with
from megatron.training.coordinate_check import ACTIVATIONS
from megatron.training.optimizer import parameter_groups
from tests.distributed import joined
from tools import coordinate_check

VOCABULARY = Vocabulary(97)
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "add_bias_linear": True}
SCALED = SMALL | {"hidden_size": 128, "num_layers": 6, "num_attention_heads": 4}
BASE = {"base_hidden_size": 32, "base_kv_channels": 8}
MUP, COMPLETEP = {"parametrization": "mup"}, {"parametrization": "completep", "base_num_layers": 2}


def build(settings, **changes):
    config = ModelConfig(**settings | changes)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=1)
    return model


def groups(model, **optimizer):
    """Return learning rate, weight decay and epsilon of every parameter by its name."""
    config = OptimizerConfig(lr=1.0, weight_decay=1.0, adam_eps=1.0, weight_decay_parameters="all", **optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"], group["eps"])
        for group in parameter_groups(model, config, Parametrization.of(model.config))
        for parameter in group["params"]
    }


@pytest.mark.parametrize("parametrization", [MUP, COMPLETEP], ids=lambda settings: settings["parametrization"])
def test_the_base_model_is_the_standard_one(parametrization):
    standard, same = build(SMALL), build(SMALL, **BASE, **parametrization)
    for expected, parameter in zip(standard.parameters(), same.parameters(), strict=True):
        assert torch.equal(expected, parameter)
    assert groups(same) == groups(standard)
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(same.logits(tokens, causal=True), standard.logits(tokens, causal=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["inverse-lr", "sqrt-width", "none"])
@pytest.mark.parametrize("depth", [1, 3])
def test_every_parameter_has_the_factors_of_the_table(depth, decay, optimizer):
    """m = 4 times the width, n times the depth: 2203.03466, table 8; 2505.01618, table 1; Muon's rate by m^-1/2."""
    parametrization = COMPLETEP if depth == 3 else MUP
    model = build(SCALED, **BASE, **parametrization, weight_decay_scaling=decay)
    for name, (rate, weight_decay, eps) in groups(model, optimizer=optimizer).items():
        in_block = name.startswith("layers.")
        if in_block and name.endswith("proj.weight"):
            assert rate == {"adamw": 1 / 4, "muon": 1 / 2}[optimizer]
            assert weight_decay == {"inverse-lr": 1 / rate, "sqrt-width": 2, "none": 1}[decay]
        else:
            assert (rate, weight_decay) == (1, 1)
        assert eps == (1 / (4 * depth) if in_block else 1 / 4)


def test_initial_weights_shrink_with_the_width_and_not_with_the_depth_beyond_the_base():
    standard, mup, completep = (build(SCALED, **settings) for settings in ({}, BASE | MUP, BASE | COMPLETEP))
    for name, expected in standard.named_parameters():
        ratio = 0.5 if name.startswith("layers.") and expected.dim() == 2 else 1.0  # 1 / sqrt(4)
        torch.testing.assert_close(mup.get_parameter(name), expected * ratio)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            ratio *= 3**0.5  # std / sqrt(2L) of the base model's 2 layers in activation of 6
        torch.testing.assert_close(completep.get_parameter(name), expected * ratio)


@torch.no_grad()
@pytest.mark.parametrize("parametrization", [MUP, COMPLETEP], ids=lambda settings: settings["parametrization"])
@pytest.mark.parametrize("untied", [False, True])
def test_the_forward_pass_is_that_of_folded_weights(untied, parametrization):
    """The residual multiplier 1/n, the logits' 1/m and attention by sqrt(base d) / d, in a plain standard model."""
    model = build(
        SCALED, **BASE, **parametrization, untie_embeddings_and_output_weights=untied, init_method_std=0.2
    ).eval()
    n = 3 if parametrization is COMPLETEP else 1
    folded = Transformer(ModelConfig(**standard_settings(vars(model.config))), VOCABULARY).eval()
    folded.load_state_dict(model.state_dict())
    for block in folded.layers.values():
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            for parameter in projection.parameters():
                parameter /= n
        for parameter in block.self_attn.q_proj.parameters():
            parameter *= 8**0.5 / 32 * 32**0.5
    folded.norm.weight /= 4
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    for causal in (True, False):
        torch.testing.assert_close(model.logits(tokens, causal), folded.logits(tokens, causal), rtol=1e-4, atol=1e-5)
    cache = KVCache()
    chunks = [model.head(model.read(tokens[:, part], cache)) for part in (slice(0, 7), slice(7, 8), slice(8, 12))]
    torch.testing.assert_close(torch.cat(chunks, dim=1), folded.logits(tokens, causal=True), rtol=1e-4, atol=1e-5)


CHECK = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --global-batch-size 8 --fp32 --lr 1e-2 "
)
CHECK += "--micro-batch-size 8 --init-method-std 0.05 --check-steps 10 --check-seeds 1 --parametrization"
WIDTH = "--base-hidden-size 32 --widths 32 64 128"


@pytest.fixture(scope="module")
def slopes():
    """Return a function of the slopes of a check of some flags, by parametrization: the requested and the standard."""

    def measure(flags):
        with joined():
            options, config = parse_with(coordinate_check.Options, "", f"{CHECK} {flags}".split(), ())
            measured = coordinate_check.measure(options, config)
        return options, measured, coordinate_check.slopes(options.sizes, measured)

    return measure


@pytest.mark.parametrize(
    "flags",
    [f"mup {WIDTH} --objective ar", f"mup {WIDTH} --objective mdm", f"mup {WIDTH} --optimizer muon"],
    ids=["ar", "mdm", "muon"],
)
def test_changes_are_flat_in_width_with_mup_and_not_without(slopes, flags):
    options, measured, exponents = slopes(flags)
    assert list(exponents) == list(ACTIVATIONS) and max(map(abs, exponents.values())) < 0.2
    assert coordinate_check.verdict(options, "mup", measured)[0] == (max(map(abs, exponents.values())) <= 0.15)
    _, _, standard = slopes(flags.replace("mup --base-hidden-size 32", "standard"))
    assert standard["all blocks"] > 0.5 and standard["logits"] > 0.25


def test_changes_are_flat_in_depth_with_completep_and_not_without(slopes):
    flags = "completep --base-hidden-size 32 --base-num-layers 2 --depths 2 4 8"
    exponents = slopes(flags)[2]
    assert max(map(abs, exponents.values())) < 0.2
    _, _, mup = slopes(flags.replace("completep", "mup").replace("--base-num-layers 2", ""))
    assert mup["all blocks"] > 0.3


def test_loops_and_stochastic_depth_are_checked_as_other_models(slopes):
    _, measured, _ = slopes(f"mup {WIDTH} --num-loops 2 --loop-layers 1-1 --stochastic-depth 0.5")
    assert measured.shape[2] == len(ACTIVATIONS) and (measured > 0).all()


def test_a_slope_is_the_exponent_of_a_power_law():
    sizes = (32, 64, 256)
    measured = np.array([[[2.0 * size**p for p in (0.0, 0.1, -0.3, 1.0)] for size in sizes]] * 2)
    assert list(coordinate_check.slopes(sizes, measured).values()) == pytest.approx([0, 0.1, -0.3, 1])
