"""The plan for a GPU, rehearsed on the CPU: checks, cost of settings, stages of gpu.sh, and the report of its files."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import report_gpu
from benchmarks.gpu_checks import checks
from benchmarks.gpu_checks import run as gpu_checks
from benchmarks.gpu_checks.checks import CheckError
from benchmarks.harness import append_line, read_lines
from benchmarks.settings import run as settings
from megatron.training.command_line import parse
from tests.conftest import ROOT

CPU = torch.device("cpu")
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CALLS = ("checks speed", "large settings", "layouts published")  # each at most nine minutes of a machine
NINE_MINUTES = 540


def call(program, monkeypatch, *words) -> None:
    """Run the main function of a benchmark in this process."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
    program.main()


def gpu_sh(*stages, **variables) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "PYTHON": "python", **{name: str(v) for name, v in variables.items()}}
    return subprocess.run(["bash", SCRIPT, *stages], env=environment, capture_output=True, text=True)


def commands(*stages, **variables) -> list[list[str]]:
    """Return the commands that gpu.sh would run."""
    done = gpu_sh(*stages, DRY_RUN=1, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


# ------------------------------------------------------------------ checks


def test_checks_are_written_as_they_end(tmp_path, monkeypatch):
    output = tmp_path / "checks.jsonl"
    selected = ["defaults", "kernels of the head, bf16, nll", "layout: --zero-stage 3", "no synchronisation: mdm"]
    with pytest.raises(SystemExit) as stopped:
        call(gpu_checks, monkeypatch, "--device", "cpu", "--only", *selected, "--output", output)
    assert not stopped.value.code
    environment, *lines = read_lines(output)
    assert environment["environment"]["device"] == "cpu"
    outcomes = {line["check"]: line["outcome"] for line in lines}
    assert outcomes == dict.fromkeys(selected, "passed") | {selected[1]: "skipped"}
    with pytest.raises(SystemExit):
        call(gpu_checks, monkeypatch, "--device", "cpu", "--only", "defaults", "--time-limit", "0", "--output", output)
    assert [line["outcome"] for line in read_lines(output)[1:]] == ["not run"]


def test_another_loss_and_other_bits_fail_a_check(monkeypatch):
    seeds = iter((1, 2, 1, 1, 2))
    start, pretrain = checks.start, checks.pretrain
    monkeypatch.setattr(checks, "start", lambda flags, device: start(f"{flags} --seed {next(seeds)}", device))
    with pytest.raises(CheckError, match="losses differ by"):
        checks.fp32_follows_the_cpu("--objective ar", CPU)
    seeds = iter((2, 1, 1))
    monkeypatch.setattr(
        checks, "pretrain", lambda o, flags, *paths: pretrain(o, f"{flags} --seed {next(seeds)}", *paths)
    )
    with pytest.raises(CheckError, match="records differ"):
        checks.deterministic_resume("ar", "--no-compile", CPU)
    with pytest.raises(CheckError, match="losses differ"):
        checks.compared([1.0, float("nan")], [1.0, 1.0], 0.1)


def test_an_error_of_a_check_is_a_failure_in_one_line():
    def broken(device):
        raise RuntimeError("first line\nsecond line")

    outcome = gpu_checks.attempt(checks.Check("broken", broken), CPU)
    assert outcome["outcome"] == "failed" and outcome["reason"] == "RuntimeError: first line"


def test_the_flags_of_the_checks_of_a_gpu_parse():
    names = [check.name for check in checks.checks(torch.device("cuda"))]
    assert max(Counter(names).values()) == 1
    flags = checks.FP32_CASES + checks.LAYOUTS + checks.OFFLOADED + checks.GRADIENT_CASES["cuda"]
    for words in flags:
        parse("ar", [*checks.MODEL.split(), *words.split()])


@pytest.mark.slow
def test_every_check_passes_on_the_cpu():
    failed = {}
    for check in checks.checks(CPU):
        outcome = gpu_checks.attempt(check, CPU)
        if outcome["outcome"] == "failed":
            failed[check.name] = outcome["reason"]
    assert not failed


# ------------------------------------------------------------------ settings


TOY_SETTINGS = (
    "--device cpu --model-size 7M --vocab-size 500 --seq-length 16 --micro-batch-size 1 --samples 1 --steps 1".split()
)


def test_settings_continue_where_an_earlier_call_ended(tmp_path, monkeypatch, capsys):
    output = tmp_path / "settings.jsonl"
    words = [
        *TOY_SETTINGS,
        "--sets",
        "settings",
        "--only",
        "*mdm --no-compile*",
        "*diffusion --no*",
        "--output",
        output,
    ]
    call(settings, monkeypatch, *words, "--time-limit", "0")
    assert capsys.readouterr().out.count("not measured, time limit") == 2
    call(settings, monkeypatch, *words[:-3], "--output", output)
    (first,) = (line for line in read_lines(output) if "flags" in line)
    assert first["tokens_per_second"] > 0 and first["memory_bytes"] > 0
    call(settings, monkeypatch, *words)
    lines = [line for line in read_lines(output) if "flags" in line]
    assert lines[0] == first and len(lines) == 2 and "block-diffusion" in lines[1]["flags"]


def test_a_setting_that_cannot_run_is_a_line(monkeypatch, capsys):
    call(settings, monkeypatch, *TOY_SETTINGS, "--sets", "memory", "--memory-sizes", "7B")
    assert "failed --model-size 7B: is not on the ladder" in capsys.readouterr().out


def test_the_flags_of_the_settings_of_a_gpu_parse():
    selected = list(settings.listed(settings.Options(sets=settings.SETS), torch.device("cuda")))
    assert {name for name, _ in selected} == set(settings.SETS) and len(set(selected)) == len(selected)
    for _, flags in selected:
        parse("ar", f"{flags} --seq-length 2048 --train-iters 1".split())


# ------------------------------------------------------------------ gpu.sh


@pytest.mark.parametrize("stages", CALLS)
def test_a_call_of_gpu_sh_fits_into_nine_minutes(stages, tmp_path):
    limits = [int(words[2]) for words in commands(*stages.split(), PUBLISHED=tmp_path)]
    assert 0 < sum(limits) < NINE_MINUTES
    assert f"{' '.join(stages.split())}" in SCRIPT.read_text().partition("Variables:")[0]


def test_the_page_has_the_limits_of_gpu_sh(tmp_path):
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\d, ]+) \|$", page, re.MULTILINE))
    limits = {stage: [int(words[2]) for words in commands(stage, PUBLISHED=tmp_path)] for stage in rows}
    assert {stage: [int(limit) for limit in cell.split(", ")] for stage, cell in rows.items()} == limits
    assert " ".join(rows) in gpu_sh("none").stderr


