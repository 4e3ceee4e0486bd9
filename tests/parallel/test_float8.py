"""Float8 products: close to those in bf16, with the same parameters, compiled, recomputed and in any layout."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, ParallelConfig
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel import float8
from megatron.parallel.mesh import ParallelContext
from megatron.training.command_line import parse
from megatron.training.environment import prepare_device
from tests.conftest import records, run
from tests.distributed import joined, spawn
from tests.steps import MODEL, VOCABULARY, Case, batches_of_step, build, patched, whole

WIDE = {"hidden_size": 64, "num_attention_heads": 4}
RECIPES = ("tensorwise", "rowwise")
BF16 = ["--bf16", "--no-compile"]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def gradients(objective: str, recipe: str | None, compile: bool = False, **parallel) -> tuple[float, dict]:
    """Return loss and gradients of a step."""
    torch._dynamo.reset()
    case = Case(objective, model=WIDE)
    with joined() as ranks:
        engine, _, data = build(ranks, case, ParallelConfig(**parallel), bf16=True, compile=compile, fp8_recipe=recipe)
        loss = float(engine.backward(batches_of_step(data, 0), 100.0))
        return loss, whole((name, p.grad) for name, p in engine.named_parameters())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def rounded(matrix: torch.Tensor, dtype: torch.dtype, dim: int | None) -> torch.Tensor:
    """Return a matrix rounded to `dtype`, scaled so that its largest value, of all or along `dim`, is representable."""
    largest = matrix.abs().amax() if dim is None else matrix.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest.double()
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))  # torchao's row scales are powers of two
    return (matrix.float() * scale.float()).to(dtype).double() / scale


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_product_is_that_of_rounded_factors(recipe):
    model = Transformer(ModelConfig(**MODEL | WIDE), VOCABULARY).bfloat16()
    initialise(model, model.config, 5)
    layer = model.layers["0"].mlp.down_proj
    float8.convert_to_float8(model, recipe, torch.device("cpu"))
    layer, weight = model.layers["0"].mlp.down_proj, layer.weight.detach()
    generator = torch.Generator().manual_seed(3)
    inputs, upstream = (torch.randn(32, size, generator=generator).bfloat16() for size in weight.shape[::-1])
    outputs = layer(inputs.requires_grad_())
    outputs.backward(upstream)
    is_rowwise = recipe == "rowwise"
    by_row, by_column = (1, 0) if is_rowwise else (None, None)
    e4m3 = torch.float8_e4m3fn
    gradient_dtype = e4m3 if is_rowwise else torch.float8_e5m2
    product = rounded(inputs.detach(), e4m3, by_row) @ rounded(weight, e4m3, by_row).T
    input_gradient = rounded(upstream, gradient_dtype, by_row) @ rounded(weight, e4m3, by_column)
    weight_gradient = rounded(upstream, gradient_dtype, by_column).T @ rounded(inputs.detach(), e4m3, by_column)
    for value, expected in (
        (outputs.detach() - layer.bias.detach(), product),
        (inputs.grad, input_gradient),
        (layer.weight.grad, weight_gradient),
    ):
        assert float((value.double() - expected).norm() / expected.norm()) < 4e-3  # the result is rounded to bf16


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_step_is_near_that_of_bf16(objective, recipe):
    (plain, before), (loss, after) = gradients(objective, None), gradients(objective, recipe)
    assert loss == pytest.approx(plain, rel=2e-2) and loss != plain
    assert after.keys() == before.keys()
    for name in before:
        assert cosine(before[name], after[name]) > 0.9, name


@needs_torchao
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_blocks_give_the_same(granularity):
    (plain, before), (loss, after) = (
        gradients("ar", "rowwise"),
        gradients("ar", "rowwise", recompute_granularity=granularity),
    )
    assert loss == plain
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@needs_torchao
def test_compiled_blocks_give_nearly_the_same():
    (plain, before), (loss, after) = gradients("mdm", "rowwise"), gradients("mdm", "rowwise", compile=True)
    assert loss == pytest.approx(plain, rel=1e-2)  # the last bit in bf16 decides how float8 rounds
    assert min(cosine(before[name], after[name]) for name in before) > 0.9


@needs_torchao
def test_a_run_resumes_exactly_and_evaluates_in_bf16_too(tiny, tmp_path):
    flags = [*(flag for flag in tiny if flag != "--fp32"), *BF16, "--fp8-recipe", "tensorwise"]
    run("mdm", *flags, "--save", tmp_path / "whole")
    run("mdm", *flags, "--save", tmp_path / "resumed", "--exit-interval", 5)
    run("mdm", *flags, "--save", tmp_path / "resumed")
    assert records(tmp_path / "resumed") == records(tmp_path / "whole")
    done = run("mdm", *flags[:-2], "--save", tmp_path / "resumed", check=False)
    assert done.returncode == 2 and "--fp8-recipe" in done.stderr and "tensorwise" in done.stderr
    valid = flags[flags.index("--valid-data-path") :][:3]
    evaluated = run("mdm", "--skip-train", "--load", tmp_path / "whole", *valid).stdout  # in bf16
    float8_losses = {record["set"]: record["loss"] for record in records(tmp_path / "whole", "valid")}
    bf16_losses = {record["set"]: record["loss"] for record in map(json.loads, evaluated.splitlines())}
    assert bf16_losses == pytest.approx(float8_losses, rel=0.02) and bf16_losses["tuning"] != float8_losses["tuning"]


def steps_at_zero_3(ranks: ParallelContext, cases: dict) -> dict:
    """Return loss and gradients of a step of all cases at ZeRO stage 3."""
    parallel = ParallelConfig(zero_stage=3)
    steps = {}
    for name, case in cases.items():
        engine, _, data = build(ranks, case, parallel, bf16=True, fp8_recipe="rowwise")
        loss = float(engine.backward(batches_of_step(data, 0), 100.0))
        gradients = whole((name, parameter.grad) for name, parameter in engine.named_parameters())
        steps[name] = ranks.sum(loss)[0], gradients
    return steps


@needs_torchao
def test_two_ranks_take_the_step_of_one():
    """Also with nothing masked, and with short batches: a micro-batch of padding only has zero gradients to scale."""
    cases = {
        "mdm": Case("mdm", model=WIDE),
        "short": Case("mdm", model=WIDE, samples=5),
        "padding": Case("mdm", model=WIDE, samples=3),
        "nothing": Case("mdm", model=WIDE, nothing_masked=True),
    }
    with joined() as ranks:
        single = steps_at_zero_3(ranks, cases)
    for two in spawn(steps_at_zero_3, 2, cases):
        for name, (loss, gradients) in single.items():
            assert two[name][0] == pytest.approx(loss, rel=1e-6)
            size = max(np.abs(gradient).max() for gradient in gradients.values())
            for parameter, gradient in gradients.items():
                assert np.isfinite(gradient).all()
                np.testing.assert_allclose(two[name][1][parameter], gradient, rtol=1e-4, atol=1e-5 * size)


@needs_torchao
def test_a_pipeline_takes_the_steps_of_one_rank(tiny, tmp_path):
    flags = [*(flag for flag in tiny if flag != "--fp32"), *BF16, "--fp8-recipe", "rowwise"]
    run("mdm", *flags, "--save", tmp_path / "one")
    run("mdm", *flags, "--save", tmp_path / "two", "--pipeline-model-parallel-size", 2, processes=2)
    single, two = ([record["loss"] for record in records(tmp_path / name, "train")] for name in ("one", "two"))
    assert two == pytest.approx(single, rel=5e-3)


ARGUMENTS = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --fp8-recipe rowwise".split()


@needs_torchao
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tensor-model-parallel-size 2", ["--tensor-model-parallel-size", "leave one"]),
        ("--deepspeed", ["--deepspeed", "leave one"]),
        ("--ffn-hidden-size 100", ["16", "--ffn-hidden-size is 100"]),
        ("--seq-length 40", ["16", "--seq-length is 40"]),
    ],
)
def test_configurations_without_float8_are_refused(flags, words):
    prepare_device(parse("ar", ARGUMENTS), torch.device("cpu"))
    with pytest.raises(ConfigurationError) as caught:
        prepare_device(parse("ar", [*ARGUMENTS, *flags.split()]), torch.device("cpu"))
    for word in ("--fp8-recipe rowwise", *words):
        assert word in str(caught.value)


def test_without_the_package_its_extra_is_named():
    with patched(float8, "find_spec", lambda _: None), pytest.raises(ConfigurationError, match="--with-fp8"):
        prepare_device(parse("ar", ARGUMENTS), torch.device("cpu"))
