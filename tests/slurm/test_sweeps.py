"""A sweep as SLURM job arrays: signalled, preempted and killed tasks end with the table of the local queue."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from megatron.sweeps.points import read_plan
from megatron.sweeps.states import run_state
from tests.conftest import ROOT, environment
from tests.slurm.cluster import Cluster, missing
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish, results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started.start()


@pytest.fixture(scope="module")
def sweep(corpus, tmp_path_factory):
    """A sweep of four longer runs, two of them on two nodes, with its site file, and the table of a local queue."""
    folder = tmp_path_factory.mktemp("sweep")
    content = toy(corpus)
    content["flags"] |= {"num-layers": 4, "hidden-size": 128, "num-attention-heads": 4, "eval-interval": 8}
    rules = [{"where": {"variant": "mdm"}, "world_size": 2, "nodes": 2}]
    path = write(folder, content, parameters={"train-epochs": [8, 24]}, resources={"rules": rules, "minutes": 10})
    site = {"gpus": False, "cores_per_rank": 1, "signal_seconds": 60, "wait_for_lock_minutes": 1}
    site |= {"setup": "export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=", "python": sys.executable}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    local = write(folder, content, parameters={"train-epochs": [8, 24]}, resources={"rules": [rules[0] | {"nodes": 1}]})
    finish("run", local, folder / "local", "--slots", 2)
    write(folder, content, parameters={"train-epochs": [8, 24]}, resources={"rules": rules, "minutes": 10})
    return path, results(folder / "local")


def submit(cluster, command, path, folder) -> list[str]:
    """Submit the sweep; return the ids of its job arrays."""
    words = [sys.executable, "tools/sweep.py", command, str(path), "--output", str(folder)]
    words += ["--site", str(path.parent / "site.yaml")]
    done = subprocess.run(words, cwd=ROOT, env=environment() | cluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"submitted: job (\d+)", done.stdout)
    cluster.jobs += jobs
    return jobs


def states(folder) -> dict[str, str]:
    return {point.id: run_state(point.folder(folder)).name for point in read_plan(folder)}


def wait_until_finished(cluster, folder, seconds=420) -> None:
    """Wait until all runs have finished; requeued tasks start at once, not after SLURM's two minutes."""
    deadline = time.monotonic() + seconds
    while set(states(folder).values()) != {"finished"}:
        assert time.monotonic() < deadline, (states(folder), cluster.output("squeue"), logs(folder))
        for job in cluster.output("squeue", "--noheader", "--states", "PENDING", "--format", "%A %r").splitlines():
            number, _, reason = job.partition(" ")
            if reason == "BeginTime":
                cluster.output("scontrol", "update", f"JobId={number}", "StartTime=now")
        time.sleep(1)


def logs(folder) -> str:
    return "".join(path.read_text()[-1500:] for path in (folder / "logs").glob("slurm-*.log"))


def wait_for_running(folder, seconds=180) -> None:
    deadline = time.monotonic() + seconds
    while "running" not in states(folder).values():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.1)


def test_signalled_preempted_and_killed_tasks_end_with_the_table_of_the_local_queue(cluster, sweep, tmp_path):
    path, rows = sweep
    folder = tmp_path / "array"
    jobs = submit(cluster, "submit", path, folder)
    assert len(jobs) == 2  # one array for each resource class
    wait_for_running(folder)
    for job in jobs:
        cluster.signal(job, "--signal=USR1")
    time.sleep(5)
    wait_until_running_again(cluster, folder)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 2\n")
    options = ("--partition", "high", "--nodes", "2", "--exclusive", "--chdir", str(tmp_path))
    urgent = cluster.submit(tmp_path / "urgent.sh", *options)
    assert cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    wait_until_running_again(cluster, folder)
    kill_one_rank(folder)
    wait_until_finished(cluster, folder)
    assert results(folder) == rows
    assert submit(cluster, "resubmit", path, folder) == []
    assert "4 runs: 4 finished" in finish("status", path, folder)


def wait_until_running_again(cluster, folder) -> None:
    deadline = time.monotonic() + 240
    while "running" not in states(folder).values() and set(states(folder).values()) != {"finished"}:
        assert time.monotonic() < deadline, logs(folder)
        for job in cluster.output("squeue", "--noheader", "--states", "PENDING", "--format", "%A").split():
            cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)


def kill_one_rank(folder) -> None:
    for point in read_plan(folder):
        state = run_state(point.folder(folder))
        if state.name == "running":
            os.kill(int(state.holder.split()[1].removeprefix("process-")), signal.SIGKILL)
            return


def test_a_task_whose_point_left_the_plan_says_so(cluster, sweep, corpus, tmp_path):
    path, _ = sweep
    folder = tmp_path / "changed"
    finish("plan", path, folder)
    (folder / "tasks").write_text("0123456789\n")
    words = [sys.executable, "tools/sweep.py", "run-task", str(folder), "--tasks", str(folder / "tasks")]
    for index, message in (("0", "the plan no longer has the point 0123456789"), ("1", "names none of the 1 tasks")):
        env = environment() | {"SLURM_ARRAY_TASK_ID": index}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_cancelled_array_saves_and_is_not_requeued(cluster, sweep, tmp_path):
    path, _ = sweep
    folder = tmp_path / "cancelled"
    jobs = submit(cluster, "submit", path, folder)
    wait_for_running(folder)
    for job in jobs:
        cluster.signal(job)
    deadline = time.monotonic() + 90
    while cluster.output("squeue", "--noheader", "--jobs", ",".join(jobs)):
        assert time.monotonic() < deadline, cluster.output("squeue")
        time.sleep(1)
    assert "running" not in states(folder).values()
    assert "stopped" in states(folder).values(), logs(folder)
    resubmitted = submit(cluster, "resubmit", path, folder)
    assert len(resubmitted) == 2 and submit(cluster, "resubmit", path, folder) == []  # they are in the queue
    for job in resubmitted:
        cluster.signal(job)