def test_gpu_sh_measures_every_size_and_writes_eight_files(tmp_path):
    planned = commands(PUBLISHED=tmp_path)
    sizes = {words[words.index("--model-size") + 1] for words in planned if "training_step" in " ".join(words)}
    assert sizes == {"140M", "425M", "1018M", "2283M"}
    files = {Path(words[words.index("--output") + 1]).name for words in planned if "--output" in words}
    assert len({*files, "gpu.log"}) == 8
    assert {f"{name}.json" for name in report_gpu.STEPS} | {"checks.jsonl", "settings.jsonl"} == files
    assert len(commands(PUBLISHED=tmp_path / "none")) == len(planned) - 1


def test_a_rehearsal_has_the_same_measurements_on_the_cpu(tmp_path):
    planned, rehearsed = (commands(PUBLISHED=tmp_path, **rehearsal) for rehearsal in ({}, {"REHEARSAL": 1}))
    outputs = [
        [words[words.index("--output") + 1] for words in plan if "--output" in words] for plan in (planned, rehearsed)
    ]
    assert outputs[0] == outputs[1]
    assert all("--device" in words for words in rehearsed if "--output" in words)


def test_gpu_sh_takes_an_interpreter_and_scales_its_limits():
    (words,) = commands("checks", SLOWER=3)
    assert words[:4] == ["timeout", "--kill-after=5", "360", "python"]
    done = gpu_sh("checks", "14M")
    assert done.returncode == 2 and "gpu.sh 14M: not a stage; choose from checks speed" in done.stderr


