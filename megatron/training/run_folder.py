"""The run folder: configuration, records, status, checkpoints and the lock of one run; other tools read only this.

DIR/config.json, metrics.jsonl, status.json, validation/<set>/<iteration>.npz, checkpoints/, wandb.json,
trackio.json, mlflow.json, tensorboard.json
"""

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import numpy as np
import orjson

from megatron.errors import ConfigurationError
from megatron.stop_signals import StopRequested

if TYPE_CHECKING:  # tools read run folders without torch
    from megatron.validation.evaluate import Evaluation

logger = logging.getLogger(__name__)

LOCK_RETRY = 1.0  # seconds


class LockError(OSError):
    """Another process writes this run: it holds the lock at the start, or has taken it over since."""


@contextmanager
def writing(path: Path):
    """Add the path to the error of a failed write.

    Raises: OSError for a failed write.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error.strerror}); free space and start the same command again"
        ) from error


def prepare_output(path: Path) -> None:
    """Create the folder of a file that a command writes at its end, and check that it can be written.

    Raises: OSError if it cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` at the end, once it is on the disk: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    with writing(path):
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, value: dict) -> None:
    """Write JSON atomically."""
    with _replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def write_records(path: Path, records: list[dict]) -> None:
    """Write one line per record atomically."""
    with _replacing(path) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)


def read_json(path: Path) -> dict:
    """Return the content of a JSON file.

    Raises: ConfigurationError if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: cannot be read as JSON ({error}); restore it or start a new --save"
        ) from error


def check_writable(path: Path) -> None:
    """Check that a run folder can be created or written to, without creating it.

    Raises: ConfigurationError if it cannot.
    """
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "Permission denied" if existing.is_dir() else f"{existing} is a file"
        raise ConfigurationError(f"--save {path}: cannot be written to ({reason}); choose another folder")


class RunFolder:
    """The folder of one run, locked by one job at a time; only rank 0 opens it.

    Every method that writes raises LockError if another process has taken over the lock.
    """

    def __init__(self, path: str, wait_minutes: float = 0.0, stop_reason: Callable[[], str | None] = lambda: None):
        """Create or open the folder and lock it, waiting up to `wait_minutes` for another holder.

        `stop_reason` is called every LOCK_RETRY seconds and returns why to end the wait, or None.
        Raises: LockError if another process still holds the lock then; StopRequested if `stop_reason` ends the wait;
        ConfigurationError if the folder cannot be written to.
        """
        self.path, self._owner = Path(path), _owner_name()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._wait_for_lock(wait_minutes, stop_reason)
            self._lock.truncate(0)
            self._lock.write(self._owner)
            self._lock.flush()
            os.fsync(self._lock.fileno())  # so that other nodes can read it
        except LockError:
            raise
        except OSError as error:
            raise ConfigurationError(
                f"--save {self.path}: cannot be written to ({error.strerror}); choose another folder"
            ) from error
        self._records: TextIO | None = None

    def _wait_for_lock(self, minutes: float, stop_reason: Callable[[], str | None]) -> TextIO:
        """Return the lock file, open and locked; wait for another holder up to `minutes`."""
        deadline = time.monotonic() + 60 * minutes
        lock = self._try_lock()
        if isinstance(lock, str) and minutes:
            logger.info("--save %s: %s is writing this run; waiting up to %g minutes for it", self.path, lock, minutes)
        while isinstance(lock, str):
            if reason := stop_reason():
                raise StopRequested(reason)
            if time.monotonic() >= deadline:
                waited = f", even after --wait-for-lock {minutes:g}" if minutes else ""
                raise LockError(
                    f"--save {self.path}: {lock} is writing this run{waited}; wait for it (--wait-for-lock MINUTES), "
                    "stop it or choose another folder"
                )
            time.sleep(min(LOCK_RETRY, max(0.0, deadline - time.monotonic())))
            lock = self._try_lock()
        return lock

    def _try_lock(self) -> TextIO | str:
        """Return the lock file, open and locked, or the name of the process that holds the lock."""
        # the kernel releases the lock when the process dies, however it dies
        lock = open(self.path / "lock", "a+")  # noqa: SIM115  open for as long as it is locked
        try:
            # POSIX locks are not inherited by the loader's workers, which may outlive a killed run by seconds
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            with lock:
                lock.seek(0)
                return lock.read().strip() or "another process"

    def check_lock(self) -> None:
        """Raise LockError unless this process still holds the lock.

        A network file system may give the lock of a disconnected node to the next process that requests it, which
        writes its own name. The name is read through the descriptor that holds the lock: closing any other descriptor
        of the file would release the lock.

        Raises: LockError if it does not.
        """
        holder = "another process"
        with suppress(OSError):  # the file was removed, or the file system reports that the lock was lost
            holder = os.pread(self._lock.fileno(), 4096, 0).decode(errors="replace")
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / "lock")) and holder == self._owner:
                return
            holder = (self.path / "lock").read_text(errors="replace")
        raise LockError(
            f"--save {self.path}: the lock of this run is lost to {holder}; this process ({self._owner}) stops and "
            "writes nothing more"
        )

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def start(self, config: dict, records: list[dict], source: Path) -> None:
        """Write the configuration and the `records` up to the loaded checkpoint, which is one of the run `source`."""
        self.check_lock()
        if source.resolve() != self.path.resolve():
            self._inherit_evaluations(records, source)
        write_json(self.path / "config.json", config)
        write_records(self.path / "metrics.jsonl", records)
        self._records = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115  open until the run ends

    def _inherit_evaluations(self, records: list[dict], source: Path) -> None:
        """Copy the sums by document of `records` from the run `source`; an archived run may lack them."""
        for record in records:
            if record["kind"] == "valid":
                file = Path("validation") / record["set"] / f"{record['iteration']}.npz"
                if not (source / file).exists():
                    continue
                with writing(self.path / file):
                    (self.path / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / file, self.path / file)

    def record(self, record: dict) -> None:
        """Append a record to metrics.jsonl and flush it; `sync_records` makes it outlast the node."""
        self.check_lock()
        assert self._records is not None
        with writing(self.path / "metrics.jsonl"):
            self._records.write(json.dumps(record) + "\n")
            self._records.flush()

    def sync_records(self) -> None:
        """Write all records to the disk: a checkpoint that outlasts its node must not lack the records before it."""
        assert self._records is not None
        with writing(self.path / "metrics.jsonl"):
            os.fsync(self._records.fileno())

    def save_evaluation(self, set_name: str, iteration: int, evaluation: "Evaluation") -> None:
        """Save the per-document sums, for paired comparisons."""
        self.check_lock()
        folder = self.path / "validation" / set_name
        count = len(evaluation.tokens)
        text = np.zeros(count) if evaluation.bytes is None else evaluation.bytes
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / f"{iteration}.npz") as file:
            np.savez_compressed(file, id=np.arange(count), nats=evaluation.nats, tokens=evaluation.tokens, bytes=text)

    def status(self, state: str, reason: str, iteration: int, consumed_samples: int) -> None:
        """Write status.json: `state` is running, finished, stopped or failed, and `reason` says why."""
        self.check_lock()
        host, process, job = self._owner.split()
        value = {"state": state, "reason": reason, "iteration": iteration, "consumed_samples": consumed_samples}
        value |= {"host": host, "process": process, "job": job, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(self.path / "status.json", value)


def read_records(folder: Path, up_to_iteration: float = math.inf) -> list[dict]:
    """Return the records of a run up to a step; a last line truncated by a crash is dropped."""
    path, records = folder / "metrics.jsonl", []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines():
        try:
            record = parse_record(line)
        except ValueError:
            break
        if record["iteration"] <= up_to_iteration:
            records.append(record)
    return records


def parse_record(line: bytes) -> dict:
    """Return the record of a line of metrics.jsonl.

    Raises: ValueError for a line that is not JSON.
    """
    try:
        return orjson.loads(line)
    except ValueError:
        return json.loads(line)  # reads NaN and infinities, which orjson does not


def recorded_config(path: Path) -> dict | None:
    """Return the recorded configuration of a run folder or a checkpoint folder; None if `path` is neither."""
    if (path / "meta.json").exists():
        return read_json(path / "meta.json")["config"]
    return read_json(path / "config.json") if (path / "config.json").exists() else None


def _owner_name() -> str:
    """Return host, process id and Slurm job, as squeue names it: a task of a job array is 40_0."""
    job = os.environ.get("SLURM_JOB_ID", "none")
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return f"{socket.gethostname()} process-{os.getpid()} job-{job}"
