"""From run positions to batches: reads samples, lets the objective corrupt them, ahead of the step."""

import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron import stop_signals
from megatron.batch import Batch
from megatron.data.samples import TrainSamples
from megatron.objectives import InputNoise
from megatron.objectives.likelihood import Objective


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """The micro-batches of one process from run position `first_sample` on; item n is a pure function of n.

    A step takes `global_batch_size` consecutive run positions; its micro-batch m on process r takes the m-th share
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

    def positions(self, index: int) -> np.ndarray:
        """Return the run positions [B] of micro-batch `index`."""
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
        positions = self.positions(index)
        ids = np.stack([self.samples[int(position)] for position in positions])
        batches = self.noise(self.objective.prepare(ids, positions, self.seed), positions, self.seed)
        return [without_padding(batch, torch.from_numpy(positions < self.train_samples)) for batch in batches]


def without_padding(batch: Batch, real: torch.Tensor) -> Batch:
    """Return the batch with the weight and count of padded sequences taken away; `real` is [B] bool."""
    if bool(real.all()):
        return batch
    return replace(batch, weights=batch.weights * real[:, None], counts=batch.counts * real.numpy(), rows=None)


def loader(dataset: MicroBatches, num_workers: int, device: torch.device) -> DataLoader:
    """Return an iterable over all micro-batches to the end of the budget, in order.

    Workers are forked, on every version of Python: they inherit the memory map and touch no device.
    """
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a batch already
        sampler=range(dataset.steps * dataset.per_step),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )


def _ignore_signals(worker: int) -> None:
    """A signal to the whole job asks the training process to save and leave; its workers must live until then."""
    for number in stop_signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