def test_gpu_sh_goes_on_after_failures_and_continues_with_what_is_missing(tmp_path):
    variables = {"OUT": tmp_path / "out", "PUBLISHED": tmp_path / "none", "WHEELS": tmp_path / "none"}
    failed = gpu_sh("checks", "settings", PYTHON="false", **variables)
    assert failed.returncode == 1 and failed.stderr.endswith("failed: checks settings\n")
    log = tmp_path / "out" / "gpu.log"
    assert "checks: ended with code 1 after 0 s of at most 120" in log.read_text()
    succeeded = gpu_sh("checks", PYTHON="true", **variables)
    assert succeeded.returncode == 0 and "checks: ended with code 0" in succeeded.stdout
    rest = gpu_sh(PYTHON="true", **variables).stdout
    assert "checks: has ended with code 0 before" in rest and "settings: ended with code 0" in rest
    assert f"published: left out, {tmp_path / 'none'} is not there" in rest


def test_gpu_sh_runs_the_tests_in_one_process_where_xdist_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[[ "$*" == *xdist ]] && exit 1\necho "words: $*"\n')
    python.chmod(0o755)
    done = gpu_sh("tests", PYTHON=python, OUT=tmp_path / "out", WHEELS=tmp_path / "none")
    assert "\nwords: -m pytest -q -rs -m gpu tests/test_cuda.py\n" in done.stdout
    (words,) = commands("tests")
    assert words[-4:] == ["8", "--dist", "load", "tests/test_cuda.py"]


# ------------------------------------------------------------------ report


ENVIRONMENT = {"date": "2026-12-01", "device": "cuda", "machine": "NVIDIA H200", "threads": 1, "world_size": 1}
ENVIRONMENT |= {"gpu": {"clocks.sm": "1980 MHz"}, "versions": {"torch": "2.11.0", "litgpt": None}}


def figures(**changes) -> dict:
    row = {"tokens_per_second": 131072 / 0.25, "mfu_palm": 0.4, "util_ceiling": 0.55, "util_exec": 0.5}
    return row | {"step_over_floor": 1.1, "memory_bytes": {"peak": 5, "step": 8 * 10**9}} | changes


def gate(what: str, median: float, **bounds) -> dict:
    return {"what": what, "values": [median], "median": median, "at_least": None, "at_most": None, **bounds}


@pytest.fixture
def measured(tmp_path):
    """A folder with the files of gpu.sh, as they would be after some minutes on a GPU."""
    append_line({"environment": ENVIRONMENT}, tmp_path / "checks.jsonl")
    append_line({"check": "defaults", "outcome": "passed", "figures": {}, "seconds": 2}, tmp_path / "checks.jsonl")
    failed = {"check": "layout: --zero-stage 3", "outcome": "failed", "reason": "losses differ", "seconds": 1}
    append_line(failed, tmp_path / "checks.jsonl")
    append_line({"environment": ENVIRONMENT}, tmp_path / "settings.jsonl")
    trial = {"tokens_per_second": 100.0, "memory_bytes": 21 * 10**9, "first_step_seconds": 9.0}
    append_line({"set": "settings", "flags": "--model-size 140M"} | trial, tmp_path / "settings.jsonl")
    append_line({"set": "memory", "flags": "--model-size 140M --no-compile"} | trial, tmp_path / "settings.jsonl")
    slower = trial | {"set": "settings", "flags": "--model-size 140M --deterministic", "tokens_per_second": 80.0}
    append_line(slower, tmp_path / "settings.jsonl")
    append_line({"set": "fp8", "flags": "--fp8-recipe rowwise", "failed": "refused: no"}, tmp_path / "settings.jsonl")
    gates = [
        gate("ours AR compiled, util_ceiling", 0.55, at_least=0.52, passed=True),
        gate("ours AR compiled : transformers AR compiled", 1.01, at_least=1.08, passed=False),
        gate("ours MDM compiled : dllm MDM compiled", 2.0, passed=None),
    ]
    report = {"environment": ENVIRONMENT, "gates": gates, "figures": {"ours AR compiled": figures()}}
    report["settings"] = {"micro_batches": 8, "micro_batch_size": 8, "seq_length": 2048}
    (tmp_path / "140M.json").write_text(json.dumps(report))
    return tmp_path


