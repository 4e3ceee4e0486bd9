"""Jobs of several ranks under machine faults: which rank is named, how soon all ranks exit, what is lost."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import entry, records, run
from tests.training.jobs import LAYOUTS, Job, alive, lines, newest
from tests.training.kill_processes import difference
from tests.training.runs import Run


@pytest.fixture
def flags(tiny):
    return [entry("mdm"), *tiny, "--num-layers", "4", "--micro-batch-size", "2", "--save-interval", "2"]


@pytest.fixture
def long(flags):
    """The same, but long enough to be running whenever a test looks at it."""
    return [*flags, "--train-samples", "100000", "--eval-interval", "100000", "--save-interval", "4"]


@pytest.mark.parametrize("by_hand", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["by hand", "torchrun"])
def test_a_killed_rank_ends_the_job_with_its_name_and_nothing_saved_is_lost(by_hand, flags, tmp_path):
    folder = tmp_path / "run"
    arguments = [*flags, "--pipeline-model-parallel-size", "2", "--save", folder]
    job = Job(arguments, tmp_path / "log", size=2, by_hand=by_hand)
    assert job.wait_until(lambda: newest(folder) >= 4)
    assert job.kill(1)
    job.wait(30)
    saved = newest(folder)
    (line,) = job.errors()
    assert line.startswith("error: rank 1 ") and "is gone" in line and "the same command" in line
    assert by_hand or re.search(r"Root Cause[^=]*rank +: 1 ", job.text()), job.text()[-3000:]
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and line == f"error: {status['reason']}"
    done = run("mdm", *flags[1:], "--save", folder)
    assert f"at step {saved}\n" in done.stderr and saved >= 4
    run("mdm", *flags[1:], "--save", tmp_path / "whole")
    assert difference(tmp_path / "whole", folder) < 1e-4


def test_a_number_of_processes_that_does_not_fit_is_said_once(flags, tmp_path):
    with Run("mdm", [*flags[1:], *LAYOUTS["tp2 x dp2"], "--save", tmp_path / "run"], tmp_path, size=3) as ranks:
        assert ranks.codes() == [2, 2, 2] and "Traceback" not in ranks.stderr
        (line,) = [line for line in ranks.stderr.splitlines() if line.startswith("error:")]
    assert "--tensor-model-parallel-size 2: makes groups of 2 ranks" in line and "and 3 were started" in line
    assert not (tmp_path / "run").exists()


def test_a_flag_that_does_not_exist_is_said_by_the_first_rank(flags, tmp_path):
    """The other one waits for its launcher, which ends it."""
    with Run("mdm", [*flags[1:], "--num-layer", "3"], tmp_path, size=2) as job:
        first, second = job.ranks
        first.join(60)
        assert first.exitcode == 2 and second.is_alive()
        assert job.stderr == "error: unknown flag --num-layer; did you mean --num-layers?\n"


@pytest.mark.slow
def test_a_flag_that_does_not_exist_is_said_once(flags, tmp_path):
    job = Job([*flags, "--num-layer", "3"], tmp_path / "log", size=2)
    job.wait(60)
    (line,) = job.errors()
    assert "unknown flag --num-layer" in line


@pytest.mark.slow
@pytest.mark.parametrize("victim, slurm", [(0, False), (3, True)])
def test_without_a_launcher_the_others_end_too(victim, slurm, long, tmp_path):
    folder = tmp_path / "run"
    job = Job([*long, *LAYOUTS["pp2 x dp2"], "--save", folder], tmp_path / "log", by_hand=True, slurm=slurm)
    assert job.wait_until(lambda: lines(folder) > 5)
    job.kill(victim)
    seconds, codes = job.wait(30)
    assert seconds < 15 and codes == [-9 if rank == victim else 1 for rank in range(4)]
    (line,) = job.errors()
    assert f"rank {victim}" in line and "is gone" in line
    state = json.loads((folder / "status.json").read_text())["state"]
    assert state == ("running" if victim == 0 else "failed")  # rank 0 writes the status, and it is gone
    run("mdm", *long[1:], "--save", folder, "--exit-interval", 1)  # the next start is not refused


@pytest.mark.slow
def test_torchrun_restarts_a_job_by_itself(flags, tmp_path):
    folder, restarts = tmp_path / "run", ("--standalone", "--max-restarts=2")
    job = Job([*flags, *LAYOUTS["tp2 x dp2"], "--save", folder], tmp_path / "log", launcher=restarts)
    for rank, step in ((1, 2), (0, 6)):
        assert job.wait_until(lambda rank=rank, step=step: newest(folder) >= step and job.pid(rank))
        before = job.pid(rank)
        job.kill(rank)
        assert job.wait_until(lambda rank=rank, before=before: job.pid(rank) not in (None, before))
    assert job.wait(120)[1] == [0], job.text()[-3000:]
    run("mdm", *flags[1:], "--save", tmp_path / "whole")
    assert difference(tmp_path / "whole", folder) < 1e-4


@pytest.mark.slow
def test_a_rank_that_hangs_is_not_waited_for_for_ever(long, tmp_path):
    folder = tmp_path / "run"
    flags = [*long, *LAYOUTS["tp2 x dp2"], "--distributed-timeout-minutes", "0.1", "--save", folder]
    job = Job(flags, tmp_path / "log", by_hand=True)
    assert job.wait_until(lambda: lines(folder) > 5)
    job.kill(1, signal.SIGSTOP)
    try:
        running = [job.started[rank] for rank in (0, 2, 3)]
        assert job.wait_until(lambda: all(process.poll() is not None for process in running), timeout=40)
        (line,) = job.errors()
        assert "--distributed-timeout-minutes 0.1: rank" in line and "one hangs" in line
        assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    finally:
        job.end()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_is_said_once(flags, tmp_path):
    folder = tmp_path / "run"
    job = Job([*flags, *LAYOUTS["tp2 x dp2"], "--lr", "1e30", "--clip-grad", "0", "--save", folder], tmp_path / "log")
    job.wait(60)
    (line,) = job.errors()
    assert "not finite" in line and "Traceback" not in job.text().partition("torch/distributed/elastic")[0]
    assert json.loads((folder / "status.json").read_text())["reason"] in line
    assert records(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_end_with_a_killed_torchrun(size, long, tmp_path):
    folder = tmp_path / "run"
    job = Job([*long, "--num-workers", "1", "--save", folder], tmp_path / "log", size=size)
    assert job.wait_until(lambda: lines(folder) > 5)
    ranks = [job.pid(rank) for rank in range(size)]
    workers = [child(pid) for pid in ranks]
    job.started[0].kill()
    job.started[0].wait()
    deadline = time.monotonic() + 15
    try:
        while any(map(alive, ranks + workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for pid in filter(alive, ranks):
            os.kill(pid, signal.SIGKILL)
    (line,) = job.errors()
    assert line.startswith(f"error: torchrun (process {job.started[0].pid} on ") and "is gone" in line
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and line == f"error: {status['reason']}"


def child(pid: int) -> int:
    """Return the process id of the last child of a process: a data loader worker."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_data_loader_worker_ends_the_run_with_one_line(number, long, tmp_path):
    folder = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        flags = [*long[1:], "--num-workers", 2, "--save", folder]
        ended = pool.submit(run, "mdm", *flags, check=False, timeout=60)
        while lines(folder) < 4 and not ended.done():
            time.sleep(0.01)
        status = json.loads((folder / "status.json").read_text())
        os.kill(child(int(status["process"].removeprefix("process-"))), number)
        start = time.monotonic()
        done = ended.result()
    assert done.returncode == 1 and time.monotonic() - start < 30 and "Traceback" not in done.stderr
    stderr = done.stderr.replace("\0", "")  # torch ends its own line with it
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert f"was killed by {number.name}" in line and "lower --num-workers 2" in line
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and line == f"error: {status['reason']}"


@pytest.mark.slow
def test_a_killed_data_loader_worker_of_one_rank_ends_all(long, tmp_path):
    folder = tmp_path / "run"
    job = Job([*long, "--num-workers", "1", "--save", folder], tmp_path / "log", size=2, by_hand=True)
    assert job.wait_until(lambda: lines(folder) > 5)
    os.kill(child(job.pid(1)), signal.SIGKILL)
    _, codes = job.wait(30)
    assert codes == [1, 1], job.text()[-3000:]
    (line,) = job.errors()
    assert "data loader worker" in line and "killed by SIGKILL" in line and "Traceback" not in job.text()
    assert json.loads((folder / "status.json").read_text())["reason"] in line
