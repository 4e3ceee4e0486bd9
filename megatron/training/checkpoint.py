"""Checkpoints: tensors as sharded safetensors, everything else as JSON; a checkpoint is complete or absent.

iter_0000500/ holds the shards of model and optimizer and meta.json, which lists every file with its size and
checksum. `saver` writes a temporary folder and renames it when complete. Loading never executes code (no pickle).
"""

import logging
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatron.errors import ConfigurationError
from megatron.training.run_folder import read_json

logger = logging.getLogger(__name__)

BLOCK = 1 << 24  # bytes per read, write or checksum update


def folder_name(iteration: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"iter_{iteration:07d}"


def load(folder: Path, state: dict[str, Tensor]) -> None:
    """Load a checkpoint, saved under any layout, into the tensors of `state`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # loads sharded files in a single process
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def newest(root: Path, mend: bool) -> tuple[Path, dict] | None:
    """Return the newest intact checkpoint in `root` with its meta.json, or None if nothing was saved.

    A damaged one is skipped with a warning; in the run's own folder it is also renamed to .damaged. Only one rank
    calls this.

    Raises: ConfigurationError if every checkpoint is damaged.
    """
    for folder in reversed(complete(root)):
        fault = damage(folder)
        if fault is None:
            return folder, read_json(folder / "meta.json")
        logger.warning("checkpoint %s is damaged (%s); falling back to the previous one", folder, fault)
        if mend:
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
    if has_any(root):
        raise ConfigurationError(
            f"{root}: every checkpoint is damaged; restore one or start a new run with another --save"
        )
    return None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        files = [(name, *expected) for name, expected in read_json(folder / "meta.json")["files"].items()]
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


def has_any(root: Path) -> bool:
    """Return whether a checkpoint was ever completed in `root`, even if an earlier start renamed it to .damaged."""
    return bool(complete(root)) or any(root.glob("iter_*.damaged"))


def complete(root: Path) -> list[Path]:
    """Return the completely written checkpoints in `root`, oldest first.

    Ordered by step number, not by name: beyond 9,999,999 names have eight digits.
    """
    return sorted((path for path in root.glob("iter_*") if path.name[5:].isdecimal()), key=_iteration)


def prune(root: Path, keep: set[int | None]) -> None:
    """Remove every complete checkpoint except the newest two, the iterations in `keep` and permanent ones."""
    for folder in complete(root)[:-2]:
        if _iteration(folder) not in keep and not _permanent(folder):
            folder.rename(folder.with_suffix(".removed"))  # atomic, so that a kill leaves no partial checkpoint
    for folder in root.glob("iter_*.removed"):
        shutil.rmtree(folder)


def _iteration(folder: Path) -> int:
    return int(folder.name[5:])


def _permanent(folder: Path) -> bool:
    try:
        return read_json(folder / "meta.json")["permanent"]
    except (ConfigurationError, KeyError, TypeError):
        return True  # never remove a checkpoint whose metadata is unreadable


def _checksum(path: Path) -> int:
    checksum, block = 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return checksum
