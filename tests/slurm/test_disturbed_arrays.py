"""One task of an array under fire: time limits, killed daemons, hanging and cut-off runs; each ends to the bit."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.arrays import SITE, Array, parent, pause, resume, was_signalled
from tests.slurm.cluster import NODES
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish, results, start
from tests.sweeps.test_slurm_scripts import command
from tests.training.jobs import alive
from tests.training.test_trackers import offline_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def content(corpus):
    """A sweep of one run of 96 steps."""
    content = toy(corpus)
    content["flags"] |= {"num-layers": 4, "hidden-size": 128, "num-attention-heads": 4, "eval-interval": 24}
    return content | {"parameters": {"train-epochs": [48]}, "variants": {"mdm": {"flags": {"objective": "mdm"}}}}


@pytest.fixture(scope="module")
def tables(content, tmp_path_factory):
    """The table of an uninterrupted local run, by world size."""
    folder, tables = tmp_path_factory.mktemp("local"), {}
    for size in (1, 2):
        path = write(folder, content, resources={"world_size": size})
        finish("run", path, folder / str(size), "--slots", size)
        tables[size] = results(folder / str(size))
    return tables


@pytest.fixture
def submitted(cluster, content, tmp_path):
    """Submit the run on one node or two; return the array and its job."""

    def submit(nodes: int = 1, minutes: int = 10, flags: dict | None = None, **site) -> tuple[Array, str]:
        resources = {"world_size": nodes, "nodes": nodes, "minutes": minutes}
        path = write(tmp_path, content, flags=content["flags"] | (flags or {}), resources=resources)
        array = Array(cluster, path, tmp_path / "array", **site)
        (job,) = array.submit()
        return array, job

    return submit


def limit_now(array: Array, job: str) -> None:
    """Let the time limit of a job end in at most a minute."""
    hours, minutes, seconds = map(int, array.job(job)["RunTime"].split(":"))
    assert not hours
    limit = minutes + 1 + (seconds > 50)
    array.cluster.output("scontrol", "update", f"JobId={job}_0", f"TimeLimit={limit}")


def raise_limit(array: Array, job: str) -> None:
    """Wait until a stopped run is requeued; give it time to finish."""
    array.wait_for(lambda: array.names() == ["stopped"], 60, restart=False)
    array.wait_for(lambda: array.job(job)["JobState"] == "PENDING", 60, restart=False)
    array.cluster.output("scontrol", "update", f"JobId={job}_0", "TimeLimit=10")


def test_a_run_saves_before_its_time_limit_and_continues_its_tracking(submitted, tables):
    flags = {"wandb-project": "tests", "wandb-group": "limits"}
    array, job = submitted(nodes=2, flags=flags)
    ranks = array.wait_until_training(4)
    pause(ranks)
    limit_now(array, job)
    array.wait_for(lambda: any(was_signalled(rank, signal.SIGUSR1) for rank in ranks), 120)
    resume(ranks)
    raise_limit(array, job)
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), array.log()
    assert results(array.folder) == tables[2]
    identity = json.loads((array.run() / "wandb.json").read_text())["id"]
    starts = [record.run for log in offline_runs(array.run()) for record in log if record.HasField("run")]
    assert {(start.run_id, start.run_group) for start in starts} == {(identity, "limits")}


def test_a_run_that_its_time_limit_ends_is_requeued(submitted, tables):
    array, job = submitted(sbatch=["--signal=B:URG@1"])  # no signal before the limit
    ranks = array.wait_until_training(4)
    pause(ranks)
    limit_now(array, job)
    array.wait_for(lambda: any(was_signalled(rank, signal.SIGTERM) for rank in ranks), 150)
    resume(ranks)
    raise_limit(array, job)
    array.wait_until_finished()
    assert results(array.folder) == tables[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_slurmstepd_of_the_step_ends_its_ranks_and_the_run_is_retried(nodes, submitted, tables):
    array, job = submitted(nodes=nodes)
    ranks = array.wait_until_training(4)
    os.kill(parent(ranks[-1]), signal.SIGKILL)
    killed = time.monotonic()
    array.wait_for(lambda: not any(map(alive, ranks)), 30, restart=False)
    print(f"ranks ended {time.monotonic() - killed:.1f} s after their slurmstepd")
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), array.log()
    assert "srun has not ended 60 seconds after its run; it is ended" in array.log()
    assert results(array.folder) == tables[nodes]


def test_a_killed_slurmstepd_of_the_batch_script_leaves_no_job_behind(submitted, tables):
    array, job = submitted()
    ranks = array.wait_until_training(4)
    os.kill(stepd(array, job, "batch"), signal.SIGKILL)
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert not any(map(alive, ranks))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), array.log()
    assert results(array.folder) == tables[1]


def stepd(array: Array, job: str, step: str) -> int:
    number = array.cluster.output("squeue", "--noheader", "--jobs", f"{job}_0", "--format", "%A").strip()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if title.startswith(f"slurmstepd: [{number}.{step}]"):
            return int(path.name)
    raise AssertionError(f"no slurmstepd of {number}.{step}")


def test_a_job_survives_a_restart_of_its_node_daemon(submitted, tables):
    array, job = submitted(nodes=2)
    array.wait_until_training(4)
    for node in NODES:
        array.cluster.kill_slurmd(node)
    time.sleep(3)
    for node in NODES:
        array.cluster.start_slurmd(node)
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), array.log()
    assert results(array.folder) == tables[2]


def test_an_orphan_on_a_lost_node_and_its_successor_never_write_together(submitted, tables):
    array, job = submitted(wait_for_lock_minutes=0.1)
    orphans = array.wait_until_training(4)
    pause(orphans)  # it trains on later, and holds the lock meanwhile
    node = array.job(job)["NodeList"]
    array.cluster.kill_slurmd(node)
    array.cluster.output("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    array.wait_for(lambda: "is writing this run, even after --wait-for-lock 0.1" in array.log())
    array.wait_for(lambda: array.job(job)["JobState"] == "PENDING", 60, restart=False)  # to wait for the lock again
    assert array.names() == ["running"]
    resume(orphans)
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["NodeList"] != node, array.log()
    assert "tuning loss" not in array.log()  # trained by the orphan alone, whose output is lost with its srun
    assert results(array.folder) == tables[1]


def test_a_hanging_run_is_ended_and_started_on_another_node(submitted, tables):
    array, job = submitted(hang_minutes=0.4, wait_for_lock_minutes=0.2)
    ranks = array.wait_until_training(4)
    node = array.job(job)["NodeList"]
    pause(ranks)
    array.wait_for(lambda: "no output for 0.4 minutes; the run is ended" in array.log(), 90, restart=False)
    array.wait_for(lambda: array.job(job)["JobState"] == "PENDING", 120, restart=False)
    array.wait_for(lambda: array.job(job)["ExcNodeList"] == node, 20, restart=False)
    assert not any(map(alive, ranks))
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["NodeList"] != node, array.log()
    assert results(array.folder) == tables[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_node_of_a_killed_rank_is_in_the_log_of_failures(rank, submitted, tables):
    """Rank 0 writes the status of the run, so that its own death leaves no reason there."""
    array, job = submitted(nodes=2)
    variable = f"SLURM_PROCID={rank}\0".encode()
    ranks = array.wait_until_training(4)
    (victim,) = [pid for pid in ranks if variable in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    array.wait_until_finished()
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), array.log()
    (failure,) = [json.loads(line) for line in failures(array)]
    assert failure["failing"] == [NODES[rank]], array.log()
    assert results(array.folder) == tables[2]


def test_the_node_of_a_rank_that_fails_before_the_run_starts_is_in_the_log_of_failures(submitted, tmp_path):
    script = '[ $SLURM_PROCID = 1 ] && kill -9 $$; exec "$@"'
    setup = put_first(
        tmp_path, "srun", f"option=$1; shift; exec {shutil.which('srun')} $option sh -c '{script}' sh \"$@\""
    )
    array, job = submitted(nodes=2, setup=setup, retries=0)
    assert array.wait_until_ended(job)["JobState"] == "FAILED"
    (failure,) = [json.loads(line) for line in failures(array)]
    assert failure["failing"] == [NODES[1]], array.log()


def put_first(folder: Path, name: str, script: str) -> str:
    """Write a command; return a setup of a site that puts it before others of its name."""
    command(folder, name, script)
    return f"{SITE['setup']}\nexport PATH={folder}:$PATH"


def failures(array: Array) -> list[str]:
    (path,) = (array.folder / "logs").glob("*.failures.jsonl")
    return path.read_text().splitlines()


def test_a_run_that_is_requeued_again_and_again_before_it_starts_fails(submitted, tmp_path):
    """Its srun ends with 0, as if it had been stopped in time."""
    array, job = submitted(setup=put_first(tmp_path, "srun", "exit 0"))
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "3"), array.log()
    (state,) = array.states().values()
    assert state.name == "failed" and state.reason.startswith(f"3 starts of job {job}_0 brought neither a record")


def test_two_local_queues_and_an_array_train_every_point_once(cluster, content, tmp_path):
    path = write(tmp_path, content, parameters={"train-epochs": [16, 18, 20, 24]})
    finish("run", path, tmp_path / "local", "--slots", 2)
    array = Array(cluster, path, tmp_path / "array")
    (job,) = array.submit()
    words = ["run", path, array.folder, "--slots", 1]
    queues = [start(*words) for _ in range(2)]
    assert [queue.wait(timeout=500) for queue in queues] == [0, 0]
    array.wait_for(lambda: not cluster.output("squeue", "--noheader", "--jobs", job).strip())
    assert results(array.folder) == results(tmp_path / "local")
    text = "".join(log.read_text() for log in (array.folder / "logs").glob("*.log"))
    assert text.count("finished at step") == text.count("step 24  tuning") == 4
    assert "failed" not in text


def test_a_mistake_is_not_repeated(submitted, corpus, tmp_path):
    """The data are gone when the tasks start: both ranks exit, one of them by srun's signal."""
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", corpus, data], check=True)
    flags = {"train-data-path": f"{data}/train"}
    array, job = submitted(nodes=2, flags=flags, setup=f"rm -rf {data}")
    ended = array.wait_until_ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), array.log()


