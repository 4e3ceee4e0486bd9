"""Tests that need a CUDA device. Run with: python -m pytest -m gpu"""

import json
import os
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from megatron.config.vocabulary import Vocabulary
from megatron.model import linear_cross_entropy
from megatron.model.linear_cross_entropy import PLAIN, WHOLE, Terms
from megatron.objectives.registry import build_objective
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training import optimizer as optimizers
from megatron.training.averaging import Average
from megatron.training.build_engine import start_engine
from megatron.training.command_line import parse
from megatron.training.environment import prepare_device
from megatron.training.optimizer import MOMENTS, ShardedApexAdam, apex_adam, build_optimizer, start_state
from megatron.training.step import train_step
from megatron.training.step_benchmark import RandomText
from tests.conftest import entry, environment, records
from tests.forked import run_script
from tests.training.test_optimizer import CONFIG, build, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(objective, *flags, cuda=True):
    variables = environment()
    if cuda:  # environment() hides the device for the tests of other files
        variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    # forked from a process that has imported torch but not initialised CUDA
    done = run_script([entry(objective), *map(str, flags)], variables, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder):
    return [record["loss"] for record in records(folder)]


@pytest.fixture
def default_precision(tiny):
    """The flags of a tiny run without those for precision and compilation."""
    return [flag for flag in tiny if flag not in ("--fp32", "--no-compile")]


@pytest.fixture(scope="module")
def on_cpu(tiny, tmp_path_factory):
    """Return a function that returns the losses of an objective's tiny run on the CPU, in fp32."""

    @cache
    def cpu_losses(objective):
        folder = tmp_path_factory.mktemp("cpu") / "run"
        run(objective, *tiny, "--save", folder, cuda=False)
        return losses(folder)

    return cpu_losses


