"""Asynchronous checkpointing: the training loop waits only for a host copy of the tensors, a thread writes it to disk.

    main thread   copy, train ...                                                copy, train ...
    thread             one shard per rank | gather | meta.json, rename, pointers      shard ...

DCP (torch.distributed.checkpoint) plans which rank writes what and gathers the results. Its safetensors writer makes
two more copies of all tensors while holding the GIL, so the files (a header and raw bytes) are written here.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData
from torch.distributed.tensor import DTensor

from megatron.parallel.mesh import PATIENCE, ParallelContext
from megatron.torch_private import sharded_file_keys, with_layout
from megatron.training.run_folder import LockError, write_json

logger = logging.getLogger(__name__)

BLOCK = 1 << 24  # bytes per read, write or checksum update
SLAB = 1 << 29  # bytes of host memory that copies of many tensors share; a larger tensor has a larger slab
ALIGNMENT = 256  # bytes; of a tensor in a slab
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}  # names in safetensors


def folder_name(iteration: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"iter_{iteration:07d}"


class Saver:
    """Writes checkpoints to `root`, one at a time; all ranks create, call and close it together.

    Used as a context manager: on exit it waits for the checkpoint that is being written.
    """

    def __init__(self, root: Path, ranks: ParallelContext, check_lock: Callable[[], None] | None = None):
        """Prepare to write to `root`; rank 0 calls `check_lock` before it creates or publishes a checkpoint."""
        self.root, self.ranks, self.check_lock = root, ranks, check_lock
        # a separate group: the thread's collectives must not interleave with those of training
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        on_cuda = ranks.device.type == "cuda"
        start = partial(torch.cuda.set_device, ranks.device) if on_cuda else None
        self._thread = ThreadPoolExecutor(1, "saver", start)
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
                logger.error(failure)  # `error`, which ends the run, is reported as its cause
        finally:
            self._thread.shutdown()

    def reserve(self, state: dict[str, Tensor]) -> None:
        """Allocate the host copies of `state` in the thread: first-touch allocation is much slower than a copy."""
        self.wait()
        self._pending = self._thread.submit(self._reserve, state)

    def _reserve(self, state: dict[str, Tensor]) -> None:
        self._copies = _host_copies(state)

    def save(self, state: dict[str, Tensor], meta: dict, then: Callable[[], None]) -> None:
        """Copy `state` and return; the thread writes the checkpoint of meta["iteration"].

        Names, shapes and layouts must be the same at every call, but may differ between ranks. Rank 0 calls `then` in
        its thread when the checkpoint is complete. Waits for the previous checkpoint first.

        Raises: OSError, LockError or RuntimeError as `wait` does.
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
        """Wait until no checkpoint is being written.

        Raises: OSError (such as a full disk) on every rank, with the partial files removed and older checkpoints
        untouched; LockError if another process has taken over the run; RuntimeError if another rank died.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _host_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in host memory, with the shapes and sharding of `state`, as views into a few slabs."""
    shards = [_local(tensor) for tensor in state.values()]
    slab_sizes, places = pack([shard.nbytes for shard in shards])
    pinned = any(shard.device.type == "cuda" for shard in shards)
    # zero_() touches the pages; otherwise the system would allocate them at the first copy
    slabs = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned).zero_() for size in slab_sizes]
    copies = {}
    for (name, tensor), shard, (slab, start) in zip(state.items(), shards, places, strict=True):
        zeros = slabs[slab][start : start + shard.nbytes].view(shard.dtype).view(shard.shape)
        copies[name] = with_layout(zeros, tensor)
    return copies


def pack(sizes: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the sizes in bytes of slabs for tensors of `sizes` bytes, and the slab and offset of each tensor.

    PyTorch's allocator of pinned memory rounds every allocation up to a power of two, so slabs are powers of two, the
    largest tensors get a place first, and others the first one that they fit into.
    """
    slab_sizes, used, places = [], [], {}
    remaining = sum(_aligned(size) for size in sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = _aligned(sizes[index])
        slab = next((slab for slab, end in enumerate(used) if end + size <= slab_sizes[slab]), len(used))
        if slab == len(used):
            most = 1 << (remaining.bit_length() - 1)  # the power of two that the remaining tensors fill
            slab_sizes.append(max(1 << (size - 1).bit_length(), min(SLAB, most)))
            used.append(0)
        places[index] = (slab, used[slab])
        used[slab] += size
        remaining -= size
    return slab_sizes, [places[index] for index in range(len(sizes))]


def _aligned(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def _write(writer: "_Writer", state: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write one checkpoint; a collective call. Raises: OSError, LockError or RuntimeError as `Saver.wait` does."""
    try:
        state_dict_saver.save(state, storage_writer=writer, process_group=group)
    except (Exception, CheckpointException) as error:  # CheckpointException derives from BaseException
        if isinstance(_cause(error), (RuntimeError, LockError)):
            raise _cause(error)  # noqa: B904  not a disk error: another rank died or another process took over the run
        shutil.rmtree(writer.temporary, ignore_errors=True)
        raise OSError(
            f"{writer.folder}: could not be written ({_cause(error)}); older checkpoints are untouched, "
            "free space and start the same command again"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed, which DCP wraps."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return first[0] if isinstance(first, tuple) else first
    return error


class _Writer(HuggingFaceStorageWriter):
    """DCP's storage writer of one checkpoint: writes to a temporary folder and renames it when complete.

    Rank 0 prepares and finishes; an exception in any of the methods ends DCP's `save` on every rank.
    """

    def __init__(self, folder: Path, meta: dict, then: Callable[[], None], check_lock: Callable[[], None]):
        self.folder, self.temporary = folder, folder.with_name(folder.name + ".partial")
        self.meta, self.then, self.check_lock = meta, then, check_lock
        super().__init__(str(self.temporary), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.check_lock()
        # of starts that were killed, at this step or another; no rank writes before it has a plan
        for partial_folder in self.temporary.parent.glob("iter_*.partial"):
            shutil.rmtree(partial_folder, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future:
        """Write this rank's shards into one file; the result is [(name, size in bytes, checksum)], or []."""
        files = []
        if plan.items:
            path = self.temporary / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
            offsets = {
                item.index.fqn: list(cast(TensorWriteData, item.tensor_data).chunk.offsets) for item in plan.items
            }
            files.append((path.name, *write_safetensors(path, tensors, offsets)))
        done = torch.futures.Future()
        done.set_result(files)
        return done

    def finish(self, metadata: Metadata, results: list[list[tuple[str, int, int]]]) -> None:
        self.check_lock()
        files = {name: (size, checksum) for result in results for name, size, checksum in result}
        write_json(self.temporary / "meta.json", self.meta | {"files": files})
        shutil.rmtree(self.folder, ignore_errors=True)
        self.temporary.rename(self.folder)
        self.then()


def write_safetensors(path: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> tuple[int, int]:
    """Write host tensors, each a shard of a larger tensor that starts at `offsets`; return size in bytes and CRC-32.

    The file is synced to disk on return.

    Raises: OSError if writing fails.
    """
    layout_key, offsets_key = sharded_file_keys()
    layout = json.dumps({name: {offsets_key: offset} for name, offset in offsets.items()})
    header: dict[str, dict] = {"__metadata__": {"format": "pt", layout_key: layout}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensor data start at a multiple of 8
    checksum, size = 0, 0
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *_blocks(tensors)):
            # training continues meanwhile: both calls release the GIL
            checksum, size = zlib.crc32(block, checksum), size + len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size, checksum


def _blocks(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        whole = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(whole), BLOCK):
            yield whole[start : start + BLOCK]
