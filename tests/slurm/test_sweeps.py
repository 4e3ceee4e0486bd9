"""A sweep over epochs, size and a regulariser as SLURM job arrays under fire: the table of the local queue."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, environment
from tests.slurm.arrays import Array, parent
from tests.slurm.cluster import NODES
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish, results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(corpus, tmp_path_factory):
    """A sweep of eight runs, four of them on two nodes, and the table of a local queue."""
    folder = tmp_path_factory.mktemp("sweep")
    content = toy(corpus)
    content["flags"] |= {"hidden-size": 128, "num-attention-heads": 4, "eval-interval": 8}
    content["parameters"] = {"train-epochs": [16, 32], "num-layers": [2, 4]}
    dropped = {"objective": "ar", "token-dropout": 0.2, "mlp-dropout": 0.1}
    content["variants"] = {"plain": {"flags": {"objective": "ar"}}, "dropped": {"flags": dropped}}
    two_ranks = {"where": {"variant": "dropped"}, "world_size": 2}
    finish("run", write(folder, content, resources={"rules": [two_ranks]}), folder / "local", "--slots", 2)
    path = write(folder, content, resources={"rules": [two_ranks | {"nodes": 2}], "minutes": 10})
    return path, results(folder / "local")


def test_a_sweep_under_fire_ends_with_the_table_of_the_local_queue(cluster, sweep, tmp_path):
    path, rows = sweep
    array = Array(cluster, path, tmp_path / "array")
    jobs = array.submit()
    assert len(jobs) == 2  # one array for each resource class
    array.wait_until_training()
    for job in jobs:
        cluster.signal(job, "--signal=USR1")
    time.sleep(5)
    array.wait_until_training()
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 2\n")
    options = ("--partition", "high", "--nodes", "2", "--exclusive", "--chdir", str(tmp_path))
    urgent = cluster.submit(tmp_path / "urgent.sh", *options)
    assert cluster.wait_for(urgent, seconds=300)["JobState"] == "COMPLETED"
    os.kill(array.wait_until_training()[0], signal.SIGKILL)
    for node in NODES:
        cluster.kill_slurmd(node)
        cluster.start_slurmd(node)
    os.kill(parent(array.wait_until_training()[-1]), signal.SIGKILL)  # a slurmstepd
    array.wait_until_finished()
    assert results(array.folder) == rows
    assert array.submit("resubmit") == []
    assert "8 runs: 8 finished" in finish("status", path, array.folder)


def test_a_task_whose_point_left_the_plan_says_so(sweep, tmp_path):
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
    array = Array(cluster, path, tmp_path / "cancelled")
    jobs = array.submit()
    array.wait_until_training()
    for job in jobs:
        cluster.signal(job)
    array.wait_for(lambda: not cluster.output("squeue", "--noheader", "--jobs", ",".join(jobs)), restart=False)
    assert "running" not in array.names() and "stopped" in array.names(), array.log()
    resubmitted = array.submit("resubmit")
    assert len(resubmitted) == 2 and array.submit("resubmit") == []  # they are in the queue
