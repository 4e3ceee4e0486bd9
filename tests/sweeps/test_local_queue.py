"""The local queue: real runs, interrupted, killed, failing, hanging, and two queues on one sweep."""

import json
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import pytest

from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.sweeps.local_queue import LocalQueue, QueueOptions, _Job
from megatron.sweeps.plan import plan_sweep, run_id
from megatron.sweeps.points import read_plan
from megatron.sweeps.results import collect
from megatron.sweeps.states import State, run_state
from megatron.sweeps.sweep_file import read_sweep
from megatron.training.run_folder import read_json
from tests.conftest import ROOT, environment
from tests.sweeps.files import forked_runs, toy, write

VOLATILE = ("seconds",)


def start(command, sweep, folder, *options) -> subprocess.Popen:
    """Start tools/sweep.py in a session of its own, so that a test can kill everything below it."""
    words = [sys.executable, "tools/sweep.py", command, str(sweep), "--output", str(folder), *map(str, options)]
    out = open(folder.parent / f"{folder.name}.{command}.txt", "a")  # noqa: SIM115
    return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True)


def finish(command, sweep, folder, *options) -> str:
    """Run tools/sweep.py to its end, in this process and with forked runs; return its output since the first call."""
    output = folder.parent / f"{folder.name}.{command}.txt"
    words = ["sweep.py", command, str(sweep), "--output", str(folder), *map(str, options)]
    main = runpy.run_path(str(ROOT / "tools" / "sweep.py"))["main"]
    with (
        open(output, "a") as file,
        redirect_stdout(file),
        redirect_stderr(file),
        logged_to(file),
        forked_runs(),
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, environment(), clear=True),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert end.value.code in (0, 1, 2)
    return output.read_text()


@contextmanager
def logged_to(file):
    """Log to `file`, too."""
    handler = logging.StreamHandler(file)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def results(folder) -> list[dict]:
    """Return the rows of the collected table without what differs between equal runs."""
    rows = collect(folder, read_plan(folder)).to_pylist()
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(folder):
    """Return a run that is training, with the id of its process; wait for one."""
    while True:
        for point in read_plan(folder) if (folder / "plan.jsonl").exists() else ():
            state = run_state(point.folder(folder))
            if state.name == "running" and state.iteration == 0 and (point.folder(folder) / "status.json").exists():
                return point, int(state.holder.split()[1].removeprefix("process-"))
        time.sleep(0.02)


def steps(folder) -> int:
    """Return the training steps of all runs so far."""
    return sum(run_state(point.folder(folder)).iteration for point in read_plan(folder))


