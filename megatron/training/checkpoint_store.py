"""The checkpoints of a run: which are complete, intact, newest and best; which are kept; how they are saved and loaded.

checkpoints/iter_0000500/ holds the shards of model and optimizer as safetensors, and meta.json, which lists every file
with its size and checksum; latest.json and best.json name a checkpoint. A checkpoint is complete or absent: `saver`
writes a temporary folder and renames it. Loading never executes code (no pickle).
"""

import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext
from megatron.training.run_folder import read_json, write_json
from megatron.training.saver import BLOCK, Saver

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints in one folder, `root`. Only one rank calls what changes the folder, except `save`."""

    def __init__(self, root: Path, check_lock: Callable[[], None] = lambda: None):
        """`check_lock` is called before files change, on rank 0; it raises if another process writes this run."""
        self.root, self.check_lock = root, check_lock

    @classmethod
    def of_run(cls, run: Path) -> "CheckpointStore":
        """Return the store of a run folder, to be read."""
        return cls(run / "checkpoints")

    def complete(self) -> list[Path]:
        """Return the completely written checkpoints, oldest first.

        Ordered by step number, not by name: beyond 9,999,999 names have eight digits.
        """
        return sorted((path for path in self.root.glob("iter_*") if path.name[5:].isdecimal()), key=_iteration)

    def permanent(self) -> list[Path]:
        """Return the completely written checkpoints that are never pruned, oldest first."""
        return [folder for folder in self.complete() if _permanent(folder)]

    def has_any(self) -> bool:
        """Return whether a checkpoint was ever completed, even if an earlier start renamed it to .damaged."""
        return bool(self.complete()) or any(self.root.glob("iter_*.damaged"))

    def newest(self, *, rename_damaged: bool = False) -> Path | None:
        """Return the newest intact checkpoint, or None if nothing was saved.

        A damaged one is skipped with a warning; `rename_damaged`, for the run's own folder, also renames it to
        .damaged.

        Raises: ConfigurationError if every checkpoint is damaged.
        """
        for folder in reversed(self.complete()):
            fault = damage(folder)
            if fault is None:
                return folder
            logger.warning("checkpoint %s is damaged (%s); falling back to the previous one", folder, fault)
            if rename_damaged:
                shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
                folder.rename(folder.with_suffix(".damaged"))
        if self.has_any():
            raise ConfigurationError(
                f"{self.root}: every checkpoint is damaged; restore one or start a new run with another --save"
            )
        return None

    def best(self) -> Path | None:
        """Return the checkpoint of the lowest validation loss, or None if none was validated. It may be damaged."""
        pointer = self.root / "best.json"
        return self.root / read_json(pointer)["folder"] if pointer.exists() else None

    def intact(self) -> list[Path]:
        """Return the intact checkpoints, oldest first; damaged ones are logged and left out."""
        folders = []
        for folder in self.complete():
            fault = damage(folder)
            if fault is None:
                folders.append(folder)
            else:
                logger.warning("checkpoint %s is damaged (%s) and left out", folder, fault)
        return folders

    def start_saver(self, ranks: ParallelContext) -> Saver:
        """Return a context manager for `save`. A collective call."""
        return Saver(self.root, ranks, self.check_lock)

    def save(
        self,
        saver: Saver,
        state: dict[str, Tensor],
        meta: dict,
        *,
        losses: dict[int, float],
        validation_set: str | None,
    ) -> None:
        """Start saving a checkpoint; when it is complete, rank 0 calls `update_pointers`. A collective call.

        Raises: OSError, LockError or RuntimeError if the previous checkpoint could not be written.
        """
        # a copy: the run may be validated again before the checkpoint is written
        saver.save(state, meta, then=partial(self.update_pointers, dict(losses), validation_set))

    def update_pointers(self, losses: dict[int, float], validation_set: str | None) -> None:
        """Point latest.json at the newest checkpoint and best.json at the best one left; prune other checkpoints.

        `losses` on `validation_set` by iteration select the best one. Without any, as after a resume with other sets,
        the best one stays.

        Raises: LockError if another process writes this run.
        """
        self.check_lock()
        folders = {_iteration(path): path for path in self.complete()}
        pointers = {"latest": max(folders, default=None)}
        pointers["best"] = min(losses.keys() & folders.keys(), key=losses.__getitem__, default=None)
        for name, iteration in pointers.items():
            if iteration is not None:
                meta = read_json(folders[iteration] / "meta.json")
                pointer = {"folder": folders[iteration].name, "iteration": iteration}
                pointer |= {"consumed_samples": meta["consumed_samples"], "loss": losses.get(iteration)}
                pointer |= {"set": validation_set if iteration in losses else None}
                write_json(self.root / f"{name}.json", pointer)
        best = self.best()
        self.prune(keep={pointers["latest"], best and _iteration(best)})

    def prune(self, keep: set[int | None]) -> None:
        """Remove every complete checkpoint except the newest two, the iterations in `keep` and permanent ones.

        What cannot be removed now, such as files that another process reads over NFS, is left to the next call.
        """
        for folder in self.complete()[:-2]:
            if _iteration(folder) not in keep and not _permanent(folder):
                folder.rename(folder.with_suffix(".removed"))  # atomic, so that a kill leaves no partial checkpoint
        for folder in self.root.glob("iter_*.removed"):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("%s: could not be removed (%s); the next checkpoint tries again", folder, error.strerror)


def _iteration(folder: Path) -> int:
    return int(folder.name[5:])


def _permanent(folder: Path) -> bool:
    try:
        return read_json(folder / "meta.json")["permanent"]
    except (ConfigurationError, KeyError, TypeError):
        return True  # never remove a checkpoint whose metadata is unreadable


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is that of one checkpoint."""
    return (folder / "meta.json").exists()


