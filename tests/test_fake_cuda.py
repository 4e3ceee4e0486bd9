"""Steps of every objective, regulariser and layout take the CUDA branches, compiled and not, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks.checks import FP32_CASES, LAYOUTS, OFFLOADED
from megatron.objectives.registry import OBJECTIVES
from megatron.training.environment import cpp_compiler
from tests.conftest import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of PyTorch, which has no CUDA hooks"),
    pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler"),
]
MODES = ("--no-compile", "--compile")
REGULARISERS = [
    "--token-dropout 0.1 --random-replacement 0.1 --target-offset-max 4 --target-positions",
    "--stochastic-depth 0.2 --hidden-dropout 0.1 --embedding-dropout 0.1",
    "--num-order-list 2 --use-predefined-order",
    "--right-to-left-ratio 0.5 --token-dropout-max 0.3",
    "--untie-embeddings-and-output-weights --softmax-over-padding --objective mdm --ar-ratio 0.5",
]
CASES = [f"{flags} --bf16" for flags in FP32_CASES + REGULARISERS]
CASES += [f"--objective {name} --fp32" for name in OBJECTIVES]
CASES += [f"--objective mdm {flags} --bf16" for flags in LAYOUTS + OFFLOADED]
CASES += ["--objective mdm --attention-dropout 0.1 --mlp-dropout 0.1 --bf16"]
CASES += [f"--objective {name} --deterministic --mlp-dropout 0.1 --bf16" for name in ("mdm", "block-diffusion")]
# operators of a step of two micro-batches and two blocks, with optimizer and weight average; to be lowered, not raised
OPERATORS = {"--objective ar --bf16": 4412, "--objective mdm --bf16": 5914}

PIPELINE = "--objective mdm --pipeline-model-parallel-size 2 --bf16"
TENSOR = "--objective block-diffusion --tensor-model-parallel-size 2 --bf16"
# layouts of several ranks, and which of the ranks take a step
LAYOUTS_OF_RANKS = {f"--zero-stage {stage} --global-batch-size 16 --bf16": ("1/2",) for stage in range(4)} | {
    "--num-distributed-optimizer-instances 2 --global-batch-size 32 --bf16": ("3/4",),
    "--optimizer muon --meta-gradient-norm 0.5 --global-batch-size 16 --bf16": ("1/2",),
    TENSOR: ("0/2", "1/2"),
    f"{TENSOR} --optimizer muon": ("1/2",),
    PIPELINE: ("0/2", "1/2"),
    f"{PIPELINE} --zero-stage 3 --cpu-offload": ("0/2", "1/2"),
    f"{PIPELINE} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1": ("0/2", "1/2"),
    f"{PIPELINE} --tensor-model-parallel-size 2 --global-batch-size 16": ("0/8", "7/8"),
}

EAGER, COMPILED = (f"0/1 --objective ar --bf16 {mode}" for mode in MODES)
MASKED = "0/1 --objective block-diffusion --bf16 --compile"
OFFLOADING = f"{EAGER} --cpu-offload"
NORM = "Engine.skip_if_diverged"  # its last argument is the gradient norm
MLP = "MLP.forward"  # its only argument are hidden states [B, S, 64]
DTYPES = "RuntimeError: aten.mm.default of different dtypes"
DEVICES = "TorchRuntimeError: Tensor device mismatch"
WAITS = "DataDependentOutputException"
COPIES = "RuntimeError: aten._to_copy.default copies from the device to the host"
# what a method must not do at its start, in a step of a rank, and how the error begins
FAULTS = {
    (EAGER, NORM, "float(args[-1])"): WAITS,
    (EAGER, NORM, "args[-1].cpu()"): COPIES,
    (EAGER, NORM, "torch.cuda.synchronize()"): "RuntimeError: the host waits for the device",
    (EAGER, NORM, "torch.cuda.Event().synchronize()"): "RuntimeError: the host waits for the device",
    (EAGER, NORM, "args[-1] + torch.ones(2)"): "FakeTensorDeviceMismatchError",
    (EAGER, MLP, "args[0] @ torch.ones(64, 64, device='cuda')"): DTYPES,
    (EAGER, "kernels.write_gradient_", "args = (args[0].to('cpu', non_blocking=True),)"): "RuntimeError: a Triton",
    (EAGER, "kernels.statistics", "self = self[:, ::2]"): "RuntimeError: the head's loss runs without its kernels",
    (f"{EAGER} --deterministic", NORM, "args[-1][None].cumsum(0)"): "RuntimeError: aten.cumsum.default has no determ",
    (COMPILED, MLP, "print(args[0])"): "Unsupported",  # a graph break
    (COMPILED, MLP, "args = (args[0] * int(args[0].argmax()),)"): WAITS,
    (COMPILED, MLP, "args = (args[0].cpu().cuda(),)"): COPIES,
    (COMPILED, MLP, "args = (args[0] + torch.ones(64),)"): DEVICES,
    (COMPILED, MLP, "args = (args[0] @ torch.ones(64, 64, device='cuda'),)"): DTYPES,
    (MASKED, "Transformer.run_blocks", "args = (args[0] * args[1].mask.kv_indices.sum().item(), *args[1:])"): WAITS,
    (OFFLOADING, NORM, "args[-1].expand(2) + torch.ones(2, device='cuda')"): "FakeTensorDeviceMismatchError",
    (OFFLOADING, MLP, "args[0].cpu()"): COPIES,
    (f"1/2 {TENSOR} --compile", "ColumnParallelLinear.forward", "args = (args[0] + torch.ones(64),)"): DEVICES,
    (f"0/2 {PIPELINE} --no-compile", "Schedule1F1B.step", "kwargs.clear()"): "RuntimeError: FSDPStage is",
    (f"1/2 {PIPELINE} --no-compile", NORM, "float(args[-1])"): WAITS,
}
PLANTED = """
from tests import fake_cuda

