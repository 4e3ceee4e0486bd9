"""Saving beside training: the loop waits for a copy of the tensors in memory, a thread writes the copy.

    main thread   copy, train on ...                                    copy, train on ...
    thread             shard of each process | gather | meta.json, rename, point      shard ...

DCP plans who writes what and gathers the results. Its own writer for safetensors makes two more copies of everything
while no other thread of Python can run, so the file, which is a header and bytes, is written here.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor

from megatron.parallel.mesh import PATIENCE, ParallelContext
from megatron.training.checkpoint import BLOCK, folder_name
from megatron.training.run_folder import LockError, write_json

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}  # of safetensors


class Saver:
    """Writes checkpoints below `root`, one at a time; all processes make, call and leave it together.

    Used as a context: leaving it waits for what is still being written.
    """

    def __init__(self, root: Path, ranks: ParallelContext, check_lock: Callable[[], None] | None = None):
        """Prepare to write below `root`; rank 0 calls `check_lock` before it makes or publishes a checkpoint."""
        self.root, self.ranks, self.check_lock = root, ranks, check_lock
        # the thread's collectives must not fall between those of the training
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        on_cuda = ranks.device.type == "cuda"
        start = (torch.cuda.set_device, (ranks.device,)) if on_cuda else (None, ())
        self._thread = ThreadPoolExecutor(1, "saver", *start)
        self._copies: dict[str, Tensor] = {}
        self._pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except (OSError, RuntimeError) as failure:
            if error is None:
                raise
            if str(failure) != str(error):
                logger.error(failure)  # what ends the run already is what it is told to have ended by
        finally:
            self._thread.shutdown()

    def reserve(self, state: dict[str, Tensor]) -> None:
        """Make the memory for copies of `state`, in the thread: fresh memory is many times slower than a copy."""
        self.wait()
        self._pending = self._thread.submit(self._reserve, state)

    def _reserve(self, state: dict[str, Tensor]) -> None:
        self._copies = {name: _host_copy(tensor) for name, tensor in state.items()}

    def save(self, state: dict[str, Tensor], meta: dict, then: Callable[[], None]) -> None:
        """Copy `state` and return; the thread writes the checkpoint of meta["iteration"].

        Names, shapes and layouts are the same at every call, and may differ between processes. The first process
        calls `then`, in its thread, when the checkpoint is complete. Waits for the one before, and raises what `wait`
        raises.
        """
        self.wait()
        if not self._copies:
            self._reserve(state)
        for name, tensor in state.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=True)
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        folder = self.root / folder_name(meta["iteration"])
        writer = _Writer(folder, meta, then, self.check_lock or (lambda: None))
        self._pending = self._thread.submit(_write, writer, self._copies, self._group)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises OSError (a full disk), on every process, with the half-written files removed and every older checkpoint
        untouched, LockError where another process has taken over the run, and RuntimeError where a peer is gone.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _host_copy(tensor: Tensor) -> Tensor:
    """Return zeros in the host's memory that stand for `tensor`: of its shape, and laid out over processes like it."""
    local = _local(tensor)
    # written to, or the system would hand the memory out at the first copy only
    zeros = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.device.type == "cuda").zero_()
    if not isinstance(tensor, DTensor):
        return zeros
    names, layout = tensor.__tensor_flatten__()  # from_local would move the copy to the device of the mesh
    parts = {name: getattr(tensor, name) for name in names} | {"_local_tensor": zeros}
    return DTensor.__tensor_unflatten__(parts, layout, tensor.size(), tensor.stride())


def _write(writer: "_Writer", state: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write one checkpoint; all processes take part. Raises as `Saver.wait` does."""
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        if isinstance(_cause(error), (RuntimeError, LockError)):
            raise _cause(error)  # the disk is not to blame: a peer is gone, or the files are another process's by now
        shutil.rmtree(writer.aside, ignore_errors=True)
        raise OSError(
            f"{writer.folder}: could not be written ({_cause(error)}); older checkpoints are untouched, "
            "free space and start the same command again"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Return what a writer met: DCP wraps it, by rank, and the user needs to know it."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return first[0] if isinstance(first, tuple) else first
    return error


class _Writer(HuggingFaceStorageWriter):
    """What DCP calls on the way of one checkpoint: written aside, and renamed when complete.

    The first process prepares and finishes; an exception in any of these ends `dcp.save` on every process.
    """

    def __init__(self, folder: Path, meta: dict, then: Callable[[], None], check_lock: Callable[[], None]):
        self.folder, self.aside = folder, folder.with_name(folder.name + ".partial")
        self.meta, self.then, self.check_lock = meta, then, check_lock
        super().__init__(str(self.aside), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.check_lock()
        shutil.rmtree(self.aside, ignore_errors=True)  # of an earlier start; no process writes before it has a plan
        self.aside.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future:
        """Write what this process holds into one file; the result is [(name, bytes, checksum)], or []."""
        files = []
        if plan.items:
            path = self.aside / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
            begins = {item.index.fqn: list(item.tensor_data.chunk.offsets) for item in plan.items}
            files.append((path.name, *write_safetensors(path, tensors, begins)))
        done = torch.futures.Future()
        done.set_result(files)
        return done

    def finish(self, metadata: Metadata, results: list[list[tuple[str, int, int]]]) -> None:
        self.check_lock()
        files = {name: (size, checksum) for result in results for name, size, checksum in result}
        write_json(self.aside / "meta.json", self.meta | {"files": files})
        shutil.rmtree(self.folder, ignore_errors=True)
        self.aside.rename(self.folder)
        self.then()


def write_safetensors(path: Path, tensors: dict[str, Tensor], begins: dict[str, list[int]]) -> tuple[int, int]:
    """Write `tensors` of the host, each the part of a larger one that begins at `begins`; return size and CRC-32.

    The size is in bytes; the file is on the disk when this returns. Raises OSError.
    """
    layout = json.dumps({name: {SAVED_OFFSETS_KEY: begin} for name, begin in begins.items()})
    header, end = {"__metadata__": {"format": "pt", CUSTOM_METADATA_KEY: layout}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    checksum, size = 0, 0
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *_blocks(tensors)):
            # training goes on meanwhile: both release the interpreter's lock
            checksum, size = zlib.crc32(block, checksum), size + len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size, checksum


def _blocks(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        whole = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(whole), BLOCK):
            yield whole[start : start + BLOCK]
