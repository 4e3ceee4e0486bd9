"""Steps of every objective, regulariser and layout of one device take the CUDA branches, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks.checks import FP32_CASES, LAYOUTS
from megatron.objectives.registry import OBJECTIVES
from megatron.training.environment import cpp_compiler
from tests.conftest import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of PyTorch, which has no CUDA hooks"),
    pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler"),
]
CASES = [f"{flags} --bf16" for flags in FP32_CASES] + [f"--objective {name} --fp32" for name in OBJECTIVES]
CASES += [f"--objective mdm {flags} --bf16" for flags in LAYOUTS]
CASES += ["--objective mdm --attention-dropout 0.1 --mlp-dropout 0.1 --bf16"]
# operators of a step of two micro-batches and two blocks, with optimizer and weight average; to be lowered, not raised
OPERATORS = {"--objective ar --bf16": 4413, "--objective mdm --bf16": 5915}
# what a step must not do with its gradient norm, and how the error begins
FAULTS = {
    "float(norm)": "DataDependentOutputException",
    "norm.cpu()": "RuntimeError: aten._to_copy.default copies from the device to the host",
    "norm + torch.ones(2)": "FakeTensorDeviceMismatchError",
    "norm.expand(2, 2) @ norm.expand(2, 2).bfloat16()": "RuntimeError: aten.mm.default of different dtypes",
}
PLANTED = """
from tests import fake_cuda

start = fake_cuda.start

def start_with_fault(flags, *rest):
    flags, fault = flags.split("; ")
    config, engine, optimizer, steps = start(flags, *rest)
    clip = engine.clip
    engine.clip = lambda limit: faulty(clip(limit), fault)
    return config, engine, optimizer, steps

def faulty(norm, fault):
    import torch
    eval(fault)
    return norm

fake_cuda.start = start_with_fault
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


def outcomes(program: list[str], library: Path, lines: list[str]) -> dict[str, dict]:
    """Return operators or error of a step by line of flags, in a new process that has not loaded PyTorch."""
    variables = environment() | {"FAKE_CUDA": str(library)}
    done = subprocess.run([sys.executable, *program, *lines], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {outcome["flags"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


def test_steps_take_the_branches_of_cuda(library):
    results = outcomes(["-m", "tests.fake_cuda"], library, [f"{flags} --no-compile" for flags in CASES])
    assert len(results) == len(CASES)
    assert not {flags: outcome["error"] for flags, outcome in results.items() if "error" in outcome}
    for flags, most in OPERATORS.items():
        assert results[f"{flags} --no-compile"]["operators"] <= most, flags


def test_planted_faults_are_noticed(library):
    lines = [f"--objective ar --bf16 --no-compile; {fault}" for fault in FAULTS]
    errors = [outcome.get("error", "") for outcome in outcomes(["-c", PLANTED], library, lines).values()]
    assert len(errors) == len(FAULTS)
    assert all(error.startswith(start) for error, start in zip(errors, FAULTS.values())), errors
