"""The benchmarks run at a toy shape, refuse contestants that compute something else, and report mistakes in a line.

No time is asserted. A benchmark sets the environment when it is imported, so it runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT, environment

TOY = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --vocab-size 500 --seq-length 32 --rounds 2".split()
TOY += ["--steps", "1", "--no-compile"]
# transformers with other rotary frequencies, all else equal
FAULT = """
from dataclasses import replace
from benchmarks import contestants, generation, train_step
build = contestants.transformers_model
contestants.transformers_model = lambda shape: build(replace(shape, model=replace(shape.model, rotary_base=3.0)))
{benchmark}.main()
"""


def run(*arguments, script: str | None = None) -> subprocess.CompletedProcess:
    program = ["benchmarks/train_step.py"] if script is None else ["-c", script]
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_the_toy_run_ends_with_a_table(tmp_path):
    done = run(*TOY, "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    assert "check passed: same loss and gradient norm" in done.stdout
    packages = {"transformers": "transformers", "litgpt": "litgpt", "dllm": "transformers"}
    absent = [peer for peer, package in packages.items() if find_spec(package) is None]
    report = json.loads((tmp_path / "step.json").read_text())
    names = {"ours AR eager", "ours MDM eager", "transformers AR eager", "litgpt AR eager", "dllm MDM eager"}
    names = {name for name in names if name.split()[0] not in absent}
    assert report["seconds_per_step"].keys() == names
    assert all(len(times) == 2 and min(times) > 0 for times in report["seconds_per_step"].values())
    for name in names:
        assert f"\n| {name} |" in done.stdout
    for peer in absent:
        assert f"{peer}: skipped, No module named" in done.stdout
    assert "\n| ours MDM eager : ours AR eager |" in done.stdout


def test_a_peer_that_computes_something_else_is_refused():
    done = run(*TOY, script=FAULT.format(benchmark="train_step"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("transformers AR eager computes something else: its ")
    assert "| gate |" not in done.stdout


@pytest.mark.skipif("PUBLISHED_CLONE" not in os.environ, reason="PUBLISHED_CLONE names no clone of the published code")
def test_the_published_step_computes_what_ours_does_and_is_timed(tmp_path):
    done = run(*TOY, "--published", os.environ["PUBLISHED_CLONE"], "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "check passed: same loss and gradient norm" in done.stdout
    steps = ("ours AR dropout", "ours MDM dropout", "published AR", "published AR dropout", "published MDM")
    times = json.loads((tmp_path / "step.json").read_text())["seconds_per_step"]
    assert {f"{step} eager" for step in (*steps, "published MDM dropout")} <= times.keys()


MISTAKES = {
    "--num-layers 0": "--num-layers 0: must be at least 1",
    "--hidden-size 64 --num-attention-heads 3": "--hidden-size 64: is not a multiple of --num-attention-heads 3",
    "--seq-length 2": "--seq-length 2: gives less than 8 tokens a step",
    "--published none": "--published none: is no clone of wmn-231314/diffusion-data-constraint",
    "--output none/step.json": "--output none/step.json: none is no folder",
    "--round 3": "unknown flag --round; did you mean --rounds?",
}
if find_spec("litgpt") is None:
    MISTAKES["--require-peers"] = "--require-peers: litgpt cannot run, No module named 'litgpt'"


# importing torch dominates, so one process makes all mistakes
EACH = """
import sys
from benchmarks import train_step
for flags in sys.argv[1:]:
    sys.argv[1:] = flags.split()
    try:
        train_step.main()
    except SystemExit as left:
        print(left.code)
"""


def test_a_mistake_is_one_line():
    done = run(*MISTAKES, script=EACH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2"] * len(MISTAKES)
    for line, expected in zip(done.stderr.splitlines(), MISTAKES.values(), strict=True):
        assert line.startswith(f"error: {expected}")


def test_a_mistake_ends_with_exit_code_2():
    assert run("--rounds", "none").returncode == 2


def test_the_stall_of_a_small_network_is_measured():
    command = [sys.executable, "benchmarks/checkpoint_stall.py"]
    done = subprocess.run(
        [*command, "--model-size", "7M", "--rounds", "2"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == 12 * report["parameters"]
    assert all(min(report["seconds"][name]) > 0 for name in ("copy", "clone", "stall", "writing", "longest_pause"))
    refused = subprocess.run([*command, "--model-size", "8M"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --model-size 8M: is not on the ladder")


@pytest.mark.slow
def test_every_layout_of_one_process_trains_the_same():
    command = [sys.executable, "benchmarks/layouts.py", *"--model-size 7M --seq-length 32 --micro-batch-size 1".split()]
    command += "--micro-batches 2 --steps 1 --no-compile".split()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["layouts"]
    assert len(found) == (6 if find_spec("deepspeed") is None else 10)
    assert all(layout["tokens_per_second"] > 0 and layout["memory_bytes"] > 0 for layout in found.values())


FEW = """
import sys
from benchmarks import objectives
few = ["--objective block-diffusion", "--masked-input-weight 0.4"]
assert set(few) < set(objectives.CASES)
objectives.CASES = [objectives.PLAIN, *few]
objectives.main()
"""


def test_options_are_timed_beside_what_explains_their_cost(tmp_path):
    flags = f"--model-size 7M --seq-length 32 --micro-batch-size 1 --rounds 1 --output {tmp_path}/objectives.json"
    command = [sys.executable, "-c", FEW, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "objectives.json").read_text())
    plain, blocks, masked = report["results"].values()
    assert plain["times_plain"] == plain["explained"] == 1 and masked["explained"] == 2
    assert 0 < blocks["explained"] < 2  # twice the positions, and half of their outputs at most are asked for
    assert done.stdout.count("\n") == 2 + len(report["results"])


GENERATION = "--model-size 7M --prompt-length 6 --max-new-tokens 4 --batch-size 2 --rounds 1".split()


def test_generation_is_timed_beside_transformers(tmp_path):
    flags = [*GENERATION, "--output", tmp_path / "generation.json"]
    done = run(*flags, script="from benchmarks import generation; generation.main()")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "check passed" in done.stdout
    seconds = json.loads((tmp_path / "generation.json").read_text())["seconds"]
    assert list(seconds) == [
        "ours AR", "transformers AR", "ours MDM, 4 steps", "ours MDM, 2 steps", "ours MDM, 1 step"
    ]  # fmt: skip
    assert all(f"\n| {name} |" in done.stdout and min(times) > 0 for name, times in seconds.items())


def test_generation_of_another_network_is_refused():
    done = run(*GENERATION, script=FAULT.format(benchmark="generation"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "transformers AR computes something else: its logits are not ours"


@pytest.mark.slow
def test_preprocessing_starting_and_reading_are_measured(tmp_path):
    flags = "--copies 1 --documents 50 --epochs 1 3 --rounds 1 --output".split()
    command = [sys.executable, "benchmarks/data.py", *flags, str(tmp_path / "data.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    (text,) = report["preprocessing"]
    assert text["megabytes"] > 5 and 0 < text["tokenizers_seconds"] < 1.1 * text["seconds"]
    assert {(row["order"], row["epochs"]) for row in report["starting"]} == {
        (order, epochs) for order in ("documents", "windows", "megatron") for epochs in (1, 3)
    }
    assert all(row["seconds_per_sample"] > 0 for row in report["starting"])
    assert report["program"]["pretrain_gpt.py"]["cpu"] > report["program"]["import torch"]["cpu"] > 0
