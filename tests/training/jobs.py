"""Jobs of several ranks for tests: start them with torchrun or by hand, kill one rank, time the end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import environment
from tests.forked import ForkedPopen, free_port

LAYOUTS = {
    "dp4": [],
    "tp2 x pp2": ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    "tp2 x dp2": ["--tensor-model-parallel-size", "2"],
    "pp2 x dp2": ["--pipeline-model-parallel-size", "2"],
}


class Job:
    """One start of a training run on several ranks; their output and the launcher's goes to `log`.

    With `by_hand` there is no launcher, and the ranks are forked from a process that has loaded torch; with `slurm`
    they get the variables of srun. `prefix` precedes the launcher's command.
    """

    def __init__(
        self,
        arguments: list,
        log: Path,
        size: int = 4,
        by_hand: bool = False,
        launcher: tuple = ("--standalone",),
        prefix: tuple = (),
        slurm: bool = False,
    ):
        self.log, self.size = log, size
        command = [*map(str, arguments)]
        with open(log, "w") as out:
            if by_hand:
                names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if slurm else ("RANK", "WORLD_SIZE")
                master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
                self.started = []
                for rank in range(size):
                    variables = master | dict(zip(names, (str(rank), str(size))))
                    variables |= {"SLURM_LOCALID": str(rank)} if slurm else {}
                    command_line, env = [sys.executable, *command], environment() | variables
                    self.started.append(ForkedPopen(command_line, env=env, stdout=out))
            else:
                run = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", *launcher]
                command = [*prefix, sys.executable, *run, *command]
                self.started = [subprocess.Popen(command, env=environment(), stdout=out, stderr=out)]
        self.by_hand = by_hand

    def pid(self, rank: int) -> int | None:
        """Return the process id of a rank, or None if it is not running (yet)."""
        if self.by_hand:
            return self.started[rank].pid if self.started[rank].poll() is None else None
        agent = self.started[0].pid
        try:
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            for child in children:
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
        except OSError:
            pass
        return None

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.started)

    def wait_until(self, condition, timeout: float = 120) -> bool:
        """Return whether `condition` came true while the job ran."""
        deadline = time.monotonic() + timeout
        while not self.ended():
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {timeout} s:\n{self.text()[-3000:]}")
            time.sleep(0.002)
        return False

    def kill(self, rank: int, number: int = signal.SIGKILL) -> bool:
        """Kill a rank; return whether it was running."""
        pid = self.pid(rank)
        if pid:
            os.kill(pid, number)
        return bool(pid)

    def wait(self, timeout: float = 120) -> tuple[float, list[int]]:
        """Return the seconds until all processes ended, and their exit codes; after `timeout` kill them and raise."""
        start = time.monotonic()
        while not self.ended():
            if time.monotonic() - start > timeout:
                self.end()
                raise TimeoutError(f"still running after {timeout} s:\n{self.text()[-3000:]}")
            time.sleep(0.01)
        return time.monotonic() - start, [process.returncode for process in self.started]

    def end(self) -> None:
        for rank in range(self.size):
            self.kill(rank)
        for process in self.started:
            process.kill()
            process.wait()

    def text(self) -> str:
        return self.log.read_text()

    def errors(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("error:")]


def lines(folder: Path) -> int:
    """Return the number of records of a run."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(folder: Path) -> int:
    """Return the step of a run's newest complete checkpoint, 0 if it has none."""
    names = [path.name[5:] for path in folder.glob("checkpoints/iter_*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def catches(pid: int, name: str) -> bool:
    """Return whether a process has installed a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]
    return bool(int(caught, 16) >> (signal.Signals[name] - 1) & 1)


def alive(pid: int) -> bool:
    """Return whether a process is running and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
