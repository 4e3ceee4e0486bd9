"""Averages of the model weights over steps; they are evaluated in place of the weights and do not affect training.

--ema-decay D: after every step average = D average + (1 - D) weights; it starts at the initial weights.
--average-from-samples N: the mean of the weights after every step from N consumed samples on, as in Izmailov et al.,
Averaging Weights Leads to Wider Optima and Better Generalization (1803.05407).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.config.sections import OptimizerConfig
from megatron.parallel.engine import Engine
from megatron.torch_private import foreach_lerp_
from megatron.training.checkpoint_store import load_checkpoint
from megatron.training.resume import Origin


class Average:
    """An average of the weights of an FSDP2 engine, in fp32 and sharded like the weights."""

    def __init__(self, engine: Engine, config: OptimizerConfig):
        weights = {name: parameter.detach() for name, parameter in engine.named_parameters()}
        self.config = config
        self._engine = engine
        self.steps = 0  # steps averaged so far
        self._average = {name: tensor.clone() for name, tensor in weights.items()}
        # local shards, which share their storage with the DTensors above
        self._average_shards = _local_shards(self._average.values())
        self._weight_shards = _local_shards(weights.values())

    def update(self, samples: int) -> None:
        """Update the average with the weights after the step that ended at `samples` consumed samples.

        Once the run has diverged, it remains that of the last good step, as the weights do.
        """
        if samples >= (self.config.average_from_samples or 0):
            self.steps += 1
            weight = 1 / self.steps if self.config.ema_decay is None else 1 - self.config.ema_decay
            weights = [weight * (1 - self._engine.diverged)] * len(self._average_shards)
            foreach_lerp_(self._average_shards, self._weight_shards, weights)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the averaged weights in; on exit, restore the model weights bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weights in zip(self._average_shards, self._weight_shards, strict=True):
            previous = weights.clone()  # one parameter at a time, to save memory
            weights.copy_(average)
            average.copy_(previous)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights by checkpoint name."""
        return {f"average.{name}": tensor for name, tensor in self._average.items()}

    def resume(self, origin: Origin) -> None:
        """Resume the average of a checkpoint whose weights are already loaded.

        If its run had no average or one of another kind (only a branch may change that), a new one starts at the
        loaded weights.
        """
        recorded = origin.meta["config"]["optimizer"]
        if all(recorded.get(name) == getattr(self.config, name) for name in ("ema_decay", "average_from_samples")):
            load_checkpoint(origin.checkpoint, self.tensors())
            self.steps = origin.meta["averaged_steps"]


def _local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [cast(DTensor, tensor).to_local() for tensor in tensors]


def start_average(engine: Engine, config: OptimizerConfig, origin: Origin | None) -> Average | None:
    """Return the configured average, resumed from `origin` if there is one; None without averaging flags."""
    if not config.averages:
        return None
    average = Average(engine, config)
    if origin:
        average.resume(origin)
    return average
