"""The meta-gradient step: the second half of a step's samples is differentiated after a trial move along the first.

Every data-parallel rank by itself, with P the matrices that move and eta the norm of the move:

1. g = gradient of the first half of its micro-batches at theta
2. theta_P -= eta * g_P / ||g_P||
3. g += gradient of the second half at the moved weights
4. theta_P is restored to the last bit, and the sum over both halves, divided by the global count as in any other step,
   is reduced and goes to the optimizer

The second gradient is a first-order meta-gradient (first-order MAML, 1703.03400, with the halves as adaptation and
evaluation batches). Source: qlabs-eng/slowrun, pull requests 98 and 99; the move descends.

FSDP2 computes with gathered copies of the weights and updates the shards, so the move changes the copies, which FSDP2
frees after the last backward pass; the shards never move. In bf16 a copy is the moved fp32 weights, rounded once: most
moves are smaller than the rounding step of bf16 and would vanish if they were subtracted from rounded weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatron.batch import Batch
from megatron.config.sections import OptimizerConfig
from megatron.parallel.engine import Engine
from megatron.torch_private import foreach_copy_, foreach_mul, foreach_sub, fsdp_parameters

SMALLEST_NORM = 1e-30  # of a gradient: without one, nothing moves


@dataclass(frozen=True)
class MetaGradient:
    """The trial move of a step. `parameters`: "matrices" of the blocks, or those of their "mlp"."""

    norm: float  # L2, of the move of all matrices together
    parameters: str

    @classmethod
    def at(cls, config: OptimizerConfig, learning_rate: float) -> "MetaGradient | None":
        """Return the trial move of a step with `learning_rate`, or None if the flags set none."""
        if config.meta_gradient_norm is None:
            return None
        factor = learning_rate / config.lr if config.meta_gradient_style == "lr" else 1.0
        return cls(config.meta_gradient_norm * factor, config.meta_gradient_parameters)

    def backward(self, engine: Engine, batches: list[Batch], count: float) -> Tensor:
        """Do what `Engine.backward` does, with the gradients of the second half of `batches` at the moved weights.

        `batches` are an even number of micro-batches; the engine shards with FSDP2 at ZeRO stage 0 or 1, without
        pipeline stages.
        """
        middle = len(batches) // 2
        loss = engine.accumulate(batches[:middle], count)
        self._move(engine)
        return loss + engine.backward(batches[middle:], count)

    @torch.no_grad()
    def _move(self, engine: Engine) -> None:
        """Move the gathered weights; `engine` has unreduced gradients and gathered weights."""
        blocks = list(self._matrices(engine))
        squares = nn.utils.get_total_norm([matrix.gradient for block in blocks for matrix in block]).square()
        if engine.ranks.along("tp")[1] > 1:
            dist.all_reduce(squares, group=engine.ranks.mesh.get_group("tp"))
        factor = self.norm / squares.sqrt().clamp(min=SMALLEST_NORM)
        for block in blocks:  # bounds the memory of the moves
            gradients = [matrix.gradient for matrix in block]
            moves = foreach_mul(gradients, factor)
            weights = [matrix.fp32_weight for matrix in block]
            moved = foreach_sub(weights, moves)
            weights = [matrix.weight for matrix in block]
            foreach_copy_(weights, moved)

    def _matrices(self, engine: Engine) -> Iterator[list["_Matrix"]]:
        """Yield the matrices that move, block by block."""
        sharded = fsdp_parameters(engine.sharded_modules)
        by_weight = {id(parameter.unsharded_param): parameter for parameter in sharded}
        for model in engine.models:
            for block in model.layers.values():
                moving = cast(nn.Module, block.mlp) if self.parameters == "mlp" else block
                yield [_Matrix(by_weight[id(weight)]) for weight in moving.parameters() if weight.dim() == 2]


@dataclass(frozen=True)
class _Matrix:
    """A gathered matrix; with tensor parallelism this rank's shard of it, as everywhere here."""

    parameter: Any  # FSDPParam, of FSDP2

    @property
    def weight(self) -> Tensor:
        """The gathered copy that forward and backward passes use, in the compute dtype."""
        return _local(self.parameter.unsharded_param)

    @property
    def gradient(self) -> Tensor:
        """The accumulated gradient of this rank, fp32: FSDP2 has sums in the compute dtype only if that is fp32."""
        accumulated = self.parameter.unsharded_accumulated_grad
        return _local(self.parameter.unsharded_param.grad if accumulated is None else accumulated)

    @property
    def fp32_weight(self) -> Tensor:
        """The fp32 weights that `weight` was rounded from, gathered if they are sharded."""
        if self.weight.dtype == torch.float32:
            return self.weight
        shards = cast(DTensor, self.parameter.sharded_param)
        names = cast(tuple[str, ...], shards.device_mesh.mesh_dim_names)
        placements = [
            placement if name == "tp" else Replicate() for name, placement in zip(names, shards.placements, strict=True)
        ]
        return shards.redistribute(placements=placements).to_local().to(self.weight.device)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