def test_data_on_the_disks_of_the_nodes(cluster, content, tables, corpus, tmp_path):
    """`setup` copies the data; where the sweep is submitted they are not on the disk."""
    disk = cluster.root / "disk"
    flags = {"train-data-path": f"{disk}/data/train", "valid-data-path": [f"tuning={disk}/data/tuning"]}
    resources = {"world_size": 2, "nodes": 2, "minutes": 10}
    sizes = {"unique_tokens": 512, "vocabulary_size": 257}
    path = write(tmp_path, content, flags=content["flags"] | flags, resources=resources, data=sizes)
    copy = f"flock {disk}/lock cp -r {corpus} {disk}/data"
    setup = f"{SITE['setup']}\nsrun --ntasks-per-node=1 --ntasks=$SLURM_NNODES {copy}"
    array = Array(cluster, path, tmp_path / "array", setup=setup)
    (job,) = array.submit()
    array.wait_until_finished()
    losses = [row["loss"] for row in tables[2] if row["set"] == "tuning"]
    assert [row["loss"] for row in results(array.folder)] == losses
    assert [(cluster.root / "disks" / node / "data" / "train.bin").exists() for node in NODES] == [True, True]
    assert not disk.joinpath("data").exists() and array.wait_until_ended(job)["JobState"] == "COMPLETED"
