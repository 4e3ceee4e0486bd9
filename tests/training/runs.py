"""A training run in subprocesses that a test inspects, signals and waits for."""

import json
import os
import signal
import time
from pathlib import Path

from tests.conftest import entry, environment
from tests.forked import rank_variables, start_script


class Run:
    """A started run of `size` ranks, forked from a process that has loaded torch; killed on exit of the context."""

    def __init__(self, objective: str, flags: list, folder: Path, size: int = 1, **variables):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / name for name in ("stdout", "stderr")]
        command = [entry(objective), *map(str, flags)]
        self.ranks = start_script(command, environment() | variables, self.outputs, rank_variables(size))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def wait_until(self, condition, timeout: float = 60) -> None:
        """Return when `condition` holds; fail if the run ends or the time is up before that."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert all(rank.is_alive() for rank in self.ranks) and time.monotonic() < deadline, self.stderr[-3000:]
            time.sleep(0.001)

    def signal(self, *names: str, pause: float = 0.013, rank: int | None = None) -> None:
        """Send signals, milliseconds apart, to one rank or to all."""
        for name in names:
            for process in self.ranks if rank is None else [self.ranks[rank]]:
                if process.is_alive():
                    os.kill(process.pid, signal.Signals[name])
            time.sleep(pause)

    def codes(self, timeout: float = 60) -> list[int | None]:
        """Return the exit codes by rank when all ranks have ended; None for a rank that is still running."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    @property
    def stdout(self) -> str:
        return self.outputs[0].read_text() if self.outputs[0].exists() else ""

    @property
    def stderr(self) -> str:
        return self.outputs[1].read_text() if self.outputs[1].exists() else ""


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the files of a run folder by name."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in without}
