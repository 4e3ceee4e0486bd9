"""The batch scripts of docs/running.md on SLURM: signalled, preempted and requeued jobs equal an uninterrupted run."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, entry, environment, records, run
from tests.slurm.cluster import FINAL, NODES, Cluster
from tests.training.jobs import lines, newest
from tests.training.runs import status

pytestmark = pytest.mark.slow

SECTION = (ROOT / "docs" / "running.md").read_text().partition("## SLURM")[2]
SRUN, TORCHRUN = re.findall(r"^```bash\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)[:2]


@pytest.fixture(scope="module")
def flags(corpus):
    """A run of 40 steps of some tenths of a second."""
    return [
        *"--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --fp32 --no-compile".split(),
        *"--micro-batch-size 4 --global-batch-size 16 --train-samples 640 --lr 1e-3 --log-interval 1".split(),
        *"--eval-interval 20 --eval-samples 8 --save-interval 10 --tokenizer-type ByteTokenizer".split(),
        *["--train-data-path", f"{corpus}/train", "--valid-data-path", f"tuning={corpus}/tuning"],
    ]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The records of the same run on two ranks without SLURM."""
    folder = tmp_path_factory.mktemp("unbroken")
    run("mdm", *flags, "--save", folder, processes=2)
    return records(folder)


def adapt(script: str, flags: list, folder: Path, tasks: int = 1) -> Path:
    """Write a documented script adapted to this machine: its python, test flags, `tasks` of one core per node.

    Jobs run in `folder`, which has no .venv.
    """
    for pattern, replacement in (
        (r"source \.venv/bin/activate\n", ""),
        (r"--gpus-per-node \d+ --cpus-per-task \d+ --mem 0", "--cpus-per-task 1"),
        (r"--ntasks-per-node \d+", f"--ntasks-per-node {tasks}"),
        (r"--nproc-per-node \d+", f"--nproc-per-node {tasks}"),
        (r"\btorchrun\b", f"{sys.executable} -m torch.distributed.run"),
        (r"\bpython (?=pretrain)", f"{sys.executable} "),
        (r"pretrain_mdm.py \.\.\.", " ".join([entry("mdm"), *map(str, flags)])),
        (r"runs/mine", str(folder / "run")),
    ):
        script, count = re.subn(pattern, replacement, script)
        assert count or pattern.startswith((r"\b", "--nproc")), pattern
    path = folder / "job.sh"
    path.write_text(script)
    return path


class Submitted:
    """A job that trains in `folder`/run."""

    def __init__(self, cluster: Cluster, script: Path, *options: str):
        self.cluster, self.folder = cluster, script.parent
        cluster.env |= {name: environment()[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        self.id = cluster.submit(script, "--chdir", str(self.folder), *options)

    def train_until(self, count: int, seconds: float = 180) -> None:
        """Return when the run has `count` records and is running."""
        deadline = time.monotonic() + seconds
        while lines(self.folder / "run") < count or status(self.folder / "run")["state"] != "running":
            state = self.cluster.describe(self.id).get("JobState")
            assert state not in FINAL and time.monotonic() < deadline, f"{state}\n{self.log}"
            time.sleep(0.05)

    def requeued(self) -> None:
        """Wait until the job is pending again, check that its run was saved when it stopped, and start it."""
        self.cluster.wait_for(self.id, "PENDING")
        stopped = status(self.folder / "run")
        assert stopped["state"] == "stopped" and stopped["iteration"] == newest(self.folder / "run"), self.log
        self.cluster.start_requeued(self.id)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


@pytest.mark.parametrize("script", [SRUN, TORCHRUN], ids=["srun", "torchrun"])
def test_a_job_that_is_signalled_is_requeued_and_ends_like_an_unbroken_run(script, cluster, flags, unbroken, tmp_path):
    job = Submitted(cluster, adapt(script, flags, tmp_path))
    for count, names in ((4, ["USR1"]), (14, ["TERM", "TERM"]), (24, ["USR2", "TERM"])):
        job.train_until(count)
        for name in names:
            cluster.signal(job.id, f"--signal={name}")
        job.requeued()
    ended = cluster.wait_for(job.id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "3"), job.log
    assert records(tmp_path / "run") == unbroken


def test_a_preempted_job_is_requeued_and_ends_like_an_unbroken_run(cluster, flags, unbroken, tmp_path):
    job = Submitted(cluster, adapt(SRUN, flags, tmp_path))
    job.train_until(4)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 2\n")
    urgent = cluster.submit(
        tmp_path / "urgent.sh", "--partition", "high", "--nodes", "2", "--exclusive", "--chdir", str(tmp_path)
    )
    cluster.wait_for(job.id, "PENDING")
    assert status(tmp_path / "run")["state"] == "stopped", job.log
    assert cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    job.requeued()
    assert cluster.wait_for(job.id)["JobState"] == "COMPLETED", job.log
    assert records(tmp_path / "run") == unbroken


def test_a_cancelled_job_saves_and_is_not_requeued(cluster, flags, tmp_path):
    job = Submitted(cluster, adapt(SRUN, flags, tmp_path))
    job.train_until(4)
    cluster.signal(job.id)
    ended = cluster.wait_for(job.id)
    deadline = time.monotonic() + 40  # processes of a cancelled job have KillWait seconds
    while status(tmp_path / "run")["state"] != "stopped":
        assert time.monotonic() < deadline, job.log
        time.sleep(0.1)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert status(tmp_path / "run")["iteration"] == newest(tmp_path / "run") >= 4


def test_tasks_of_an_array_share_a_node_and_are_named_as_squeue_names_them(cluster, flags, tmp_path):
    script = adapt(SRUN, [*flags, "--train-samples", "160"], tmp_path)
    script.write_text(script.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/run-$SLURM_ARRAY_TASK_ID"))
    options = ("--nodes", "1", "--ntasks-per-node", "1", "--nodelist", NODES[0], "--array", "0-1")
    job = cluster.submit(script, "--chdir", str(tmp_path), "--output", "%a.log", *options)
    deadline = time.monotonic() + 180
    while set(states(cluster, job)) != {"COMPLETED"}:
        assert time.monotonic() < deadline, cluster.output("scontrol", "show", "job", job)
        time.sleep(0.2)
    for task in (0, 1):
        finished = json.loads((tmp_path / f"run-{task}" / "status.json").read_text())
        assert (finished["state"], finished["job"]) == ("finished", f"job-{job}_{task}")
    assert records(tmp_path / "run-0") == records(tmp_path / "run-1")


def states(cluster: Cluster, job: str) -> list[str]:
    return re.findall(r"JobState=(\w+)", cluster.output("scontrol", "--oneliner", "show", "job", job)) or ["none"]
