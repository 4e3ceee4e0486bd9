"""Launchers: variables are read from SLURM and refused if invalid; ranks exit when their launcher is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron import parent_process
from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import FailureDetector, launcher
from megatron.parallel.launch import adopt_launcher, check_alone, join
from megatron.scoring import lm_eval_cli
from megatron.training.launcher import main
from tests.conftest import PLACE, ROOT, entry, environment
from tests.forked import run_script
from tests.training.jobs import alive


@pytest.fixture
def launch_variables():
    """Return a function that replaces all variables of launchers; they are restored after the test."""

    def replace(text):
        for name in [name for name in os.environ if name.startswith("SLURM_")] + [*PLACE]:
            os.environ.pop(name, None)
        os.environ.update(word.split("=") for word in text.split())

    with mock.patch.dict(os.environ):
        yield replace


INVALID = {
    "RANK=1": "RANK=1: is not below 1, as WORLD_SIZE is not set; unset it",
    "RANK=1 WORLD_SIZE=1": "RANK=1: is not below WORLD_SIZE=1; unset it",
    "RANK=4 WORLD_SIZE=4": "RANK=4: is not below WORLD_SIZE=4",
    "RANK=-1": "RANK=-1: is not a whole number",
    "RANK=": "RANK=: is not a whole number",
    "WORLD_SIZE=0": "WORLD_SIZE=0: must be at least 1",
    "WORLD_SIZE=two": "WORLD_SIZE=two: is not a whole number",
    "LOCAL_RANK=1": "LOCAL_RANK=1: is above 0, as RANK is not set; unset it",
    "LOCAL_RANK=x": "LOCAL_RANK=x: is not a whole number",
    "RANK=1 WORLD_SIZE=4 LOCAL_RANK=2": "LOCAL_RANK=2: is above RANK=1",
    "SLURM_STEP_NUM_TASKS=4": "SLURM_STEP_NUM_TASKS=4: is set without SLURM_PROCID and SLURM_LOCALID;",
    "SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1": "SLURM_PROCID=1: is set without SLURM_LOCALID;",
    "SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=0": "SLURM_STEP_NUM_TASKS=4: is set without SLURM_PROCID;",
    "SLURM_PROCID=2": "SLURM_PROCID=2: is set without SLURM_STEP_NUM_TASKS and SLURM_LOCALID;",
    "SLURM_PROCID=0 SLURM_LOCALID=1": "SLURM_PROCID=0: is set without SLURM_STEP_NUM_TASKS;",
    "SLURM_STEP_NUM_TASKS=four SLURM_PROCID=0 SLURM_LOCALID=0": "SLURM_STEP_NUM_TASKS=four: is not a whole number",
    "SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=4 SLURM_LOCALID=0": "SLURM_PROCID=4: is not below SLURM_STEP_NUM_TASKS=4",
    "SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1 SLURM_LOCALID=3": "SLURM_LOCALID=3: is above SLURM_PROCID=1",
}


@pytest.mark.parametrize("check", [adopt_launcher, check_alone, join])
@pytest.mark.parametrize("variables", INVALID)
def test_invalid_variables_are_refused_by_all_readers(variables, check, launch_variables):
    launch_variables(variables)
    with pytest.raises(ConfigurationError) as caught:
        check()
    assert str(caught.value).startswith(INVALID[variables]) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        "",
        "RANK=0",
        "WORLD_SIZE=1",
        "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1",
        "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8",  # a batch script
        "SLURM_PROCID=2 SLURM_NTASKS=8 RANK=0 WORLD_SIZE=2",  # torchrun, itself started by srun
    ],
)
def test_valid_variables_are_not_changed(variables, launch_variables):
    launch_variables(variables)
    before = dict(os.environ)
    adopt_launcher()
    assert before == os.environ


@pytest.mark.parametrize("variables", ["RANK=1", "LOCAL_RANK=x", "SLURM_STEP_NUM_TASKS=4"])
@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--skip-train"]], ids=" ".join)
def test_training_with_invalid_variables_writes_nothing(variables, flags, tiny, tmp_path, launch_variables, capsys):
    launch_variables(variables)
    with pytest.raises(SystemExit) as exit:
        main("ar", [*tiny, *flags, "--save", str(tmp_path / "run")])
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"error: {output.err[7:].strip()}\n"


def test_scoring_is_refused_too(launch_variables, capsys):
    launch_variables("RANK=one")
    with pytest.raises(SystemExit) as exit:
        lm_eval_cli.main(["run", "--model", "megatron", "--tasks", "x"])
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: RANK=one: is not a whole number")


@pytest.mark.parametrize("tool", ["ensemble", "convert_checkpoint", "tune"])
def test_tools_are_refused_too(tool, tmp_path):
    flags = {
        "convert_checkpoint": ["to-hf", "run", "--output", str(tmp_path / "exported")],
        "tune": "--vocabulary-size 100 --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8".split(),
    }.get(tool, ["run"])
    done = run_script([f"{ROOT}/tools/{tool}.py", *flags], environment() | {"RANK": "1"}, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: RANK=1: is not below 1"), done.stderr
    assert done.stderr.count("\n") == 1 and not any(tmp_path.iterdir())


# ------------------------------------------------------------------------- a launcher that is killed

# argv: a name for this process, the number of ranks to start, their command line. It prints their process ids.
LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
Path("/proc/self/comm").write_text(sys.argv[1])
ranks = [subprocess.Popen([*sys.argv[3:], str(rank)]) for rank in range(int(sys.argv[2]))]
print(*[rank.pid for rank in ranks], flush=True)
time.sleep(60)
"""
# argv: a folder, the rank. Two ranks share a failure detector, as in a training run; it waits for less time.
RANK = """
import sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
from megatron.parallel import failure_detector
from megatron.parallel.failure_detector import FailureDetector, Hub, launcher
failure_detector.PAUSE = failure_detector.POLL = 0.3
sys.stderr = open(folder / f"errors {rank}", "w", buffering=1)
detector = FailureDetector(rank, 0)
detector.on_failure = (folder / f"on_failure {rank}").write_text
if launcher():
    detector.exit_with_launcher(launcher())
if rank == 0:
    detector.hub = Hub(2, 1.0)
    detector.hub.start()
    (folder / "hub.partial").write_text(f"{detector.hub.port} {detector.hub.token}")
    (folder / "hub.partial").rename(folder / "hub")
while not (folder / "hub").exists():
    time.sleep(0.01)
port, token = (folder / "hub").read_text().split()
detector.connect(lambda: ("127.0.0.1", int(port), token), 1.0)
(folder / f"ready {rank}").touch()
time.sleep(60)
"""