@pytest.fixture(scope="module")
def sweep(corpus, tmp_path_factory):
    """The sweep file, and the table of an uninterrupted queue."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write(folder, toy(corpus))
    output = finish("run", path, folder / "whole", "--slots", 2)
    assert "4 runs: 4 finished; 100% of the FLOPs" in output
    return path, results(folder / "whole")


def test_all_runs_are_trained_and_collected(sweep):
    path, rows = sweep
    folder = path.parent / "whole"
    assert len(rows) == 2 * 2 * (2 + 4)  # variants, sets, validations of both budgets
    assert {row["state"] for row in rows} == {"finished"}
    recorded = json.loads(next((folder / "runs").glob("*/config.json")).read_text())
    conditions = {(row["corpus_hash"], row["vocabulary_size"], row["eval_seed"]) for row in rows}
    expected = (recorded["corpus_hash"], recorded["vocabulary_size"], recorded["validation"]["eval_seed"])
    assert conditions == {expected}
    ends = {(row["variant"], row["train-epochs"]): row["epoch"] for row in rows}
    assert ends == {(variant, epochs): epochs for variant in ("ar", "mdm") for epochs in (4, 8)}
    assert all(row["bound"] == (row["variant"] == "mdm") for row in rows)
    for point in read_plan(folder):  # the training command, in a process of its own, resolves what was planned
        recorded = read_json(point.folder(folder) / "config.json")
        assert run_id(Config.from_recorded(recorded), Plan(**recorded["plan"])) == point.id
        plan = recorded["plan"]
        assert (plan["parameters"], plan["train_samples"]) == (point.parameters, point.train_samples)
    output = finish("run", path, folder, "--slots", 2)  # nothing is left to do
    assert output.count("started") == 4 and output.count("4 runs: 4 finished") == 2
    finish("collect", path, folder)
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + len(rows)
    page = (folder / "status.html").read_text()
    assert page.count("<tr>") == 5 and "4 runs: 4 finished" in page


def test_a_stopped_queue_saves_its_runs_and_resumes(sweep, corpus, tmp_path):
    _, rows = sweep
    path, folder = write(tmp_path, toy(corpus), variants={"ar": {"flags": {"objective": "ar"}}}), tmp_path / "stopped"
    process = start("run", path, folder, "--slots", 2)
    wait_until(lambda: (folder / "plan.jsonl").exists() and steps(folder) >= 1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    states = [run_state(point.folder(folder)).name for point in read_plan(folder)]
    assert "running" not in states and "lost" not in states
    assert "2 runs: 2 finished" in finish("run", path, folder, "--slots", 2)
    assert results(folder) == [row for row in rows if row["variant"] == "ar"]


@pytest.mark.slow
def test_runs_end_when_their_queue_is_killed(sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "orphans"
    process = start("run", path, folder, "--slots", 2)
    wait_until(lambda: (folder / "plan.jsonl").exists() and steps(folder) >= 1)
    process.kill()
    process.wait()
    points = read_plan(folder)
    wait_until(lambda: not any(run_state(point.folder(folder)).name == "running" for point in points), 30)
    assert "4 runs: 4 finished" in finish("run", path, folder, "--slots", 2)
    assert results(folder) == rows


@pytest.mark.slow
def test_two_queues_never_do_a_run_twice(sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "shared"
    finish("plan", path, folder)
    both = [start("run", path, folder, "--slots", 1) for _ in range(2)]
    assert [process.wait(timeout=400) for process in both] == [0, 0]
    assert results(folder) == rows
    for log in (folder / "logs").iterdir():
        assert log.read_text().count("step 1  samples") == 1  # trained once, whoever came second


def test_a_diverging_run_fails_once_with_its_reason_and_the_others_finish(sweep, corpus, tmp_path):
    variants = {"good": {"flags": {"objective": "ar"}}, "bad": {"flags": {"objective": "ar", "lr": "1e30"}}}
    path = write(tmp_path, toy(corpus), variants=variants, parameters={"train-epochs": [4]})
    folder = tmp_path / "diverged"
    output = finish("run", path, folder, "--slots", 2)
    assert "bad, train-epochs 4, seed 1234: failed: step" in output and "is not finite" in output
    assert output.count("started") == 2 and "2 runs: 1 finished, 1 failed" in output
    again = finish("run", path, folder, "--slots", 2)
    assert again.count("started") == 2  # remembered from its folder
    assert finish("run", path, folder, "--slots", 2, "--retry-failed").count("started") == 3


@pytest.mark.slow
def test_a_run_that_fails_for_a_passing_reason_is_started_again(sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "killed"
    process = start("run", path, folder, "--slots", 1)
    _, pid = running(folder)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=400) == 0
    output = (tmp_path / "killed.run.txt").read_text()
    assert "failed (signal SIGKILL); it is started again" in output and output.count("started (") == 5
    assert results(folder) == rows


@pytest.mark.slow
def test_a_hanging_run_is_found_and_started_again(sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "hanging"
    process = start("run", path, folder, "--slots", 1, "--hang-minutes", 0.5)
    _, pid = running(folder)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: "no record for 0.5 minutes" in (tmp_path / "hanging.run.txt").read_text(), 120)
    os.kill(
        pid, signal.SIGKILL
    )  # a stopped process does not see SIGTERM; the queue waits two minutes before it does this
    assert process.wait(timeout=400) == 0
    assert results(folder) == rows


def test_what_this_machine_cannot_run_is_refused_before_anything_starts(sweep, corpus, tmp_path):
    path = write(tmp_path, toy(corpus), resources={"world_size": 2})
    assert "needs 2 ranks, and --slots is 1; raise it" in finish("run", path, tmp_path / "a", "--slots", 1)
    path = write(tmp_path, toy(corpus), resources={"world_size": 2, "nodes": 2})
    assert "needs 2 nodes, and `run` uses this machine alone" in finish("run", path, tmp_path / "b", "--slots", 2)
    assert not (tmp_path / "a" / "runs").exists() and not (tmp_path / "b" / "runs").exists()


def test_a_run_needs_a_device_for_each_rank(corpus, tmp_path):
    path = write(
        tmp_path, toy(corpus), resources={"world_size": 4}, flags=toy(corpus)["flags"] | {"micro-batch-size": 1}
    )
    points = plan_sweep(read_sweep(path), tmp_path / "out").points
    with pytest.raises(ConfigurationError, match="needs 4 ranks on different devices, and this machine has 2"):
        LocalQueue(tmp_path / "out", points, QueueOptions(slots=8, devices=("0", "1")))
    assert len(LocalQueue(tmp_path / "out", points, QueueOptions(slots=4, devices=tuple("0123"))).waiting) == 4


def test_a_queue_goes_on_without_the_logs_that_a_person_removed(corpus, tmp_path):
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus))), tmp_path / "out").points
    queue, job = LocalQueue(tmp_path / "out", points, QueueOptions(slots=1)), _Job(points[0], started=time.time())
    assert not queue._is_hanging(job)
    assert queue._reason(job, State("failed", "the disk is full"), 1) == "the disk is full"


def test_a_run_that_the_kill_switch_stopped_is_left_stopped(corpus, tmp_path):
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus))), tmp_path / "out").points
    queue = LocalQueue(tmp_path / "out", points, QueueOptions(slots=1))
    job = queue.waiting.pop()
    run = job.point.folder(tmp_path / "out")
    run.mkdir(parents=True)
    status = {"state": "stopped", "reason": "--kill-switch-file stop", "iteration": 3, "consumed_samples": 24}
    (run / "status.json").write_text(json.dumps(status))
    queue.running.append(job)
    queue._ended(job, 85)
    assert job not in queue.waiting and not queue.failures
    assert queue.stopped == {job.point.id: "--kill-switch-file stop"}


def test_a_stage_takes_the_best_trials_and_records_how_they_were_chosen(corpus, tmp_path):
    tuning = {"trials": 2, "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 3e-2}}}
    stages = {"tune": {"tuning": tuning}, "final": {"best_of": "tune", "seeds": [1234, 1]}}
    path = write(
        tmp_path,
        toy(corpus),
        stages=stages,
        parameters={"train-epochs": [4]},
        variants=None,
    )
    folder = tmp_path / "staged"
    output = finish("run", path, folder, "--slots", 2)
    assert "3 runs: 3 finished" in output  # the best trial's run is the first of the final stage
    rows = results(folder)
    losses = {}
    for row in rows:
        if row["stage"] == "tune" and row["set"] == "tuning":
            losses[row["trial"]] = min(row["loss"], losses.get(row["trial"], 99))
    best = min(losses, key=losses.get)
    tuned = {row["trial"]: row["lr"] for row in rows if row["stage"] == "tune"}
    assert {row["lr"] for row in rows if row["stage"] == "final"} == {tuned[best]}
    choices = (folder / "choices.json").read_text()
    assert f'"chosen": {best}' in choices and '"set": "tuning"' in choices


@pytest.mark.slow
def test_a_queue_that_is_killed_at_random_moments_ends_like_an_uninterrupted_one(sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "random"
    generator = random.Random(5)
    for _ in range(10):
        process = start("run", path, folder, "--slots", 2)
        time.sleep(generator.uniform(2, 14))
        tree = [process.pid, *children(process.pid)]
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert "4 runs: 4 finished" in finish("run", path, folder, "--slots", 2)
    assert results(folder) == rows


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    descendants = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        descendants += [int(child), *children(int(child))]
    return descendants
