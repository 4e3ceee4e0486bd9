"""What a task of a job array decides, without SLURM: commands of a line stand in for its own."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from megatron.sweeps import array_task
from megatron.sweeps.array_task import TaskOptions, run_task
from megatron.sweeps.launch import LOCKED
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.sweep_file import read_sweep
from tests.sweeps.files import toy, write
from tests.sweeps.test_slurm_scripts import command

TRACKERS_UPLOAD = """
import fcntl, json, os, sys, time
os.makedirs(sys.argv[1])
lock = open(sys.argv[1] + "/lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
time.sleep(0.3)
open(sys.argv[1] + "/status.json", "w").write(json.dumps({"state": "finished"}))
time.sleep(1)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a task, whose scontrol records its arguments; the folder of the commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(array_task, "REQUEUE_SECONDS", 0.1)
    return folder


def test_a_branch_is_requeued_when_the_controller_does_not_answer(slurm, corpus, tmp_path):
    flags = toy(corpus)["flags"] | {"lr-decay-style": "WSD", "lr-warmup-samples": 16}
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus), flags=flags)), tmp_path / "out").points
    branch = next(point for point in points if point.trunk)
    command(slurm, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    jobs = tmp_path / "out" / "slurm"
    jobs.mkdir(parents=True)
    (jobs / "1x1-0.job").write_text("7\n")
    (jobs / "1x1-0.tasks").write_text(f"{branch.trunk}\n")
    assert run_task(tmp_path / "out", points, branch.id, TaskOptions()) == LOCKED
    assert "requeue 7_1" in (tmp_path / "scontrol.txt").read_text().splitlines()


def test_a_run_that_uploads_after_its_end_is_not_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(array_task, "POLL", 0.05)
    monkeypatch.setattr(array_task, "END_SECONDS", 0.3)
    run = tmp_path / "run"
    assert array_task._train([sys.executable, "-c", TRACKERS_UPLOAD, str(run)], run, 1.0) == 0


def failures(folder, failing):
    """Note a failure of task 7_1; return how many it has had, and on which nodes."""
    task, point = SimpleNamespace(name="7_1", nodes="n[1-2]"), SimpleNamespace(id="abc", label="point")
    return array_task._note_failure(folder, point, task=task, code=1, failing=failing)


def test_failures_are_counted_over_torn_lines_and_where_the_log_cannot_be_written(tmp_path):
    log = tmp_path / "logs" / "abc.failures.jsonl"
    log.parent.mkdir()
    other = json.dumps({"job": "7_2", "failing": ["n9"]})
    log.write_text(f'{other}\n7\n{{"job": "7_1", "fai')
    assert failures(tmp_path, ["n1"]) == (1, ["n1"])
    assert failures(tmp_path, ["n2"]) == (2, ["n1", "n2"])
    log.unlink()
    log.mkdir()
    assert failures(tmp_path, ["n3"]) == (1, ["n3"])
