"""One optimizer step with gradient accumulation: count, accumulate, clip, update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.meta_gradient import MetaGradient
from megatron.randomness import stream


@dataclass(frozen=True)
class StepResult:
    """Results of a step, on the device: this rank's share of the loss, and the global gradient norm."""

    loss: Tensor  # []
    grad_norm: Tensor  # []


def reseed(seed: int, iteration: int, ranks: ParallelContext) -> None:
    """Seed the global generators, which only dropout reads, so that checkpoints need no generator state.

    The key contains the rank: dropout acts on different activations on every rank.
    """
    torch.manual_seed(int(stream(seed, "dropout", iteration, ranks.rank).integers(2**62)))


def train_step(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    learning_rate: float,
    weight_decay: float,
    clip_grad: float,
    meta_gradient: MetaGradient | None = None,
) -> StepResult:
    """Update the engine's model on the mean loss of this step's micro-batches over all ranks.

    The loss is sum(weights * nll) / count with one global count, known before the forward pass, so the
    result does not depend on how the step is split into micro-batches and ranks. With a `meta_gradient` it depends on
    which samples a rank reads, and the loss of the second half is that at the moved weights.
    """
    ranks = engine.ranks
    # several ranks read the same samples; only the loss rank counts them
    (count,) = ranks.sum(sum(batch.count for batch in micro_batches) if ranks.is_loss_rank else 0)
    if meta_gradient:
        loss = meta_gradient.backward(engine, micro_batches, count)
    else:
        loss = engine.backward(micro_batches, count)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"].lr
        group["weight_decay"] = weight_decay * group["scale"].weight_decay if group["decays"] else 0.0
    return StepResult(loss, engine.update(optimizer, clip_grad))
