"""One run, one folder: configuration, records, state and the lock. Every later tool reads only this.

DIR/config.json, metrics.jsonl, status.json, validation/<set>/<iteration>.npz, checkpoints/, wandb.json
"""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError
from megatron.training.evaluate import Evaluation


@contextmanager
def writing(path: Path):
    """Name the file in the error of a failed write, which by itself says only why."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error.strerror}); free space and start the same command again"
        ) from error


def write_json(path: Path, value: dict) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of it."""
    aside = path.with_name(path.name + ".partial")
    with writing(path), open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: cannot be read as JSON ({error}); restore it or start a new --save"
        ) from error


class RunFolder:
    """The folder of one run, held by one job at a time. Only the first process opens it."""

    def __init__(self, path: str):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
        except OSError as error:
            raise ConfigurationError(
                f"--save {self.path}: cannot be written to ({error.strerror}); choose another folder"
            ) from error
        self._records = None

    def _acquire(self):
        # the kernel lets go of the lock when the process dies, however it dies
        lock = open(self.path / "lock", "a+")
        try:
            # this kind of lock is not inherited by the loader's workers, which may outlive a killed run for seconds
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ConfigurationError(
                f"--save {self.path}: {holder} is writing this run; wait for it, stop it or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(_who())
        lock.flush()
        return lock

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def start(self, config: dict, records: list[dict], source: Path) -> None:
        """Write the configuration, and the records that the loaded checkpoint of the run `source` had already made."""
        if source.resolve() != self.path.resolve():
            self._inherit_evaluations(records, source)
        write_json(self.path / "config.json", config)
        aside = self.path / "metrics.jsonl.partial"
        with writing(self.path / "metrics.jsonl"):
            aside.write_text("".join(json.dumps(record) + "\n" for record in records))
            aside.replace(self.path / "metrics.jsonl")
        self._records = open(self.path / "metrics.jsonl", "a")

    def _inherit_evaluations(self, records: list[dict], source: Path) -> None:
        for record in records:
            if record["kind"] == "valid":
                file = Path("validation") / record["set"] / f"{record['iteration']}.npz"
                with writing(self.path / file):
                    (self.path / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / file, self.path / file)

    def record(self, record: dict) -> None:
        """Append one record; it is on its way to the disk when this returns."""
        with writing(self.path / "metrics.jsonl"):
            self._records.write(json.dumps(record) + "\n")
            self._records.flush()

    def save_evaluation(self, set_name: str, iteration: int, evaluation: Evaluation) -> None:
        """Keep the sums by document, for paired comparisons."""
        folder = self.path / "validation" / set_name
        count = len(evaluation.tokens)
        text = np.zeros(count) if evaluation.bytes is None else evaluation.bytes
        aside = folder / f"{iteration}.partial.npz"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(aside, id=np.arange(count), nats=evaluation.nats, tokens=evaluation.tokens, bytes=text)
            aside.replace(folder / f"{iteration}.npz")

    def status(self, state: str, reason: str, iteration: int, consumed_samples: int) -> None:
        """Say how the run stands: running, finished, stopped or failed, and why."""
        host, process, job = _who().split()
        value = {"state": state, "reason": reason, "iteration": iteration, "consumed_samples": consumed_samples}
        value |= {"host": host, "process": process, "job": job, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(self.path / "status.json", value)


def read_records(folder: Path, up_to_iteration: float = math.inf) -> list[dict]:
    """Return the records of a run, up to a checkpoint's step; a last line cut by a crash is dropped."""
    path, records = folder / "metrics.jsonl", []
    if not path.exists():
        return records
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["iteration"] <= up_to_iteration:
            records.append(record)
    return records


def _who() -> str:
    return f"{socket.gethostname()} process-{os.getpid()} job-{os.environ.get('SLURM_JOB_ID', 'none')}"
