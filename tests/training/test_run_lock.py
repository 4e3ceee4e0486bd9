"""The lock of a run: waiting for it, and what a process does that has lost it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.errors import ConfigurationError
from megatron.training.command_line import parse
from megatron.training.launcher import main
from megatron.training.progress import Progress
from megatron.training.recorder import Recorder
from megatron.training.run_folder import LockError, RunFolder
from tests.training.jobs import lines, newest
from tests.training.runs import Run, contents, status

HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
lock.write("node-1 process-17 job-40_0")
lock.flush()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def locked(tmp_path):
    """A run folder whose lock another process holds; killing that process releases it."""
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield folder, holder
        holder.kill()


# ------------------------------------------------------------------------- locked by another process


@pytest.mark.parametrize("flags, expected", [([], ()), (["--wait-for-lock", "0.02"], ("after --wait-for-lock 0.02",))])
def test_a_run_that_another_process_writes_is_refused_with_75(flags, expected, locked, tiny, capsys):
    folder, _ = locked
    start = time.monotonic()
    with pytest.raises(SystemExit) as refused:
        main("ar", [*map(str, tiny), "--save", str(folder), *flags])
    assert refused.value.code == 75 and time.monotonic() - start < 30
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for part in (f"--save {folder}", "node-1 process-17 job-40_0", "--wait-for-lock MINUTES", *expected):
        assert part in line
    assert contents(folder) == {"lock": b"node-1 process-17 job-40_0"}


def test_a_run_waits_until_the_other_process_has_ended(locked, tiny, tmp_path):
    folder, holder = locked
    with Run("ar", [*tiny, "--save", folder, "--wait-for-lock", "5"], tmp_path, size=2) as training:
        training.wait_until(lambda: "waiting up to 5 minutes" in training.stderr)
        assert list(contents(folder)) == ["lock"]
        holder.kill()
        assert training.codes() == [0, 0], training.stderr[-3000:]
        assert training.stderr.count("node-1 process-17 job-40_0 is writing this run") == 1
    assert status(folder)["state"] == "finished"


@pytest.mark.parametrize(
    "rank, reason", [(None, "signal SIGTERM"), (0, "signal SIGTERM"), (1, "requested on another rank")]
)
def test_a_signal_to_any_rank_ends_the_wait(rank, reason, locked, tiny, tmp_path):
    folder, _ = locked
    flags = [*tiny, "--save", folder, "--wait-for-lock", "5", "--exit-code-when-stopped", "85"]
    with Run("ar", flags, tmp_path, size=2) as training:
        training.wait_until(lambda: "waiting up to 5 minutes" in training.stderr)
        training.signal("SIGTERM", "SIGTERM", rank=rank)
        assert training.codes(20) == [85, 85], training.stderr[-3000:]
        assert f"stopped by {reason} before the first step" in training.stderr
    assert contents(folder) == {"lock": b"node-1 process-17 job-40_0"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--save x --wait-for-lock -1", "--wait-for-lock -1.0: .*in .0, 720."),
        ("--save x --wait-for-lock 1440", "--wait-for-lock 1440.0: .*in .0, 720."),
        ("--wait-for-lock 5", "--wait-for-lock 5.0: does nothing without --save"),
        ("--exit-code-when-stopped 256", "--exit-code-when-stopped 256: .*in .0, 255."),
        ("--exit-code-when-stopped -1", "--exit-code-when-stopped -1: .*in .0, 255."),
    ],
)
def test_values_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        parse("ar", f"--num-layers 2 --hidden-size 32 --num-attention-heads 2 {flags}".split())


# --------------------------------------------------------------------------- lost to another process


def rewrite(lock: Path) -> None:
    lock.write_text("node-2 process-18 job-41")


def replace(lock: Path) -> None:
    lock.unlink()
    lock.write_text("node-2 process-18 job-41")


def remove(lock: Path) -> None:
    lock.unlink()


@pytest.fixture
def long(tiny):
    size = "--hidden-size 512 --num-layers 4 --micro-batch-size 1 --global-batch-size 2".split()
    return [*tiny, *size, *"--train-samples 1000000 --eval-interval 100000".split()]


def take_over(training: Run, folder: Path, takeover) -> dict[str, bytes]:
    """Take the lock from a run while it is stopped; return the files of its folder after that."""
    training.signal("SIGSTOP", pause=0.1)
    takeover(folder / "lock")
    files = contents(folder)
    training.signal("SIGCONT")
    return files


def complete(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if ".partial" not in name}


@pytest.mark.parametrize(
    "takeover",
    [pytest.param(rewrite, marks=pytest.mark.slow), replace, pytest.param(remove, marks=pytest.mark.slow)],
    ids=lambda takeover: takeover.__name__,
)
def test_a_run_that_lost_its_lock_writes_nothing_more(takeover, long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save-interval", "100000", "--save", folder], tmp_path) as training:
        training.wait_until(lambda: lines(folder) >= 2)
        files = take_over(training, folder, takeover)
        assert training.codes() == [75], training.stderr[-3000:]
        (line,) = [line for line in training.stderr.splitlines() if "lost" in line or "Traceback" in line]
    assert (
        line.startswith(f"error: --save {folder}: the lock of this run is lost to ") and "writes nothing more" in line
    )
    assert ("node-2 process-18 job-41" in line) == (takeover is not remove)
    assert contents(folder) == files


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_lost_its_lock_while_saving_publishes_no_checkpoint(size, long, tmp_path):
    folder = tmp_path / "run"
    flags = [*long, "--save-interval", "3", "--log-interval", "100000", "--save", folder]
    with Run("ar", flags, tmp_path, size=size) as training:
        training.wait_until(lambda: newest(folder) >= 3 and any(folder.glob("checkpoints/iter_*.partial")))
        files = take_over(training, folder, rewrite)
        assert training.codes() == [75] * size, training.stderr[-3000:]
        assert training.stderr.count("error:") == 1 and "node-2 process-18 job-41" in training.stderr
    remaining = contents(folder)
    assert files.keys() <= remaining.keys()  # partial files may belong to the other process now
    assert complete(remaining) == complete(files)


def test_every_write_asks_for_the_lock(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.start({}, [], tmp_path)
    replace(tmp_path / "lock")
    files = contents(tmp_path)
    for write in (
        lambda: folder.record({"kind": "train"}),
        lambda: folder.save_evaluation("tuning", 1, None),
        lambda: folder.status("failed", "", 1, 1),
        lambda: folder.start({"x": 1}, [], tmp_path),
    ):
        with pytest.raises(LockError, match="lost to node-2 process-18 job-41"):
            write()
    assert contents(tmp_path) == files


def test_a_failure_is_not_replaced_by_that_of_its_record(tmp_path, monkeypatch):
    """A full disk: status.json cannot be written either, and the first error is the one to report."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    folder = RunFolder(str(tmp_path))
    monkeypatch.setattr(folder, "status", full)
    Recorder(SimpleNamespace(folder=folder, config=None, progress=Progress())).failed("step 3: loss is not finite")


# ------------------------------------------------------------------------------ the name in the lock


@pytest.mark.parametrize(
    "variables, job",
    [
        ({}, "none"),
        ({"SLURM_JOB_ID": "41"}, "41"),
        ({"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "0"}, "40_0"),
        ({"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40"}, "41"),
    ],
)
def test_the_lock_names_the_job_as_squeue_does(variables, job, monkeypatch, tmp_path):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(str(tmp_path))
    folder.status("running", "", 0, 0)
    assert (tmp_path / "lock").read_text().endswith(f" process-{os.getpid()} job-{job}")
    assert json.loads((tmp_path / "status.json").read_text())["job"] == f"job-{job}"


def test_a_killed_process_holds_nothing(long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save", folder], tmp_path) as training:
        training.wait_until(lambda: lines(folder) >= 1)
        training.signal("SIGKILL")
        assert training.codes() == [-signal.SIGKILL]
    RunFolder(str(folder))
