"""One optimizer step: count, accumulate, clip, update."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.batch import Batch
from megatron.parallel.mesh import Processes
from megatron.randomness import stream


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device: this process's share of the loss, and the global gradient norm."""

    loss: Tensor  # []
    grad_norm: Tensor  # []


def reseed(seed: int, iteration: int, rank: int) -> None:
    """Set the ambient generators, which only dropout reads, so that no generator state is ever saved."""
    torch.manual_seed(int(stream(seed, "dropout", iteration, rank).integers(2**62)))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    processes: Processes,
    *,
    learning_rate: float,
    clip_grad: float,
) -> StepResult:
    """Update `model` on the mean loss of this step's micro-batches over all processes.

    The loss is sum(weights * nll) / count with one global count, known before the forward pass, so the
    result does not depend on how the step is cut into micro-batches and processes.
    """
    (count,) = processes.sum(sum(batch.count for batch in micro_batches))
    loss = torch.zeros((), device=processes.device)
    for index, batch in enumerate(micro_batches):
        # gradients are reduced once, with the last micro-batch
        model.set_requires_gradient_sync(index == len(micro_batches) - 1)
        share = model(batch.to(processes.device)).sum() / count
        # the reduction averages over the processes, and the count is already global
        (share * processes.size).backward()
        loss += share.detach()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad if clip_grad else float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
