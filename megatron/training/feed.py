"""From run positions to batches: reads samples, lets the objective corrupt them, ahead of the step."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron.batch import Batch
from megatron.data.samples import TrainSamples
from megatron.objectives.token_dropout import TokenDropout


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Micro-batch n of this process, a pure function of n: `consumed` moves with n, nothing is remembered.

    A step takes `global_batch_size` run positions; micro-batch m of process r takes the m-th share of all
    processes, and of that the r-th part. Positions beyond the budget are padding without weight.
    """

    samples: TrainSamples
    objective: object
    token_dropout: TokenDropout
    seed: int
    train_samples: int
    micro_batch_size: int
    global_batch_size: int
    rank: int
    size: int

    def positions(self, index: int) -> np.ndarray:
        """Return the run positions [B] of micro-batch `index`, counted from the start of the run."""
        steps, micro = divmod(index, self.per_step)
        start = steps * self.global_batch_size + (micro * self.size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    @property
    def per_step(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.size)

    def __getitem__(self, index: int) -> Batch:
        positions = self.positions(index)
        ids = np.stack([self.samples[int(position)] for position in positions])
        batch = self.token_dropout(self.objective.prepare(ids, positions, self.seed), positions, self.seed)
        return without_padding(batch, torch.from_numpy(positions < self.train_samples))


def without_padding(batch: Batch, real: torch.Tensor) -> Batch:
    """Return the batch with the weight and count of padded sequences taken away; `real` is [B] bool."""
    if bool(real.all()):
        return batch
    count = batch.count * int(real.sum()) // len(real)
    return replace(batch, weights=batch.weights * real[:, None], count=count, rows=None)


def loader(dataset: MicroBatches, first_step: int, last_step: int, num_workers: int, device: torch.device) -> DataLoader:
    """Return an iterable over the micro-batches of steps first_step .. last_step - 1, in order."""
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step * dataset.per_step, last_step * dataset.per_step),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