def test_the_report_has_figures_gates_and_failures(measured):
    text = report_gpu.tables(report_gpu.Results.read(measured))
    assert text.startswith("* 2026-12-01, NVIDIA H200; torch 2.11.0\n* clocks.sm 1980 MHz\n")
    for line in (
        "1 passed, 1 failed; 3 s",
        "| layout: --zero-stage 3 | failed | losses differ |",
        "| ours AR compiled, util_ceiling | 0.55, >= 0.52: met |",
        "| ours AR compiled, util_ceiling, target | 0.55, >= 0.57: **missed** |",
        "| ours AR compiled : transformers AR compiled | 1.01, >= 1.08: **missed** |",
        "| ours MDM compiled : dllm MDM compiled | 2 |",
        "| peak GB at 16 samples | 21, <= 20: **missed** |",
        "| 140M | ours AR compiled | 250.0 | 524,288 | 0.400 | 0.550 | 0.500 | 1.10 | 8.0 |",
        "| `--model-size 140M --deterministic` | 80 | 0.80 | 21.0 | 9.0 |",
        "| `--fp8-recipe rowwise` | refused: no |  |  |  |",
    ):
        assert f"\n{line}\n" in text, line


def test_one_command_writes_the_report_into_a_page(measured, tmp_path, monkeypatch, capsys):
    page, (start, end) = tmp_path / "page.md", report_gpu.MARKS
    page.write_text(f"before\n{start}old\n{end}after\n")
    for _ in range(2):
        call(report_gpu, monkeypatch, "--folder", measured, "--page", page)
        text = report_gpu.tables(report_gpu.Results.read(measured))
        assert page.read_text() == f"before\n{start}{text}{end}after\n" and capsys.readouterr().out == text
    page.write_text("no marks")
    with pytest.raises(SystemExit) as stopped:
        call(report_gpu, monkeypatch, "--folder", measured, "--page", page)
    assert stopped.value.code == 2 and page.read_text() == "no marks"


def test_a_rehearsal_is_never_written_into_a_page(measured, tmp_path, monkeypatch, capsys):
    append_line({"environment": ENVIRONMENT | {"device": "cpu"}}, measured / "settings.jsonl")
    page = tmp_path / "page.md"
    page.write_text("".join(report_gpu.MARKS))
    with pytest.raises(SystemExit):
        call(report_gpu, monkeypatch, "--folder", measured, "--page", page)
    assert capsys.readouterr().err.startswith(f"error: --page {page}: the figures are those of a rehearsal on a CPU")
    assert page.read_text() == "".join(report_gpu.MARKS)
    assert report_gpu.tables(report_gpu.Results.read(measured)).startswith(report_gpu.REHEARSAL)


def test_the_page_has_the_figures_of_the_committed_files():
    start, end = report_gpu.MARKS
    page = (ROOT / "docs" / "performance.md").read_text()
    text = report_gpu.tables(report_gpu.Results.read(ROOT / "results" / "gpu"))
    assert page.partition(start)[2].partition(end)[0] == text
