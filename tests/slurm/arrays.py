"""A sweep in the queue of a real SLURM: submit it, find and disturb its processes, wait for its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from megatron.sweeps.points import Point, read_plan
from megatron.sweeps.states import State, run_state
from tests.conftest import ROOT, environment
from tests.slurm.cluster import Cluster
from tests.training.jobs import alive, lines

SITE = {
    "gpus": False,
    "cores_per_rank": 1,
    "signal_seconds": 60,
    "wait_for_lock_minutes": 1,
    "setup": "export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=",
    "python": sys.executable,
}


class Array:
    """A sweep file with its site, and the sweep folder in which SLURM trains it."""

    def __init__(self, cluster: Cluster, sweep: Path, folder: Path, **site):
        self.cluster, self.sweep, self.folder = cluster, sweep, folder
        self.pending: dict[str, float] = {}
        self.site = folder.parent / f"{folder.name}.site.yaml"
        self.site.write_text(yaml.safe_dump(SITE | site))

    def submit(self, command: str = "submit") -> list[str]:
        """Submit the sweep; return the ids of its job arrays."""
        words = [sys.executable, "tools/sweep.py", command, str(self.sweep), "--output", str(self.folder)]
        done = subprocess.run(
            [*words, "--site", str(self.site)],
            cwd=ROOT,
            env=environment() | self.cluster.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        jobs = re.findall(r"submitted: job (\d+)", done.stdout)
        self.cluster.jobs += jobs
        return jobs

    # ------------------------------------------------------------------------------------------------- the runs

    @property
    def points(self) -> list[Point]:
        return read_plan(self.folder)

    def run(self) -> Path:
        """Return the run folder of the only point."""
        (point,) = self.points
        return point.folder(self.folder)

    def states(self) -> dict[str, State]:
        return {point.id: run_state(point.folder(self.folder)) for point in self.points}

    def names(self) -> list[str]:
        return [state.name for state in self.states().values()]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("slurm-*.log")))

    def wait_for(self, condition: Callable[[], object], seconds: float = 300, restart: bool = True) -> None:
        """Wait until a condition holds; with `restart`, requeued tasks start at once and not after two minutes."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.names()}\n{self.cluster.output('squeue')}\n{self.log()[-4000:]}"
            if restart:
                self.start_requeued()
            time.sleep(0.3)

    def start_requeued(self) -> None:
        queue = self.cluster.output("squeue", "--noheader", "--states", "PENDING", "--format", "%A %r")
        requeued = [line.split()[0] for line in queue.splitlines() if line.split()[1:] == ["BeginTime"]]
        now = time.monotonic()
        self.pending = {job: self.pending.get(job, now) for job in requeued}
        for job, since in self.pending.items():
            if now > since + 3:  # a node rejects a job that it ended in the same second: "Job credential revoked"
                self.cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_until_finished(self) -> None:
        self.wait_for(lambda: set(self.names()) == {"finished"}, 600)

    def wait_until_training(self, count: int = 1) -> list[int]:
        """Return the process ids of all ranks of a run that has `count` records and is training."""

        def training() -> list[int]:
            for point in self.points:
                run = point.folder(self.folder)
                if lines(run) >= count and run_state(run).name == "running":
                    ranks = self.ranks(run)
                    if len(ranks) == point.world_size and status(run) == "running":
                        return ranks
            return []

        self.wait_for(training)
        return training()

    def ranks(self, run: Path) -> list[int]:
        """Return the process ids of the ranks of a run on this machine, without those of srun."""
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(run) in words and "python" in words[0] and alive(int(path.name)):
                pids.append(int(path.name))
        return pids

    # ------------------------------------------------------------------------------------------------- the jobs

    def job(self, job: str, task: int = 0) -> dict[str, str]:
        """Return the fields of `scontrol show job` of a task."""
        return self.cluster.describe(f"{job}_{task}")

    def wait_until_ended(self, job: str) -> dict[str, str]:
        """Wait until SLURM sees the end of the only task of a job; return its fields."""
        self.wait_for(lambda: not self.cluster.output("squeue", "--noheader", "--jobs", job).strip())
        return self.job(job)


def status(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def parent(pid: int) -> int:
    return int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


def pause(pids: list[int]) -> None:
    """Stop processes, so that a run of seconds is still training when SLURM acts."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def resume(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # SLURM sends SIGCONT before some of its signals
            os.kill(pid, signal.SIGCONT)


def was_signalled(pid: int, number: int) -> bool:
    """Return whether a stopped process has a signal to handle, or has ended since."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^S\w+Pnd:\s*(\w+)", text, re.M))
