"""Builds micro-batches from sample indices, in worker processes ahead of the step."""

import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron import stop_signals
from megatron.batch import Batch, without_padding
from megatron.config.flags import typed
from megatron.errors import ConfigurationError
from megatron.objectives.base import Objective
from megatron.objectives.input_noise import InputNoise
from megatron.parallel.failure_detector import when_orphaned
from megatron.torch_private import leave_child_signals_alone

ALIGNMENT = 64  # bytes, of tensors in a block of shared memory
MESSAGE_BYTES = 1 << 20  # of micro-batches that a worker sends together, unless a single one is larger
LARGER = "make /dev/shm larger (docker run --shm-size)"


class Samples(Protocol):
    """Training samples: int64 [S+1] by sample index."""

    def __getitem__(self, sample_index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """The micro-batches of one data-parallel rank, from sample index `first_sample` on; item n is a pure function of n.

    A step takes `global_batch_size` consecutive sample indices, split into consecutive blocks of `micro_batch_size`:
    micro-batch m of rank r is block m * size + r. Samples beyond the budget are padding with weight 0.
    """

    samples: Samples
    objective: Objective
    noise: InputNoise
    _: KW_ONLY
    seed: int
    first_sample: int
    train_samples: int
    micro_batch_size: int
    global_batch_size: int
    rank: int
    size: int

    def sample_indices(self, index: int) -> np.ndarray:
        """Return the sample indices [B] of micro-batch `index`."""
        step, micro_batch = divmod(index, self.per_step)
        start = self.first_sample + step * self.global_batch_size
        start += (micro_batch * self.size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    @property
    def per_step(self) -> int:
        """Micro-batches per step on this rank: the number of gradient accumulation steps."""
        return self.global_batch_size // (self.micro_batch_size * self.size)

    @property
    def steps(self) -> int:
        """Steps to the end of the budget; the last one may be short."""
        return -(-(self.train_samples - self.first_sample) // self.global_batch_size)

    def __getitem__(self, index: int) -> list[Batch]:
        """Return the batches of micro-batch `index`: one, or two if the objective needs two passes per sample."""
        sample_indices = self.sample_indices(index)
        ids = np.stack([self.samples[int(i)] for i in sample_indices])  # [B, S + 1]
        batches = self.noise(self.objective.prepare(ids, sample_indices, self.seed), sample_indices, self.seed)
        return [without_padding(batch, torch.from_numpy(sample_indices < self.train_samples)) for batch in batches]


class Loader:
    """An iterator over the micro-batches to the end of the budget, in order; worker processes prefetch them.

    Used as a context manager: no worker outlives it. Errors in a worker are raised here as they would be without
    workers, after the micro-batches that precede them. A worker sends small micro-batches several at a time, as many as
    fit into MESSAGE_BYTES by the size of the first.

    Raises: ChildProcessError if a worker dies or cannot start; OSError if shared memory or open files run out.
    """

    def __init__(self, dataset: MicroBatches, num_workers: int, device: torch.device):
        self.num_workers = num_workers
        self._received: deque[list[Batch] | Exception] = deque()  # but not yet returned
        self._per_message = 1  # micro-batches, until the size of the first is known
        micro_batches = dataset.steps * dataset.per_step
        context = _Context()
        self._workers = context.processes
        loader = DataLoader(
            _Shared(dataset, num_workers) if num_workers else dataset,
            batch_size=None,  # an item is already a batch
            sampler=self._messages(micro_batches) if num_workers else range(micro_batches),
            num_workers=num_workers,
            multiprocessing_context=context if num_workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if num_workers else None,
        )
        leave_child_signals_alone()  # __next__ checks the workers
        try:
            # stop signals reach the whole job: the training process saves and exits, and needs its workers
            with stop_signals.blocked():
                self._items = iter(loader)
        except BaseException as error:
            _kill(self._workers)
            if not (num_workers and isinstance(error, (OSError, RuntimeError))):
                raise
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise ChildProcessError(
                f"{typed('num_workers', num_workers)}: a data loader worker cannot start ({reason}); lower it"
            ) from None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self._items = iter(())  # torch stops its workers when the last reference to its iterator goes
        _kill(self._workers)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self._check_workers()
        if not self._received:
            self._receive()
        micro_batch = self._received.popleft()
        if isinstance(micro_batch, Exception):
            raise micro_batch
        return micro_batch

    def _messages(self, micro_batches: int) -> Iterator[range]:
        """Yield the indices of the micro-batches of each message."""
        first = 0
        while first < micro_batches:
            yield range(first, first := min(first + self._per_message, micro_batches))

    def _receive(self) -> None:
        """Wait for the next micro-batches.

        Raises: StopIteration after the last one.
        """
        try:
            item = next(self._items)
        except (RuntimeError, OSError, EOFError) as error:
            # the error may come from a dying worker's half-sent data, or up to 5 s after its death
            closed = wait([worker.sentinel for worker in self._workers], timeout=1)
            for worker in self._workers:
                worker.join(None if worker.sentinel in closed else 0)
            self._check_workers()
            if "open files" in str(error):  # every message that is prefetched needs a file descriptor
                message = "prefetched batches need more open files than the system allows; raise ulimit -n, or lower it"
                raise OSError(f"{typed('num_workers', self.num_workers)}: {message}") from None
            raise
        if not isinstance(item, _Message):
            self._received.append(item)
            return
        self._received.extend(item.micro_batches())
        if item.error:
            self._received.append(item.error)
        elif self._per_message == 1:
            self._per_message = max(1, MESSAGE_BYTES // item.block.numel())

    def _check_workers(self) -> None:
        dead = next((worker for worker in self._workers if worker.exitcode), None)
        if dead is None or dead.exitcode is None:
            return
        number = -dead.exitcode
        ending = f"was killed by {signal.Signals(number).name}" if number > 0 else f"exited with code {dead.exitcode}"
        causes: dict[int, str] = {
            signal.SIGKILL: "the machine may have run out of memory; lower",
            signal.SIGBUS: f"shared memory ran out, or a data file was truncated; {LARGER}, or lower",
        }
        cause = causes.get(number, "lower")
        raise ChildProcessError(
            f"data loader worker (process {dead.pid}) {ending}: {cause} {typed('num_workers', self.num_workers)} and "
            "start the same command again"
        )


@dataclass(frozen=True)
class _TensorSlice:
    """Where a tensor is in a block of bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """Return the view of the tensor in a block."""
        return block[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Message:
    """Consecutive micro-batches whose tensors are in one block of shared memory, and the error that followed them.

    A block costs a file descriptor, which the training process fetches over a socket, as long as it takes to read some
    samples.
    """

    block: Tensor  # uint8
    contents: list[list[dict[str, Any]]]  # the fields of each batch, with a `_TensorSlice` for each tensor
    error: Exception | None = None

    @classmethod
    def pack(cls, micro_batches: list[list[Batch]], error: Exception | None = None) -> "_Message":
        tensors: list[tuple[_TensorSlice, Tensor]] = []

        def packed(value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            start = -(-tensors[-1][0].end // ALIGNMENT) * ALIGNMENT if tensors else 0
            tensors.append((_TensorSlice(start, value.shape, value.dtype), value))
            return tensors[-1][0]

        contents = [
            [{field.name: packed(getattr(batch, field.name)) for field in fields(batch)} for batch in batches]
            for batches in micro_batches
        ]
        block = torch.empty(tensors[-1][0].end if tensors else 0, dtype=torch.uint8).share_memory_()
        for piece, tensor in tensors:
            piece.of(block).copy_(tensor)
        return cls(block, contents, error)

    def pin_memory(self) -> "_Message":
        """Return a copy in pinned memory; the data loader calls it."""
        return replace(self, block=self.block.pin_memory())

    def micro_batches(self) -> list[list[Batch]]:
        """Return the batches of each micro-batch, views of the block."""
        return [
            [Batch(**{name: self._restored(value) for name, value in values.items()}) for values in batches]
            for batches in self.contents
        ]

    def _restored(self, value: Any) -> Any:
        return value.of(self.block) if isinstance(value, _TensorSlice) else value


@dataclass(frozen=True)
class _Shared(Dataset):
    """Micro-batches in shared memory, up to an error for the user: the messages that a worker sends.

    By default torch copies batches there in a thread of the worker, in which an error is only printed and the batch
    never arrives, and it wraps errors in a traceback.
    """

    dataset: MicroBatches
    num_workers: int

    def __getitem__(self, indices: range) -> _Message:
        micro_batches, error = [], None
        try:
            for index in indices:
                micro_batches.append(self.dataset[index])
        except (ConfigurationError, OSError) as raised:
            error = raised
        try:
            return _Message.pack(micro_batches, error)
        except (RuntimeError, OSError) as raised:
            reason = str(raised).partition("\n")[0]
            error = OSError(
                f"{typed('num_workers', self.num_workers)}: a batch could not be copied to shared memory ({reason}); "
                f"{LARGER}, lower --num-workers, or give 0"
            )
            return _Message(torch.empty(0, dtype=torch.uint8), [], error)


class _Context(ForkContext):
    """Forks on every Python version, as workers inherit the memory map and do not touch the device; lists them all.

    multiprocessing.active_children() omits processes that have died.
    """

    def __init__(self):
        super().__init__()
        self.processes: list[BaseProcess] = []

    def Process(self, *args, **kwargs) -> BaseProcess:
        self.processes.append(ForkProcess(*args, **kwargs))
        return self.processes[-1]


def _start_worker(parent: int, worker: int) -> None:
    when_orphaned(partial(os._exit, 1), parent)


def _kill(workers: list[BaseProcess]) -> None:
    """Kill workers: they block stop signals, and Python waits for them at exit."""
    for worker in workers:
        if worker.pid:  # it has started
            worker.kill()
            worker.join()
