"""What a task of a job array decides, without SLURM: commands of a line stand in for its own."""

import json
import os
import sys

import pytest

from megatron.sweeps import array_task
from megatron.sweeps.array_task import TaskOptions, run_task
from megatron.sweeps.launch import LOCKED
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.states import run_state
from megatron.sweeps.sweep_file import read_sweep
from megatron.sweeps.task_log import TaskLog
from tests.sweeps.files import toy, write
from tests.sweeps.test_full_disk import full_disk
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
    """The environment of a task, whose scontrol records its arguments and sinfo none; the folder of the commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt')
    command(folder, "sinfo", ":")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(array_task, "REQUEUE_SECONDS", 0.1)
    return folder


@pytest.fixture
def branch(corpus, tmp_path):
    """The points of a sweep in tmp_path/out, and a branch among them, whose trunk is task 0 of job 7."""
    flags = toy(corpus)["flags"] | {"lr-decay-style": "WSD", "lr-warmup-samples": 16}
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus), flags=flags)), tmp_path / "out").points
    branch = next(point for point in points if point.trunk)
    jobs = tmp_path / "out" / "slurm"
    jobs.mkdir(parents=True)
    (jobs / "1x1-0.job").write_text("7\n")
    (jobs / "1x1-0.tasks").write_text(f"{branch.trunk}\n")
    return points, branch


def test_a_branch_is_requeued_when_the_controller_does_not_answer(slurm, branch, tmp_path):
    points, point = branch
    command(slurm, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert run_task(tmp_path / "out", points, point.id, TaskOptions()) == LOCKED
    assert "requeue 7_1" in (tmp_path / "scontrol.txt").read_text().splitlines()


def test_a_run_with_checkpoints_of_its_own_does_not_wait_for_a_trunk(slurm, branch, tmp_path):
    points, point = branch
    command(slurm, "squeue", "echo 0")
    command(slurm, "srun", f"touch {tmp_path}/started")
    (tmp_path / "out" / "logs").mkdir()
    own = point.checkpoint(tmp_path / "out", 2)
    own.mkdir(parents=True)
    run_task(tmp_path / "out", points, point.id, TaskOptions())
    assert (tmp_path / "started").exists()


def test_a_run_that_uploads_after_its_end_is_not_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(array_task, "POLL", 0.05)
    monkeypatch.setattr(array_task, "END_SECONDS", 0.3)
    run = tmp_path / "run"
    assert array_task._train([sys.executable, "-c", TRACKERS_UPLOAD, str(run)], run, 1.0).code == 0


def task_log(folder, restarts):
    return TaskLog(folder, "abc", task="7_1", restarts=restarts)


def failures(folder, failing, restarts):
    """Note a failure of task 7_1; return how many it has had, and on which nodes."""
    return task_log(folder, restarts).failure(nodes="n[1-2]", failing=failing, code=1)


def test_failures_are_counted_over_torn_lines_and_restarts_where_the_log_cannot_be_written(tmp_path):
    log = tmp_path / "logs" / "abc.failures.jsonl"
    log.parent.mkdir()
    other = {"time": 0, "job": "7_2", "restart": 0, "nodes": "n9", "failing": ["n9"], "code": 1}
    log.write_text(f'{json.dumps(other)}\n7\n{{"job": "7_1", "fai')
    assert failures(tmp_path, ["n1"], 0) == (1, ["n1"])
    assert failures(tmp_path, ["n2"], 5) == (2, ["n1", "n2"])  # preemptions in between are none
    log.unlink()
    log.mkdir()
    assert [failures(tmp_path, ["n3"], restarts) for restarts in (0, 1, 2)] == [(n, ["n3"]) for n in (1, 2, 3)]


def record(folder, step):
    """Write records of a run up to a step."""
    run = folder / "runs" / "abc"
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text(json.dumps({"iteration": step}) + "\n")


def test_starts_without_a_new_record_or_checkpoint_are_counted(tmp_path):
    (tmp_path / "logs").mkdir()
    assert [task_log(tmp_path, restarts).start() for restarts in range(3)] == [0, 1, 2]
    record(tmp_path, 5)
    assert [task_log(tmp_path, restarts).start() for restarts in (3, 4)] == [0, 1]
    record(tmp_path, 3)  # the records after the checkpoint that a start loads are gone
    assert task_log(tmp_path, 5).start() == 2
    record(tmp_path, 4)  # further than this start, but not as far as an earlier one
    assert task_log(tmp_path, 6).start() == 3
    (tmp_path / "runs" / "abc" / "checkpoints" / "iter_0000006").mkdir(parents=True)
    assert [task_log(tmp_path, restarts).start() for restarts in (7, 8)] == [0, 1]
    task_log(tmp_path, 8).wait()  # another process trained it
    assert task_log(tmp_path, 9).start() == 1
    assert TaskLog(tmp_path, "abc", task="8_1", restarts=0).start() == 0
    task_log(tmp_path, 9).stop()
    assert task_log(tmp_path, 10).start() == 0


def test_starts_are_bounded_where_their_log_cannot_be_written(tmp_path):
    (tmp_path / "logs").mkdir()
    assert task_log(tmp_path, 4).start() == 0
    record(tmp_path, 5)
    with full_disk(1):
        assert [task_log(tmp_path, restarts).start() for restarts in (5, 6, 7)] == [0, 1, 2]


SCONTROL = """
case "$*" in
  *"show job"*) echo "JobState=RUNNING Reason=None Restarts=0 ExcNodeList=n[3-4]" ;;
  "show hostnames n[3-4]") printf 'n3\\nn4\\n' ;;
  "show hostnames "*) echo "$3" ;;
  *) echo "$@" >> {log} ;;
