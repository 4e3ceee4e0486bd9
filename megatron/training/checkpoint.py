"""Checkpoints: tensors as sharded safetensors, everything else as JSON; complete or not there at all.

iter_0000500/ holds the shards of model and optimizer and meta.json, which lists every file with its size and
checksum. `saver` writes it aside and renames it when complete. Nothing in it can execute anything.
"""

import logging
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron.errors import ConfigurationError
from megatron.training.run_folder import read_json

logger = logging.getLogger(__name__)

BLOCK = 1 << 24  # bytes that are checked, read or written at a time


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def load(folder: Path, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the tensors of `state`, whatever layout wrote it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process loads what several saved
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def newest(root: Path, mend: bool) -> tuple[Path, dict] | None:
    """Return the newest complete checkpoint below `root` with its meta.json, or None where there is none.

    A damaged one is named and passed over; with `mend`, for a run's own folder, also renamed to .damaged. One
    process calls this.
    """
    found = complete(root)
    for folder in reversed(found):
        fault = damage(folder)
        if fault is None:
            return folder, read_json(folder / "meta.json")
        logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, fault)
        if mend:
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
    if begun(root):
        raise ConfigurationError(f"{root}: every checkpoint is damaged; restore one or start anew with another --save")
    return None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        files = [(name, *expected) for name, expected in read_json(folder / "meta.json")["files"].items()]
    except (ConfigurationError, KeyError, TypeError, AttributeError):
        return "meta.json is missing or unreadable"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in [name for name, *_ in files]:  # loading opens them all
            return f"{path.name} is not listed in meta.json"
    for name, size, checksum in files:
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    with ThreadPoolExecutor() as pool:  # reading and summing up release the interpreter's lock
        found = pool.map(_checksum, [folder / name for name, *_ in files])
        for (name, _, checksum), other in zip(files, found, strict=True):
            if other != checksum:
                return f"{name} does not match its checksum"
    return None


def begun(root: Path) -> bool:
    """Return whether any checkpoint was written to its end below `root`; an earlier start may have found it damaged."""
    return bool(complete(root)) or any(root.glob("iter_*.damaged"))


def complete(root: Path) -> list[Path]:
    """Return the checkpoints below `root` that were written to their end, the oldest first.

    Ordered by step as a number: beyond 9,999,999 the names have eight digits.
    """
    return sorted((path for path in root.glob("iter_*") if path.name[5:].isdecimal()), key=_iteration)


def prune(root: Path, keep: set[int | None]) -> None:
    """Remove every complete checkpoint but the newest two, the iterations in `keep` and those marked permanent."""
    for folder in complete(root)[:-2]:
        if _iteration(folder) not in keep and not _permanent(folder):
            folder.rename(folder.with_suffix(".removed"))  # at once, so that a kill leaves no half of one
    for folder in root.glob("iter_*.removed"):
        shutil.rmtree(folder)


def _iteration(folder: Path) -> int:
    return int(folder.name[5:])


def _permanent(folder: Path) -> bool:
    try:
        return read_json(folder / "meta.json")["permanent"]
    except (ConfigurationError, KeyError, TypeError):
        return True  # nothing is removed that cannot be understood


def _checksum(path: Path) -> int:
    checksum, block = 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return checksum
