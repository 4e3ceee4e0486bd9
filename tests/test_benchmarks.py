"""The benchmarks run at a toy shape, refuse peers that compute something else, and report user errors in one line.

No time is asserted. A benchmark sets environment variables at import, so each test runs it in a new process.
"""

import json
import os
import subprocess
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from benchmarks import harness
from benchmarks.training_step import parity
from benchmarks.training_step.options import Options, shape_of
from megatron.data.sources.standard_library import standard_library
from megatron.data.tokenizer import train_tokenizer
from tests.conftest import run_python

TOY = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --vocab-size 500 --seq-length 32 --rounds 2".split()
TOY += "--steps 1 --micro-batches 2 --no-compile --device cpu".split()
# transformers with other rotary frequencies, everything else equal
FAULT = """
from dataclasses import replace
from benchmarks.{subject} import run
from benchmarks.training_step import peers
build = peers.transformers_model
peers.transformers_model = lambda shape: build(replace(shape, model=replace(shape.model, rotary_base=3.0)))
run.main()
"""


def run(*arguments, script: str | None = None) -> subprocess.CompletedProcess:
    program = ["benchmarks/training_step/run.py"] if script is None else ["-c", script]
    return run_python(*program, *arguments, timeout=120)


def report_of(benchmark: str, folder) -> dict:
    """Run the benchmark of a subject; return the JSON that it writes to --output, next to the tables that it prints."""
    subject, *flags = benchmark.split()
    done = run_python(f"benchmarks/{subject}/run.py", *flags, "--output", folder / "report.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "report.md").read_text() in done.stdout
    return json.loads((folder / "report.json").read_text())


def test_contestants_alternate_after_warm_up():
    calls = []
    contestants = {name: lambda turn, name=name: calls.append(f"{name}{turn}") for name in "abc"}
    rounds = []
    timings = harness.interleave(
        contestants,
        2,
        torch.device("cpu"),
        warm_up=1,
        after_round=lambda timings: rounds.append([len(seconds) for seconds in timings.seconds.values()]),
    )
    assert rounds == [[1, 1, 1], [2, 2, 2]]
    assert calls == "a0 b0 c0 b1 c1 a1 c2 a2 b2".split()
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == dict(a=2, b=2, c=2)
    assert not timings.memory


def test_figures_are_ratios_by_round_and_cells():
    ratios = harness.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert ratios == [2.0, 3.0, 4.0]
    assert harness.summary(ratios) == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert harness.spread([0.002, 0.001, 0.004], ".1f", unit=1e-3) == ["2.0", "1.0 - 4.0"]
    assert harness.markdown_table(("a", "b"), [(1, "-")]) == "| a | b |\n|---|---|\n| 1 | - |\n"


def test_the_environment_of_a_result_is_one_line():
    environment = harness.environment(torch.device("cpu"), "no-such-package")
    line = harness.environment_line(environment)
    assert line.startswith(environment["date"]) and f"torch {version('torch')}" in line
    assert environment["versions"]["no-such-package"] is None and "no-such-package" not in line


COLUMNS = "ms/step, min - max, tokens/s, mfu_palm, util_ceiling, util_exec, step / floor, peak GB, step GB"
COLUMNS += ", loss diff, norm diff"


def test_the_toy_run_ends_with_tables(tmp_path):
    done = run(*TOY, "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    assert "check passed: same loss and gradient norm" in done.stdout
    packages = {"transformers": "transformers", "litgpt": "litgpt", "dllm": "transformers"}
    absent = [peer for peer, package in packages.items() if find_spec(package) is None]
    report = json.loads((tmp_path / "step.json").read_text())
    names = {"ours AR eager", "ours MDM eager", "ours MDM full head eager", "nanogpt AR eager"}
    names |= {"transformers AR eager", "litgpt AR eager", "dllm MDM eager"}
    names = {name for name in names if name.split()[0] not in absent}
    assert report["seconds_per_step"].keys() == names == report["figures"].keys()
    assert all(len(times) == 2 and min(times) > 0 for times in report["seconds_per_step"].values())
    for peer in absent:
        assert f"{peer}: skipped, No module named" in done.stdout
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {line[0]: dict(zip(COLUMNS.split(", "), line[1:], strict=True)) for line in lines if len(line) == 12}
    assert list(rows.pop("implementation")) == COLUMNS.split(", ")
    assert rows.keys() == names
    for name, cells in rows.items():
        figures = report["figures"][name]
        assert cells["mfu_palm"] == cells["peak GB"] == cells["step GB"] == "-"  # on GPUs only
        assert (cells["step / floor"] == "-") == (not name.startswith("ours"))
        assert 0 < figures["util_exec"] <= figures["util_ceiling"]
        assert figures["parity"]["loss"] < 1e-2
    assert rows["ours AR eager"]["loss diff"] == "0.0e+00"
    assert report["exactness"]["loss"] < 1e-5 and report["exactness"]["cosine"] > 0.9999
    assert {"64 x 64", "64 x 128", "128 x 64", "64 x 512"} == report["ceilings"]["layers"].keys()
    assert report["ceilings"]["matmul"] > 0 and report["ceilings"]["copy"] > 0
    assert {"causal", "full"} == report["ceilings"]["attention"]["default"].keys()
    assert "ours MDM eager : ours AR eager" in [gate["what"] for gate in report["gates"]]
    assert "\n| ours MDM eager : ours AR eager |" in done.stdout


FLOPS = """
import json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from benchmarks.training_step import parity, work
from benchmarks.training_step.implementations import Shape
from benchmarks.training_step.options import Options
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
loops = {"num_loops": 2, "loop_layers": "1-2"}
shape = Shape(ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=2, **loops), Vocabulary(500), 256)
for name, ((batch,),) in parity.batches(Options(seq_length=256, micro_batch_size=4), shape, 1).items():
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        shape.ours()(batch).sum().backward()
    required = work.required_flops(shape, 1024, len(batch.scored_positions), batch.causal)
    print(json.dumps([name, counter.get_total_flops(), required, work.attention_flops(shape, 1024, True)]))
"""


def test_required_flops_are_what_pytorch_counts():
    done = run(script=FLOPS)
    assert done.returncode == 0, done.stderr
    counts = {name: values for name, *values in map(json.loads, done.stdout.splitlines())}
    counted, required, half_attention = counts["ar"]
    assert counted == required + half_attention  # plain attention also computes the half that the mask discards
    counted, required, _ = counts["mdm full head"]
    assert counted == required
    counted, required, _ = counts["mdm"]
    assert required < counted < 1.05 * required  # scored positions are padded: to an eighth of all and to whole chunks


ROOFS = """
from dataclasses import replace
from benchmarks.training_step.ceilings import Ceilings
from benchmarks.training_step.implementations import Shape
from benchmarks.training_step.work import bytes_moved, palm_flops
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
shape = Shape(ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=1), Vocabulary(100), 8)
names = ("64 x 64", "64 x 128", "128 x 64")
rates = {name: dict(zip(("forward", "input gradient", "weight gradient"), (1e6, 2e6, 2e6))) for name in names}
ceilings = Ceilings(1e9, 1e3, rates, {"slow": {"causal": 1e3}, "fast": {"causal": 1e4}})
looped = replace(shape, model=replace(shape.model, num_loops=3))
more = bytes_moved(looped, 16, 8, 2) - bytes_moved(shape, 16, 8, 2)
print(palm_flops(shape), bytes_moved(shape, 16, 8, 2), ceilings.floor(shape, 16, 8, True, 2), palm_flops(looped), more)
"""


def test_the_floor_is_the_sum_of_its_terms():
    done = run(script=ROOFS)
    assert done.returncode == 0, done.stderr
    palm, moved, floor, looped_palm, more_moved = map(float, done.stdout.split())
    parameters = 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64 + 128 * 64
    assert palm == 6 * parameters + 12 * 64 * 8
    # per micro-batch: a norm and both rotations at all positions; a norm, SwiGLU, the final norm and the head at 8
    elements = 16 * (8 * 64 + 4 * 128) + 8 * (8 * 64 + 8 * 128) + 8 * 8 * 64 + 3 * 8 * 128
    assert moved == 2 * 2 * elements + (2 * 6 + 38) * parameters
    products = 2 * 16 * 3 * 64 * 64 + 2 * 8 * (64 * 64 + 3 * 64 * 128 + 64 * 128)
    seconds = products * (1 / 1e6 + 2 / 2e6) + 6 * 64 * 8 * 16 / 1e4
    assert abs(floor - (2 * seconds + moved / 1e3)) < 1e-9 * floor
    # two more uses of the block: all positions in each, and their gradients; nothing more in the optimizer
    block = parameters - 64 - 128 * 64
    assert looped_palm == palm + 2 * (6 * block + 12 * 64 * 8)
    assert more_moved == 2 * (2 * 2 * 16 * (2 * 8 * 64 + 4 * 128 + 8 * 128) + 2 * 6 * block)


GPU_GATES = """
import json
import torch
from benchmarks.training_step.gates import gates
from benchmarks.training_step.options import Options
options = Options(model_size="140M", seq_length=2048)
seconds = {"ours AR": 1.0, "ours MDM": 1.0, "ours MDM full head": 1.08, "nanogpt AR": 1.05, "litgpt AR": 1.2}
times = {f"{name} compiled": [value] * 3 for name, value in seconds.items()} | {"published MDM eager": [2.6] * 3}
figures = {name: {"util_ceiling": 0.53, "floor_seconds": 0.95} for name in times}
for gate in gates(options, torch.device("cuda"), times, figures):
    print(json.dumps([gate["what"], round(gate["median"], 3), gate["at_least"] or gate["at_most"], gate["passed"]]))
"""


def test_the_gates_on_a_gpu_depend_on_the_model_size():
    done = run(script=GPU_GATES)
    assert done.returncode == 0, done.stderr
    assert list(map(json.loads, done.stdout.splitlines())) == [
        ["ours MDM compiled : ours AR compiled", 1.0, 0.93, True],
        ["ours MDM compiled : ours MDM full head compiled", 1.08, 1.07, True],
        ["ours AR compiled : nanogpt AR compiled", 1.05, 1.08, False],  # the fastest of the peers
        ["ours MDM compiled : published MDM eager", 2.6, 2.5, True],
        ["ours AR compiled, util_ceiling", 0.53, 0.52, True],
        ["ours AR compiled, step / floor", 1.053, 1.12, True],
        ["ours MDM compiled, step / floor", 1.053, 1.12, True],
    ]


MEMORY = """
import torch
from benchmarks.training_step import ceilings, run
def measure(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ceilings.measure = measure
run.main()
"""


def test_out_of_memory_is_one_line():
    done = run(*TOY, "--only", "ours AR eager", script=MEMORY)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB; give fewer")


@pytest.mark.slow
def test_only_the_selected_implementations_run(tmp_path):
    done = run(*TOY, "--only", "nanogpt*", "ours MDM *eager", "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    assert list(report["figures"]) == ["ours MDM eager", "ours MDM full head eager", "nanogpt AR eager"]


INTERRUPTED = """
from benchmarks.training_step import run
turns = run.turns
def interrupted(*arguments):
    turn = turns(*arguments)
    return lambda number: turn(number) if number == 0 else exit(7)
run.turns = interrupted
run.main()
"""


@pytest.mark.slow
def test_a_run_that_is_ended_leaves_the_rounds_before(tmp_path):
    done = run(*TOY, "--only", "ours AR eager", "--output", tmp_path / "step.json", script=INTERRUPTED)
    assert done.returncode == 7 and "\n| ours AR eager | " in (tmp_path / "step.md").read_text()
    assert len(json.loads((tmp_path / "step.json").read_text())["seconds_per_step"]["ours AR eager"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.md"]
    assert "ceilings: matmul " in done.stdout


ENDED_BY_A_PEER = """
from benchmarks.training_step import peers, run
peers.PEERS["nanogpt"] = ("ar", lambda *_: exit(7))
run.main()
"""


def test_a_run_that_ends_while_a_peer_compiles_leaves_a_round_of_ours(tmp_path):
    flags = ["--only", "ours MDM eager", "nanogpt AR eager", "--output", tmp_path / "step.json"]
    done = run(*TOY, *flags, "--time-limit", 100, script=ENDED_BY_A_PEER)
    assert done.returncode == 7, done.stderr[-3000:]
    times = json.loads((tmp_path / "step.json").read_text())["seconds_per_step"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours MDM eager": 1}


def test_peers_start_from_the_weights_of_ours_after_that_round(tmp_path):
    flags = ["--only", "ours AR eager", "nanogpt AR eager", "--output", tmp_path / "step.json"]
    done = run(*TOY, *flags, "--time-limit", 100)
    assert done.returncode == 0, done.stderr[-3000:]
    times = json.loads((tmp_path / "step.json").read_text())["seconds_per_step"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours AR eager": 2, "nanogpt AR eager": 2}


def test_a_check_takes_few_micro_batches():
    options = Options(micro_batches=8, micro_batch_size=1, seq_length=16, vocab_size=500)
    for micro_batches, expected in ((8, 2), (1, 1)):
        by_kind = parity.check_batches(replace(options, micro_batches=micro_batches), shape_of(options))
        assert {len(step) for steps in by_kind.values() for step in steps} == {expected}


@pytest.mark.slow
def test_compiled_implementations_compute_the_same():
    flags = [flag for flag in TOY if flag != "--no-compile"]
    done = run(*flags, "--only", "ours * eager", "ours * compiled", "nanogpt AR compiled")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\n| ours MDM compiled : ours MDM full head compiled |" in done.stdout
    assert "\n| ours AR compiled : nanogpt AR compiled |" in done.stdout


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_refused():
    done = run(*TOY, script=FAULT.format(subject="training_step"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("transformers AR eager computes something else: its ")
    assert "| gate |" not in done.stdout


@pytest.mark.skipif("PUBLISHED_CLONE" not in os.environ, reason="PUBLISHED_CLONE is not set to a clone")
def test_the_published_step_computes_what_ours_does_and_is_timed(tmp_path):
    done = run(*TOY, "--published", os.environ["PUBLISHED_CLONE"], "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "check passed: same loss and gradient norm" in done.stdout
    steps = ("ours AR dropout", "ours MDM dropout", "published AR", "published AR dropout", "published MDM")
    times = json.loads((tmp_path / "step.json").read_text())["seconds_per_step"]
    assert {f"{step} eager" for step in (*steps, "published MDM dropout")} <= times.keys()


@pytest.mark.skipif(None in map(find_spec, ("deepspeed", "einops")), reason="needs deepspeed and einops")
def test_a_clone_that_lacks_a_package_is_refused_before_anything_is_measured(tmp_path):
    for name, text in {"model/diff_gpt_model": "", "__init__": "", "arguments": "import no_such_package"}.items():
        file = tmp_path / "megatron" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    done = run("--device", "cpu", "--published", tmp_path)
    error = f"error: --published {tmp_path}: cannot run, No module named 'no_such_package'"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == error
    assert "ceilings" not in done.stdout


ERRORS = {
    "--num-layers 0": "--num-layers 0: must be at least 1",
    "--hidden-size 64 --num-attention-heads 3": "--hidden-size 64: is not a multiple of --num-attention-heads 3",
    "--seq-length 2": "--seq-length 2: gives fewer than 8 tokens per micro-batch",
    "--micro-batches 0": "--micro-batches 0: must be at least 1",
    "--model-size 141M": "--model-size 141M: is not on the ladder; the nearest is 140M",
    "--model-size 140M --num-layers 3": "--model-size 140M: sets layers, width and heads; leave out",
    "--device gpu": "--device gpu: is not one of cuda, cpu",
    "--device cpu --only ours* theirs*": "--only theirs*: matches no implementation; choose from ours AR eager, ",
    "--device cpu --published none": "--published none: not a clone of wmn-231314/diffusion-data-constraint",
    "--output none/step.json": "--output none/step.json: none is not a folder",
    "--round 3": "unknown flag --round; did you mean --rounds?",
}
if not torch.cuda.is_available():
    ERRORS["--device cuda"] = "--device cuda: there is no GPU that PyTorch can use; leave the flag out"
if find_spec("litgpt") is None:
    ERRORS["--device cpu --require-peers"] = "--require-peers: litgpt cannot run, No module named 'litgpt'"


# importing torch dominates, so one process parses all of them
PARSE_ALL = """
import sys
from benchmarks.training_step import run
for flags in sys.argv[1:]:
    sys.argv[1:] = flags.split()
    try:
        run.main()
    except SystemExit as error:
        print(error.code)
"""


def test_a_user_error_is_one_line():
    done = run(*ERRORS, script=PARSE_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2"] * len(ERRORS)
    for line, expected in zip(done.stderr.splitlines(), ERRORS.values(), strict=True):
        assert line.startswith(f"error: {expected}")


def test_a_user_error_exits_with_code_2():
    assert run("--rounds", "none").returncode == 2


@pytest.mark.slow
def test_the_stall_of_a_small_model_is_measured(tmp_path):
    report = report_of("checkpoints --model-size 7M --rounds 2", tmp_path)
    assert report["bytes"] == 12 * report["parameters"]
    assert all(min(report["seconds"][name]) > 0 for name in ("copy", "clone", "stall", "writing", "longest_pause"))
    refused = run_python("benchmarks/checkpoints/run.py", "--model-size", "8M")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --model-size 8M: is not on the ladder")


@pytest.mark.slow
def test_every_layout_of_one_process_trains_the_same(tmp_path):
    flags = "--model-size 7M --seq-length 32 --micro-batch-size 1 --micro-batches 2 --steps 1 --no-compile"
    layouts = report_of(f"layouts {flags}", tmp_path)["layouts"]
    assert len(layouts) == (6 if find_spec("deepspeed") is None else 10)
    assert all(layout["tokens_per_second"] > 0 and layout["memory_bytes"] > 0 for layout in layouts.values())


FEW_CASES = """
from benchmarks.objectives import run as objectives
cases = ["--objective block-diffusion", "--masked-input-weight 0.4"]
assert set(cases) < set(objectives.CASES)
objectives.CASES = [objectives.PLAIN, *cases]
objectives.main()
"""


@pytest.mark.slow
def test_regularisers_are_timed_and_compared_with_their_flops(tmp_path):
    flags = f"--model-size 7M --seq-length 32 --micro-batch-size 1 --rounds 1 --output {tmp_path}/objectives.json"
    done = run_python("-c", FEW_CASES, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "objectives.json").read_text())
    plain, blocks, masked = report["results"].values()
    assert plain["times_plain"]["median"] == plain["explained"] == 1 and masked["explained"] == 2
    assert 0 < blocks["explained"] < 2  # twice the positions, at most half of them scored
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(report["results"])


@pytest.mark.slow
def test_forward_tokens_of_likelihoods_are_those_of_theory(tmp_path):
    flags = "--seq-length 12 --windows 2 --vocab-size 64 --tokens-per-step 2 --diffusion-block-size 4 --rounds 1"
    objectives = report_of(f"likelihoods {flags}", tmp_path)["objectives"]
    assert objectives.keys() == {"mdm", "dual", "any-order", "block-diffusion"}
    for results in objectives.values():
        assert all(result["forward_tokens"] == result["theory"] for result in results.values())
        assert results["bound"]["relative_throughput"] == [1.0]
    tokens = {name: objectives[name]["chain, margin"]["forward_tokens"] for name in objectives}
    assert tokens == {"mdm": 6 * 12, "dual": 6 * 12, "any-order": 6 * 11, "block-diffusion": 2 * 24}
    done = run_python("benchmarks/likelihoods/run.py", "--objectives", "xyz")
    assert done.returncode == 2 and "--objectives xyz: is not one of ar, mdm, dual" in done.stderr


@pytest.mark.slow
def test_teachers_are_timed_and_compared_with_their_forward_passes(tmp_path):
    report = report_of("distillation --model-size 7M --seq-length 16 --micro-batch-size 1 --rounds 1", tmp_path)
    assert [result["explained"] for result in report["results"].values()][:4] == [1, 4 / 3, 5 / 3, 7 / 3]
    assert all(result["times_plain"]["median"] > 0 for result in report["results"].values())


GENERATION = "--model-size 7M --prompt-length 6 --max-new-tokens 4 --batch-size 2 --rounds 1".split()


def test_generation_is_compared_with_transformers(tmp_path):
    flags = [*GENERATION, "--output", tmp_path / "generation.json"]
    done = run(*flags, script="from benchmarks.generation import run; run.main()")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "check passed" in done.stdout
    seconds = json.loads((tmp_path / "generation.json").read_text())["seconds"]
    assert list(seconds) == [
        "ours AR", "transformers AR", "ours MDM, 4 steps", "ours MDM, 2 steps", "ours MDM, 1 step"
    ]  # fmt: skip
    assert all(f"\n| {name} |" in done.stdout and min(times) > 0 for name, times in seconds.items())


def test_generation_by_another_model_is_refused():
    done = run(*GENERATION, script=FAULT.format(subject="generation"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "transformers AR computes something else: its logits differ from ours"


@pytest.mark.slow
def test_starting_and_reading_are_measured(tmp_path):
    report = report_of("data --documents 50 --epochs 1 3 --rounds 1", tmp_path)
    assert {(row["order"], row["epochs"]) for row in report["starting"]} == {
        (order, epochs) for order in ("documents", "windows", "megatron") for epochs in (1, 3)
    }
    assert all(row["seconds_per_sample"] > 0 for row in report["starting"])
    assert report["program"]["pretrain_gpt.py"]["cpu"] > report["program"]["import torch"]["cpu"] > 0


@pytest.mark.slow
def test_preprocessing_is_measured_next_to_its_peers(tmp_path):
    train_tokenizer([record.text for record in standard_library()], 700, tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    lines = [json.dumps({"text": record.text}) for record in standard_library()][:60]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    files = f"--input {tmp_path}/text.jsonl --vocab-file {tmp_path}/vocab.json --merge-file {tmp_path}/merges.txt"
    seconds = report_of(f"preprocessing {files} --trained 300 --rounds 1", tmp_path)["results"]["seconds"]
    assert {"GPT-2", "GPT-2, two workers", "trained BPE", "tokenizers", "one by one", "datasets.map"} == set(seconds)


@pytest.mark.slow
def test_growth_is_measured_and_compared_with_flops(tmp_path):
    rows = report_of("growth --model-sizes 7M 20M --seq-lengths 32 64 --tokens 64 --steps 1", tmp_path)["rows"]
    assert [(row["size"], row["seq_length"], row["samples"]) for row in rows] == [
        ("7M", 32, 2),
        ("20M", 32, 2),
        ("7M", 64, 1),
    ]
    assert rows[1]["flops_per_token"] > 2 * rows[0]["flops_per_token"] and rows[1]["tokens_per_second"] > 0


def test_host_time_is_measured_next_to_its_peers(tmp_path):
    report = report_of("host_time --num-layers 1 --micro-batches 1 --rounds 2 --no-compile", tmp_path)
    systems = {"ours", "nanogpt"} | ({"transformers"} if find_spec("transformers") else set())
    assert report["seconds"].keys() == report["calls"].keys() == systems
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in report["seconds"].values())
    assert report["calls"]["ours"]["FSDP2"] > 0 == report["calls"]["nanogpt"]["FSDP2"]