@pytest.fixture(scope="module")
def plain_losses(tiny, tmp_path_factory):
    """The losses of a tiny run of masked diffusion on the device, in fp32."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run("mdm", *tiny, "--save", folder)
    return losses(folder)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_the_default_is_the_device_in_bf16(objective, default_precision, on_cpu, tmp_path):
    run(objective, *default_precision, "--save", tmp_path / "cuda")
    config = json.loads((tmp_path / "cuda" / "config.json").read_text())
    assert config["precision"] == "bf16" and config["device"] == torch.cuda.get_device_name()
    assert losses(tmp_path / "cuda") == pytest.approx(on_cpu(objective), rel=0.02)
    train_records = [json.loads(line) for line in (tmp_path / "cuda" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["memory_bytes"] > 0 for record in train_records if record["kind"] == "train")


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_fp32_equals_the_cpu(objective, tiny, on_cpu, tmp_path):
    run(objective, *tiny, "--save", tmp_path)
    assert losses(tmp_path) == pytest.approx(on_cpu(objective), rel=1e-4)


@pytest.mark.parametrize("objective, extra", [("ar", []), ("mdm", ["--mlp-dropout", "0.2"]), ("mdm", ["--compile"])])
def test_a_resumed_run_follows_an_uninterrupted_one(objective, extra, default_precision, tmp_path):
    run(objective, *default_precision, *extra, "--save", tmp_path / "uninterrupted")
    run(objective, *default_precision, *extra, "--save", tmp_path / "resumed", "--exit-interval", 5)
    run(objective, *default_precision, *extra, "--save", tmp_path / "resumed", "--num-workers", 2)
    # the gradient of attention is summed in a nondeterministic order on CUDA
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "uninterrupted"), rel=2e-3)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_a_deterministic_run_resumes_bit_exactly(objective, compile, default_precision, tmp_path):
    flags = [*default_precision, "--deterministic", compile, "--mlp-dropout", "0.1"]
    run(objective, *flags, "--save", tmp_path / "uninterrupted")
    run(objective, *flags, "--save", tmp_path / "resumed", "--exit-interval", 5)
    run(objective, *flags, "--save", tmp_path / "resumed")
    assert records(tmp_path / "resumed") == records(tmp_path / "uninterrupted")


@pytest.mark.parametrize("objective", ["ar", "mdm", "block-diffusion"])
def test_a_step_does_not_synchronise_the_host(objective, monkeypatch):
    monkeypatch.setattr(optimizers, "apex_adam", lambda: None)  # apex's kernel cannot skip a step on the device
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --compile --ema-decay 0.9".split()
    config, vocabulary = parse("mdm", [*flags, "--objective", objective]), Vocabulary(500)
    ranks = initialize_parallel()
    engine, optimizer = start_engine(config, vocabulary, ranks, bf16=True, compile=True, steps=0)
    average = Average(engine, config.optimizer)
    prepare = build_objective(config.objective, vocabulary, 8).prepare
    samples = RandomText(vocabulary.size, 64)
    for step in range(4):
        sample_indices = range(8 * step, 8 * step + 8)
        ids = np.stack([samples[index] for index in sample_indices])  # [B, S + 1]
        batch = prepare(ids, sample_indices, 1).pin_memory()
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        try:
            train_step(engine, optimizer, [batch], learning_rate=1e-3, weight_decay=0.1, clip_grad=1.0)
            average.update(8 * step + 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    destroy_parallel()


def gradients(flags, *, bf16, compile):
    """Return the gradients by name of one micro-batch of 2 samples, in this process."""
    torch._dynamo.reset()
    config, vocabulary = parse("ar", flags.split()), Vocabulary(500)
    ranks = initialize_parallel()
    prepare_device(config, ranks.device)
    engine, _ = start_engine(config, vocabulary, ranks, bf16=bf16, compile=compile, steps=0)
    samples = RandomText(vocabulary.size, config.data.seq_length)
    batch = build_objective(config.objective, vocabulary, 2).prepare(np.stack([samples[0], samples[1]]), range(2), 1)
    engine.backward([batch], batch.count)
    whole = {name: parameter.grad.full_tensor().flatten() for name, parameter in engine.named_parameters()}
    destroy_parallel()
    return whole


@pytest.mark.parametrize(
    "flags, bf16",
    [
        ("--objective ar --hidden-size 768 --num-attention-heads 12 --seq-length 2048", False),
        ("--objective ar --hidden-size 1792 --num-attention-heads 14 --seq-length 2048", True),
        ("--objective mdm --hidden-size 768 --num-attention-heads 12 --seq-length 2112", True),
        ("--objective block-diffusion --hidden-size 768 --num-attention-heads 12 --seq-length 1056", True),
    ],
)
def test_compiled_gradients_follow_uncompiled_ones(flags, bf16):
    """For each parameter: the loss and the norm of all gradients hide a wrong gradient of a small one.

    PyTorch has had such faults, in norms (pytorch#193061) and in FlexAttention (pytorch#158212, pytorch#165838).
    """
    expected, compiled = (gradients(f"--num-layers 2 {flags}", bf16=bf16, compile=compile) for compile in (False, True))
    similarities = {name: float(torch.cosine_similarity(g, compiled[name], dim=0)) for name, g in expected.items()}
    assert min(similarities.values()) > 0.999, similarities


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_8_bit_products_follow_bf16(recipe, compile, default_precision, tmp_path):
    for name, flags in (("bf16", []), ("fp8", ["--fp8-recipe", recipe])):
        run("mdm", *default_precision, compile, *flags, "--save", tmp_path / name)
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "bf16"), rel=0.03)
    assert losses(tmp_path / "fp8") != losses(tmp_path / "bf16")


MASKED = ["--objective block-diffusion --diffusion-block-size 8", "--reset-attention-mask --reset-position-ids"]


@pytest.mark.parametrize("mask_flags", MASKED)
def test_block_masks_follow_dense_masks(mask_flags, default_precision, tmp_path):
    for name, compile in (("tiles", "--compile"), ("dense", "--no-compile")):
        run("ar", *default_precision, *mask_flags.split(), "--seq-length", 320, compile, "--save", tmp_path / name)
    assert losses(tmp_path / "tiles") == pytest.approx(losses(tmp_path / "dense"), rel=0.02)


@pytest.mark.parametrize("version, package", [("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")])
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_flash_attention_packages_follow_pytorch(objective, version, package, default_precision, tmp_path):
    pytest.importorskip(package)
    for name, flags in (("pytorch", []), (version, ["--flash-attention", version])):
        run(objective, *default_precision, *flags, "--save", tmp_path / name)
    assert losses(tmp_path / version) == pytest.approx(losses(tmp_path / "pytorch"), rel=0.02)


LAYOUTS = [f"--zero-stage {stage}" for stage in (0, 2, 3)]
LAYOUTS += [f"--recompute-granularity {kind}" for kind in ("full", "selective")]
LAYOUTS += ["--recompute-granularity full --compile", "--cpu-offload", "--cpu-offload --zero-stage 3"]
if find_spec("deepspeed"):
    LAYOUTS += [f"--deepspeed --zero-stage {stage}" for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_one_device_changes_nothing_and_resumes(layout, tiny, plain_losses, tmp_path):
    run("mdm", *tiny, *layout.split(), "--save", tmp_path / "layout", "--exit-interval", 5)
    run("mdm", *tiny, *layout.split(), "--save", tmp_path / "layout")
    assert losses(tmp_path / "layout") == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.parametrize("terms", [PLAIN, Terms(label_smoothing=0.1, z_loss=1e-3)], ids=["nll", "terms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_kernels_of_the_head_equal_plain_operators(dtype, terms, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(300, 50_304, device="cuda", generator=generator).mul_(4).to(dtype)
    targets = torch.randint(50_258, (300,), device="cuda", generator=generator)
    weights = torch.rand(300, device="cuda", generator=generator)
    results, options = [], {"vocab_size": 50_258, "shard": WHOLE, "terms": terms}
    for kernels in (linear_cross_entropy._kernels, lambda device: None):
        monkeypatch.setattr(linear_cross_entropy, "_kernels", kernels)
        gradient = logits.clone()
        loss = linear_cross_entropy._to_gradient_(gradient, targets, weights, **options)
        results.append((loss, gradient.float()))
    (loss, gradient), (plain_loss, plain_gradient) = results
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)
    assert not gradient[:, 50_258:].any()


@pytest.mark.skipif(apex_adam() is None, reason="needs NVIDIA apex")
def test_apex_equals_torch():
    ranks = initialize_parallel()
    torch_model, _ = build(ranks, steps=3)
    apex_model, apex_optimizer = build(ranks, steps=3)
    assert isinstance(apex_optimizer, ShardedApexAdam)
    torch_optimizer = torch.optim.AdamW(build_optimizer(torch_model, CONFIG).param_groups, fused=True)
    start_state(torch_optimizer, 3)
    for model, optimizer in ((torch_model, torch_optimizer), (apex_model, apex_optimizer)):
        train(model, optimizer, 5)
    for expected, parameter in zip(torch_model.parameters(), apex_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), expected.full_tensor(), rtol=1e-5, atol=1e-6)
        for moment in MOMENTS:
            torch.testing.assert_close(
                apex_optimizer.state[parameter][moment].full_tensor(),
                torch_optimizer.state[expected][moment].full_tensor(),
            )
    destroy_parallel()
