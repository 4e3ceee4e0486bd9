"""Averages of the weights over steps, kept beside the weights and evaluated in their place; training never sees them.

--ema-decay D: after every step average = D average + (1 - D) weights, from the weights at the start on.
--average-from-samples N: the mean of the weights after every step from N consumed samples on, as in Izmailov et al.,
Averaging Weights Leads to Wider Optima and Better Generalization (1803.05407).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.config.sections import OptimizerConfig
from megatron.parallel.engine import Engine
from megatron.training import checkpoint
from megatron.training.resume import Origin


class Average:
    """An average of the weights of an engine of FSDP2: fp32, and sharded as they are."""

    def __init__(self, engine: Engine, config: OptimizerConfig):
        weights = {name: parameter.detach() for name, parameter in engine.named_parameters()}
        self.config, self.steps = config, 0  # how many steps have entered
        self._average = {name: tensor.clone() for name, tensor in weights.items()}
        # storage that updates and swaps work on
        self._here = [tensor.to_local() for tensor in self._average.values()]
        self._weights = [tensor.to_local() for tensor in weights.values()]

    def update(self, samples: int) -> None:
        """Take in the weights after the step that ended at `samples` consumed samples."""
        if samples >= (self.config.average_from_samples or 0):
            self.steps += 1
            share = 1 / self.steps if self.config.ema_decay is None else 1 - self.config.ema_decay
            torch._foreach_lerp_(self._here, self._weights, share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average in the place of the weights, and the weights back, to the bit, at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weights in zip(self._here, self._weights, strict=True):
            kept = weights.clone()  # of one parameter at a time
            weights.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it, by name."""
        return {f"average.{name}": tensor for name, tensor in self._average.items()}

    def resume(self, origin: Origin) -> None:
        """Go on with the average of a checkpoint, whose weights are loaded.

        Where its run had none, or another kind, which only a branch may change, a new one begins at those weights.
        """
        before = origin.meta["config"]["optimizer"]
        if all(before.get(name) == getattr(self.config, name) for name in ("ema_decay", "average_from_samples")):
            checkpoint.load(origin.checkpoint, self.tensors())
            self.steps = origin.meta["averaged_steps"]


def start_average(engine: Engine, config: OptimizerConfig, origin: Origin | None) -> Average | None:
    """Return the average that the configuration asks for, where the run stands; None where it asks for none."""
    if not config.averages:
        return None
    average = Average(engine, config)
    if origin:
        average.resume(origin)
    return average