# argv: a folder, the rank, in front of which stands the path of an entry point. It imports slowly: until there is `go`.
SLOW_IMPORTS = f"""
import os, runpy, sys, types
def main(objective):
    (folder / f"ready {{rank}}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    exec({RANK!r}, {{}})
import time
from pathlib import Path
entry_point = sys.argv.pop(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
sys.modules["megatron.likelihoods.pretrain"] = types.SimpleNamespace(main=main)
runpy.run_path(entry_point, run_name="__main__")
"""


def kill_a_launcher(
    folder: Path, ranks: int, variables: dict, name: str = "python", script: tuple = (RANK,), *, seconds: float = 8
) -> list[int]:
    """Start ranks from a launcher, kill it when they are ready, return the ids of those that run `seconds` later."""
    command = [sys.executable, "-c", LAUNCHER, name, str(ranks), sys.executable, "-c", *script, str(folder)]
    process = subprocess.Popen(command, env=environment() | variables, stdout=subprocess.PIPE, text=True)
    pids = list(map(int, process.stdout.readline().split()))
    try:
        deadline = time.monotonic() + 30
        while not all((folder / f"ready {rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        (folder / "go").touch()
        deadline = time.monotonic() + seconds
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [pid for pid in pids if alive(pid)]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


LAUNCHERS = pytest.mark.parametrize(
    "variables, name, message",
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "python", "torchrun (process "),
        pytest.param({"CROSS_RANK": "0"}, "python", "deepspeed (process ", marks=pytest.mark.slow),
        ({}, "slurmstepd", "srun (process "),
    ],
)


@LAUNCHERS
def test_ranks_end_with_their_launcher(variables, name, message, tmp_path):
    assert kill_a_launcher(tmp_path, 2, variables, name) == []
    errors = "".join((tmp_path / f"errors {rank}").read_text() for rank in (0, 1))
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1 and "is gone" in errors
    assert "which started rank" in errors and "the same command resumes" in errors
    for rank in (0, 1):
        assert f"error: {(tmp_path / f'on_failure {rank}').read_text()}\n" == errors


@LAUNCHERS
def test_a_rank_whose_launcher_is_killed_during_the_imports_ends(variables, name, message, tmp_path):
    script = (SLOW_IMPORTS, entry("mdm" if name == "slurmstepd" else "ar"))
    assert kill_a_launcher(tmp_path, 1, variables, name, script) == []
    errors = (tmp_path / "errors 0").read_text()
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1 and "is gone" in errors


def test_a_rank_that_a_launcher_left_to_init_before_its_first_line_ends():
    detector = FailureDetector(0, 0)
    with (
        mock.patch.object(parent_process, "_recorded", parent_process.Parent(os.getppid(), "systemd")),
        mock.patch.object(detector, "report", side_effect=SystemExit) as report,
        pytest.raises(SystemExit),
    ):
        detector.exit_with_launcher("torchrun")
    assert report.call_args.args[0].startswith(f"torchrun ({socket.gethostname()}), which started rank 0, is gone")


def test_ranks_outlive_a_shell(tmp_path):
    assert len(kill_a_launcher(tmp_path, 2, {}, "bash", seconds=1.5)) == 2
    assert not (tmp_path / "on_failure 0").exists()


@pytest.mark.parametrize(
    "parent", [None, parent_process.Parent(2**22 + 1, "bash"), parent_process.Parent(1, "systemd")]
)
def test_a_shell_is_no_launcher_also_when_it_has_ended(parent, monkeypatch):
    monkeypatch.setattr(parent_process, "_recorded", parent)
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launcher() is None
