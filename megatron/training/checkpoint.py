"""Checkpoints: tensors as sharded safetensors, everything else as JSON; complete or not there at all.

iter_0000500/ holds the shards of model and optimizer and meta.json, which lists every file with its size and
checksum. It is written aside and renamed when complete. Nothing in it can execute anything.
"""

import logging
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from megatron.errors import ConfigurationError
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Processes
from megatron.training.optimizer import MOMENTS
from megatron.training.run_folder import read_json, write_json

logger = logging.getLogger(__name__)


def tensors(engine: Engine, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what a checkpoint holds by name: the parameters, and their moments under optimizer.<moment>."""
    engine.reshard()
    named = dict(engine.named_parameters())
    state = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    for moment in MOMENTS:
        for name, parameter in named.items():
            state[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def save(root: Path, state: dict[str, Tensor], meta: dict, processes: Processes) -> Path:
    """Write one checkpoint below `root` and return its folder; all processes take part.

    Raises OSError (a full disk) with the half-written files removed and every older checkpoint untouched.
    """
    target = root / folder_name(meta["iteration"])
    aside = root / (target.name + ".partial")
    if processes.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _barrier(processes)
    try:
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp.save(state, storage_writer=writer)
        if processes.rank == 0:
            files = {path.name: _fingerprint(path) for path in sorted(aside.glob("*.safetensors"))}
            write_json(aside / "meta.json", meta | {"files": files})
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        # DCP wraps what a writer met, in an exception that is no Exception; the user needs the cause
        if isinstance(error, (Exception, CheckpointException)):
            raise OSError(
                f"{target}: could not be written ({_cause(error)}); older checkpoints are untouched, "
                "free space and start the same command again"
            ) from error
        raise
    _barrier(processes)
    return target


def load(folder: Path, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the tensors of `state`, whatever layout wrote it."""
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
    if found or any(root.glob("iter_*.damaged")):  # an earlier start may have found them
        raise ConfigurationError(f"{root}: every checkpoint is damaged; restore one or start anew with another --save")
    return None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        files = [(name, *expected) for name, expected in read_json(folder / "meta.json")["files"].items()]
    except (ConfigurationError, KeyError, TypeError, AttributeError):
        return "meta.json is missing or unreadable"
    for name, size, checksum in files:
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _fingerprint(path)[1] != checksum:
            return f"{name} does not match its checksum"
    return None


def complete(root: Path) -> list[Path]:
    """Return the checkpoints below `root` that were written to their end, the oldest first."""
    return sorted(path for path in root.glob("iter_*") if path.name[5:].isdigit())


def prune(root: Path, keep: set[int | None]) -> None:
    """Remove every complete checkpoint but the newest two, the iterations in `keep` and those marked permanent."""
    for folder in complete(root)[:-2]:
        if int(folder.name[5:]) not in keep and not _permanent(folder):
            folder.rename(folder.with_suffix(".removed"))  # at once, so that a kill leaves no half of one
    for folder in root.glob("iter_*.removed"):
        shutil.rmtree(folder)


def _permanent(folder: Path) -> bool:
    try:
        return read_json(folder / "meta.json")["permanent"]
    except (ConfigurationError, KeyError, TypeError):
        return True  # nothing is removed that cannot be understood


def _fingerprint(path: Path) -> tuple[int, int]:
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return size, checksum


def _cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> wrapped exception
    if failures:
        first = next(iter(failures.values()))
        return first[0] if isinstance(first, tuple) else first
    return error


def _barrier(processes: Processes) -> None:
    if processes.size > 1:
        dist.barrier()
