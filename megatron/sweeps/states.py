"""The state of a run, from its folder alone: status.json, the lock and the time of the last record."""

import fcntl
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigurationError
from megatron.training.run_folder import parse_record, read_json

LAST_BYTES = 1 << 14
LAYOUT = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, process id
# ends of a run that another start of the same command would only repeat; a killed data loader worker is none: "the
# machine may have run out of memory", which other jobs use too
OWN_FAULTS = ("is not finite", "CUDA out of memory")


@dataclass(frozen=True)
class State:
    """The state of a run.

    `name` is waiting (no folder yet), running (a process holds the lock), lost (it was running, and no process holds
    the lock), stopped (on request), failed or finished. All but the last two go on with the same command.
    """

    name: str
    reason: str = ""
    iteration: int = 0
    consumed_samples: int = 0
    job: str = ""  # that wrote the state, such as job-40_0
    holder: str = ""  # host, process and job of a running run
    silent_seconds: float = 0.0  # since the last record of a running run

    @property
    def has_own_fault(self) -> bool:
        """Whether a failed run would fail again: its reason lies in the configuration, not in the machine."""
        return self.name == "failed" and any(fault in self.reason for fault in OWN_FAULTS)

    @property
    def is_stopped_by_kill_switch(self) -> bool:
        """Whether a person stopped the run with --kill-switch-file: nothing starts it again by itself."""
        return self.name == "stopped" and self.reason.startswith("--kill-switch-file")


def run_state(folder: Path) -> State:
    """Return the state of a run folder."""
    status = {"state": "waiting", "reason": "", "iteration": 0, "consumed_samples": 0, "job": ""}
    with suppress(ConfigurationError, TypeError):  # missing or damaged
        status |= read_json(folder / "status.json")
    progress = {"iteration": status["iteration"], "consumed_samples": status["consumed_samples"]}
    if status["state"] == "finished":
        return State("finished", **progress)
    holder = lock_holder(folder)
    if holder:
        return State("running", **progress, holder=holder, silent_seconds=time.time() - last_change(folder))
    name = "lost" if status["state"] == "running" else status["state"]
    return State(name, status["reason"], **progress, job=status["job"])


def lock_holder(folder: Path) -> str:
    """Return who holds the lock of a run folder, as the lock file names it; "" where nobody does.

    The lock is asked about, not taken (F_GETLK).
    """
    try:
        with open(folder / "lock") as lock:
            request = struct.pack(LAYOUT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(LAYOUT, fcntl.fcntl(lock, fcntl.F_GETLK, request))
            return "" if answer[0] == fcntl.F_UNLCK else lock.read().strip() or f"process {answer[4]}"
    except OSError:
        return ""


def last_change(folder: Path) -> float:
    """Return when a run last wrote a record or its status, or took its lock; 0 if it never did."""
    times = [0.0]
    for name in ("metrics.jsonl", "status.json", "lock"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def last_record(folder: Path) -> dict:
    """Return the last complete record of a run, {} if there is none; only the end of the file is read."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):
            return parse_record(line)
    return {}