esac
"""


@pytest.mark.parametrize("nodes, excluded", [(9, ["n1,n3,n4"]), (3, [])])
def test_a_failing_node_is_excluded_next_to_those_of_the_site(nodes, excluded, slurm, corpus, tmp_path, monkeypatch):
    command(slurm, "scontrol", SCONTROL.format(log=tmp_path / "scontrol.txt"))
    command(slurm, "srun", "exit 1")
    command(slurm, "sinfo", f"echo {nodes}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus))), tmp_path / "out").points
    (tmp_path / "out" / "logs").mkdir(parents=True)
    assert run_task(tmp_path / "out", points, points[0].id, TaskOptions()) == 1
    lines = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert lines == ["requeue 7_1", *(f"update JobId=7_1 ExcNodeList={names}" for names in excluded)]


@pytest.mark.parametrize("failed_in, starts", [("job-6_1", 1), ("job-7_1", 0)])
def test_a_run_that_failed_before_this_job_is_retried_after_a_requeue_too(
    failed_in, starts, slurm, corpus, tmp_path, monkeypatch
):
    command(slurm, "srun", f"echo start >> {tmp_path}/starts.txt")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # preempted before its first start wrote a status
    points = plan_sweep(read_sweep(write(tmp_path, toy(corpus))), tmp_path / "out").points
    run = points[0].folder(tmp_path / "out")
    run.mkdir(parents=True)
    status = {"state": "failed", "reason": "CUDA out of memory", "iteration": 3, "consumed_samples": 24}
    (run / "status.json").write_text(json.dumps(status | {"job": failed_in}))
    run_task(tmp_path / "out", points, points[0].id, TaskOptions(retry_failed=True))
    assert (tmp_path / "starts.txt").exists() == bool(starts)


def counted_starts(folder, points, restarts, monkeypatch) -> int:
    """Start a task whose run never begins so often; return the exit code of the last start."""
    for restart in restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        code = run_task(folder, points, points[0].id, TaskOptions())
    return code


def test_a_run_that_never_gets_past_its_start_fails_and_is_not_requeued(slurm, corpus, tmp_path, monkeypatch):
    """Its sruns end like those of preempted runs: with 0, before anything was written."""
    path, folder = write(tmp_path, toy(corpus), parameters={"train-epochs": [4]}), tmp_path / "out"
    points = plan_sweep(read_sweep(path), folder).points
    (folder / "logs").mkdir(parents=True)
    command(slurm, "srun", f"echo >> {tmp_path}/srun.txt")
    requeued = ["requeue 7_1"] * 3
    assert counted_starts(folder, points, range(3), monkeypatch) == 0
    commands = (tmp_path / "scontrol.txt").read_text().splitlines
    assert [line for line in commands() if "requeue" in line] == requeued
    assert counted_starts(folder, points, [3], monkeypatch) == 1
    state = run_state(points[0].folder(folder))
    assert state.name == "failed" and not state.has_own_fault
    assert state.reason.startswith(
        "3 starts of job 7_1 brought neither a record nor a checkpoint (last state: waiting)"
    )
    assert len((tmp_path / "srun.txt").read_text().splitlines()) == 3
    assert counted_starts(folder, points, [4], monkeypatch) == 0  # a person has requeued it
    assert len((tmp_path / "srun.txt").read_text().splitlines()) == 4


def test_requeues_are_bounded_where_nothing_can_be_written(slurm, corpus, tmp_path, monkeypatch):
    path, folder = write(tmp_path, toy(corpus), parameters={"train-epochs": [4]}), tmp_path / "out"
    points = plan_sweep(read_sweep(path), folder).points
    folder.mkdir()
    (folder / "logs").write_text("")
    (folder / "runs").write_text("")
    command(slurm, "srun", f"echo >> {tmp_path}/srun.txt; exit 1")
    assert counted_starts(folder, points, range(6), monkeypatch) == 1
    assert len((tmp_path / "srun.txt").read_text().splitlines()) == 3
    assert (tmp_path / "scontrol.txt").read_text().splitlines().count("requeue 7_1") == 2