def read_meta(folder: Path) -> dict:
    """Return meta.json of a checkpoint: progress, averaged steps, the configuration of its run, its files.

    Raises: ConfigurationError if it is missing or not JSON.
    """
    return read_json(folder / "meta.json")


def find_checkpoint(run: Path, which: str) -> Path:
    """Return the folder of a run's "latest" or "best" checkpoint, or `run` itself if it is a checkpoint.

    Raises: ConfigurationError if there is none or it is damaged.
    """
    if is_checkpoint(run):
        folder = run
    elif which == "latest":
        folder = CheckpointStore.of_run(run).newest()
        if folder is None:
            raise ConfigurationError(f"{run}: holds no checkpoint; train it first")
    else:
        folder = CheckpointStore.of_run(run).best()
        if folder is None:
            raise ConfigurationError(
                f"--checkpoint best: {run} has no checkpoint that was validated; give --checkpoint latest"
            )
    fault = damage(folder)
    if fault:
        raise ConfigurationError(f"{folder}: is damaged ({fault}); give another checkpoint of that run")
    return folder


def load_checkpoint(folder: Path, state: dict[str, Tensor]) -> None:
    """Load a checkpoint, saved under any layout, into the tensors of `state`; it is not verified (see `damage`).

    A rank reads the shards that overlap with its own, through a memory map.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # loads sharded files in a single process
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    A process reads each file once: it remembers checksums for as long as files are unchanged.
    """
    try:
        files = [(name, *expected) for name, expected in read_meta(folder)["files"].items()]
    except (ConfigurationError, KeyError, TypeError, AttributeError):
        return "meta.json is missing or unreadable"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in [name for name, *_ in files]:  # the reader opens every *.safetensors
            return f"{path.name} is not listed in meta.json"
    for name, size, _ in files:
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    with ThreadPoolExecutor() as pool:  # reading and CRC-32 release the GIL
        checksums = pool.map(_checksum, [folder / name for name, *_ in files])
        for (name, _, expected), checksum in zip(files, checksums, strict=True):
            if checksum != expected:
                return f"{name} does not match its checksum"
    return None


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    status = os.stat(path)
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _checksum_of_version(path.resolve(), version)


@cache
def _checksum_of_version(path: Path, version: tuple[int, ...]) -> int:
    checksum, block = 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return checksum
