"""From sample indices to batches: reads samples, lets the objective corrupt them, ahead of the step."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron import stop_signals
from megatron.batch import Batch, without_padding
from megatron.config.flags import typed
from megatron.data.samples import TrainSamples
from megatron.errors import ConfigurationError
from megatron.objectives import InputNoise
from megatron.objectives.base import Objective
from megatron.parallel.failure_detector import when_orphaned

LARGER = "make /dev/shm larger (docker run --shm-size)"


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """The micro-batches of one process from sample index `first_sample` on; item n is a pure function of n.

    A step takes `global_batch_size` consecutive sample indices; its micro-batch m on process r takes the m-th share
    of all processes, and of that the r-th part. Positions beyond the budget are padding without weight.
    """

    samples: TrainSamples
    objective: Objective
    noise: InputNoise
    seed: int
    first_sample: int
    train_samples: int
    micro_batch_size: int
    global_batch_size: int
    rank: int
    size: int

    def sample_indices(self, index: int) -> np.ndarray:
        """Return the sample indices [B] of micro-batch `index`."""
        steps, micro = divmod(index, self.per_step)
        start = self.first_sample + steps * self.global_batch_size
        start += (micro * self.size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    @property
    def per_step(self) -> int:
        """Micro-batches of one step."""
        return self.global_batch_size // (self.micro_batch_size * self.size)

    @property
    def steps(self) -> int:
        """Steps to the end of the budget, the last one perhaps short."""
        return -(-(self.train_samples - self.first_sample) // self.global_batch_size)

    def __getitem__(self, index: int) -> list[Batch]:
        """Return the batches of micro-batch `index`: one, or two where a sample takes two passes."""
        sample_indices = self.sample_indices(index)
        ids = np.stack([self.samples[int(position)] for position in sample_indices])
        batches = self.noise(self.objective.prepare(ids, sample_indices, self.seed), sample_indices, self.seed)
        return [without_padding(batch, torch.from_numpy(sample_indices < self.train_samples)) for batch in batches]


class Loader:
    """An iterator over the micro-batches to the end of the budget, in order, which worker processes read ahead.

    Used as a context: no worker outlives it, however it ends. Errors of a worker are raised here as without workers.
    Raises ChildProcessError where a worker dies or cannot start, OSError where shared memory or open files run out.
    """

    def __init__(self, dataset: MicroBatches, num_workers: int, device: torch.device):
        self.num_workers, others = num_workers, set(active_children())
        # workers are forked, on every version of Python: they inherit the memory map and touch no device
        loader = DataLoader(
            _Shared(dataset, num_workers) if num_workers else dataset,
            batch_size=None,  # an item is a batch already
            sampler=range(dataset.steps * dataset.per_step),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if num_workers else None,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._batches = iter(loader)
        except OSError as error:
            _kill(set(active_children()) - others)
            raise ChildProcessError(
                f"{typed('num_workers', num_workers)}: a data loader worker cannot start ({error.strerror}); lower it"
            ) from None
        self._workers = set(active_children()) - others
        if self._workers:
            # torch's handler raises wherever the main thread is when a worker dies; __next__ looks for that itself
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self._batches = iter(())  # torch ends its workers with the last reference to its iterator
        _kill(self._workers)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self._check_workers()
        try:
            item = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            # torch's error may be of what a dying worker has left, or 5 s after its death
            closed = wait([worker.sentinel for worker in self._workers], timeout=1)
            for worker in self._workers:
                worker.join(None if worker.sentinel in closed else 0)
            self._check_workers()
            if "open files" in str(error):  # each tensor of a batch on its way is one
                rule = "batches on their way need more open files than the system allows; raise ulimit -n, or lower it"
                raise OSError(f"{typed('num_workers', self.num_workers)}: {rule}") from None
            raise
        if isinstance(item, Exception):
            raise item
        return item

    def _check_workers(self) -> None:
        dead = next((worker for worker in self._workers if worker.exitcode), None)
        if dead is None:
            return
        number = -dead.exitcode
        ending = f"was killed by {signal.Signals(number).name}" if number > 0 else f"ended with code {dead.exitcode}"
        cause = {
            signal.SIGKILL: "the machine may have run out of memory; lower",
            signal.SIGBUS: f"shared memory ran out, or a data file was cut; {LARGER}, or lower",
        }.get(number, "lower")
        raise ChildProcessError(
            f"data loader worker (process {dead.pid}) {ending}: {cause} {typed('num_workers', self.num_workers)} and "
            "start the same command again"
        )


@dataclass(frozen=True)
class _Shared(Dataset):
    """Micro-batches in shared memory, or the error that a user can put right: what a worker sends.

    torch would copy them there in a thread of the worker, where an error is printed and the batch never arrives, and
    would wrap errors in a traceback.
    """

    dataset: MicroBatches
    num_workers: int

    def __getitem__(self, index: int) -> list[Batch] | Exception:
        try:
            batches = self.dataset[index]
        except (ConfigurationError, OSError) as error:
            return error
        try:
            return [batch.map_tensors(torch.Tensor.share_memory_) for batch in batches]
        except (RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0]
            return OSError(
                f"{typed('num_workers', self.num_workers)}: a batch could not be put into shared memory ({reason}); "
                f"{LARGER}, lower --num-workers, or give 0"
            )


def _start_worker(parent: int, worker: int) -> None:
    when_orphaned(partial(os._exit, 1), parent)
    _ignore_signals(worker)


def _ignore_signals(worker: int) -> None:
    """A signal to the whole job asks the training process to save and leave; its workers must live until then."""
    for number in stop_signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: set[BaseProcess]) -> None:
    """End workers at once: they ignore every other signal, and Python waits for them when it ends."""
    for worker in workers:
        worker.kill()
        worker.join()