import torch
from torch.distributed.pipelining import Schedule1F1B
from megatron.model.mlp import MLP
from megatron.model.transformer import Transformer
from megatron.parallel.engine import Engine
from megatron.parallel.tensor import ColumnParallelLinear

outcome = fake_cuda.outcome
SOURCE = '''
def faulty(self, *args, **kwargs):
    {}
    return method(self, *args, **kwargs)
'''

def outcome_with_fault(line):
    line, place, fault = line.split("; ")
    owner, name = place.split(".")
    owner = fake_cuda.import_module("megatron.model.softmax_kernels") if owner == "kernels" else globals()[owner]
    scope = {"torch": torch, "method": getattr(owner, name)}
    exec(SOURCE.format(fault), scope)
    setattr(owner, name, scope["faulty"])
    return outcome(line)

fake_cuda.outcome = outcome_with_fault
fake_cuda.main()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library of the device, compiled with the headers of PyTorch."""
    path = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    folder = Path(torch.__file__).parent
    command = [cpp_compiler(), "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{folder}/include"]
    command += [ROOT / "tests" / "fake_cuda.cpp", f"-L{folder}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{folder}/lib", "-o", path], check=True)
    return path


def outcomes(program: list[str], library: Path, lines: list[str]) -> list[dict]:
    """Return operators or error of a step for each line, in a new process that has not loaded PyTorch."""
    variables = environment() | {"FAKE_CUDA": str(library)}
    done = subprocess.run([sys.executable, *program, *lines], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["line"] for result in results] == lines
    return results


def check_steps(library: Path, lines: list[str]) -> dict[str, int]:
    """Check that no step has an error; return the operators of each by line."""
    results = outcomes(["-m", "tests.fake_cuda"], library, lines)
    assert not [result for result in results if "error" in result]
    return {result["line"]: result["operators"] for result in results}


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_one_rank(library, mode):
    operators = check_steps(library, [f"0/1 {flags} {mode}" for flags in CASES])
    if mode == "--no-compile":
        for flags, most in OPERATORS.items():
            assert operators[f"0/1 {flags} {mode}"] <= most, flags


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_a_rank_among_several(library, mode):
    lines = [f"{rank} {flags} {mode}" for flags, ranks in LAYOUTS_OF_RANKS.items() for rank in ranks]
    check_steps(library, lines)


def test_planted_faults_are_noticed(library):
    errors = [result.get("error", "") for result in outcomes(["-c", PLANTED], library, list(map("; ".join, FAULTS)))]
    missed = {fault: error for (fault, start), error in zip(FAULTS.items(), errors) if not error.startswith(start)}
    assert not missed
