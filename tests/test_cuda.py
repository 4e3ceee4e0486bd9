"""Tests that need a CUDA device: python -m pytest -m gpu. benchmarks/gpu_checks/ runs the checks without pytest."""

import os
from importlib.util import find_spec

import pytest
import torch

from benchmarks.gpu_checks.checks import SkipCheck, checks, run_check
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training.optimizer import MOMENTS, ShardedApexAdam, apex_adam, build_optimizer, start_state
from tests.conftest import entry, environment, records
from tests.forked import run_script
from tests.training.test_optimizer import CONFIG, build, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; cuBLAS reads it once per process
DEVICE = torch.device("cuda", 0)


def run(objective, *flags):
    variables = environment()  # hides the device for the tests of other files
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
def plain_losses(tiny, tmp_path_factory):
    """The losses of a tiny run of masked diffusion on the device, in fp32."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run("mdm", *tiny, "--save", folder)
    return losses(folder)


@pytest.mark.parametrize("check", checks(DEVICE), ids=lambda check: check.name)
def test_a_check_passes(check):
    try:
        run_check(check, DEVICE)
    except SkipCheck as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("objective, extra", [("ar", []), ("mdm", ["--mlp-dropout", "0.2"]), ("mdm", ["--compile"])])
def test_a_resumed_run_follows_an_uninterrupted_one(objective, extra, default_precision, tmp_path):
    run(objective, *default_precision, *extra, "--save", tmp_path / "uninterrupted")
    run(objective, *default_precision, *extra, "--save", tmp_path / "resumed", "--exit-interval", 5)
    run(objective, *default_precision, *extra, "--save", tmp_path / "resumed", "--num-workers", 2)
    # the gradient of attention is summed in a nondeterministic order on CUDA
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "uninterrupted"), rel=2e-3)


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
