"""Shared by all tests: a small corpus of real text and a way to run the entry points."""

import gc
import json
import os
import shutil
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest

from tests.forked import run_script

ROOT = Path(__file__).resolve().parents[1]
MODULES = "abc ast bisect calendar cmd code codecs copy csv dis enum fnmatch glob gzip heapq inspect io keyword".split()


# the longest files of the fast tier, which run first; all others take seconds
LONGEST = """
parallel/test_layouts sweeps/test_local_queue test_static parallel/test_compiled training/test_resume test_errors
test_documentation parallel/test_deepspeed test_download data/test_resume_preprocess test_quickstart
scoring/test_lm_eval training/test_stop_signals objectives/test_training training/test_trackers sweeps/test_branches
training/test_jobs parallel/test_non_finite reporting/test_report test_check sweeps/test_full_disk test_benchmarks
training/test_run_lock parallel/test_failure_detector likelihoods/test_likelihoods_tool reporting/test_sweep_report
objectives/test_page laws/test_fit_tool parallel/test_launcher convert/test_export
""".split()


def pytest_collection_modifyitems(items):
    """Put the longest files first, so that workers end together; let slow tests run for an hour."""
    order = {ROOT / "tests" / f"{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_terminal_summary(terminalreporter):
    """Print which PyTorch the tests ran on."""
    terminalreporter.write_line(f"torch {version('torch')}")


def pytest_collection_finish():
    """Leave out modules and collected tests of garbage collections, which take half a second with them."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Take the database of pytest-rerunfailures in the main process away from workers of pytest-xdist.

    Every test waits 40 ms for it. It serves to repeat tests of a worker that crashed, which `loadfile` does not do.
    """
    if hasattr(config, "workerinput") and hasattr(config, "failures_db"):
        from pytest_rerunfailures import StatusDB

        config.failures_db = StatusDB()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with train, tuning and validation data: a dozen modules of the standard library, byte tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    text = [path for name in MODULES if (path := Path(sysconfig.get_path("stdlib")) / f"{name}.py").exists()]
    lines = [
        json.dumps({"text": path.read_text()[start : start + 3000]}) for path in text for start in range(0, 30000, 3000)
    ]
    lines = [line for line in lines if len(line) > 200]
    (folder / "text.jsonl").write_text("\n".join(lines))
    flags = ["--output-dir", folder / "data", "--input", folder / "text.jsonl", "--tokenizer-type", "ByteTokenizer"]
    done = run_python("tools/preprocess_data.py", *flags, "--splits", "80", "10", "10")
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture(scope="session")
def tiny(corpus):
    """The flags of a run of one second: 26k parameters, 12 steps, the last one short."""
    return [
        *"--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --fp32 --no-compile".split(),
        *"--micro-batch-size 4 --global-batch-size 8 --train-samples 93 --lr 1e-2 --log-interval 1".split(),
        *"--eval-interval 4 --eval-samples 12 --save-interval 4 --tokenizer-type ByteTokenizer".split(),
        *[
            "--train-data-path",
            f"{corpus}/train",
            "--valid-data-path",
            f"tuning={corpus}/tuning",
            f"validation={corpus}/validation",
        ],
    ]


@pytest.fixture(autouse=True)
def _environment_of_its_own():
    """Undo what a test, or a library in it, writes to the environment."""
    with mock.patch.dict(os.environ):
        yield


PLACE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def environment() -> dict:
    """Return the environment of a subprocess: on the CPU, one thread, no rank or world size of a launcher."""
    inherited = {name: value for name, value in os.environ.items() if name not in PLACE}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def entry(objective: str) -> str:
    return str(ROOT / {"ar": "pretrain_gpt.py", "mdm": "pretrain_mdm.py"}[objective])


def run(objective: str, *flags, processes: int = 1, check: bool = True, timeout: int = 300):
    """Run an entry point on `processes` ranks in new processes; return exit code, stdout and stderr."""
    command = [entry(objective), *map(str, flags)]
    done = run_script(command, environment(), timeout, processes)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done


def run_python(*words, cwd: Path = ROOT, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    """Run what follows `python`, forked from a process that has loaded torch, with further environment variables."""
    return run_script([*map(str, words)], environment() | variables, timeout, cwd=cwd)


def records(folder, kind=None) -> list[dict]:
    """Return the records of a run without the fields that differ between equal runs: times, speed, memory."""
    parsed = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds", "tokens_per_second", "mfu", "memory_bytes")
    stable = [{key: value for key, value in record.items() if key not in volatile} for record in parsed]
    return [record for record in stable if kind is None or record["kind"] == kind]


def changed(source, target, **sections):
    """Copy a run and change its config.json."""
    shutil.copytree(source, target)
    recorded = json.loads((target / "config.json").read_text())
    for name, values in sections.items():
        recorded[name] = recorded[name] | values if isinstance(values, dict) else values
    (target / "config.json").write_text(json.dumps(recorded))
    return str(target)
