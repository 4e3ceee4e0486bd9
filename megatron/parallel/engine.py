"""The engine: the interface between training and a parallel model, the same for every layout."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from megatron.batch import Batch
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import ParallelContext
from megatron.torch_private import add_up_gradients, foreach_mul_, fsdp_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def loss_scale(loss: Tensor, scale: float) -> Tensor:
    """Return `scale` as a factor of `loss`, [], or NaN if the loss is not finite.

    The gradients of a loss that is not finite are NaN then, so the global norm alone shows every rank that a step must
    be skipped, without another collective.
    """
    return scale + 0 * loss.detach()


class Engine:
    """A model sharded by FSDP2 that this rank runs from the first layer to the last.

    `roots` are the modules that FSDP2 wraps: here the model itself. `Pipeline` runs pipeline stages of a model,
    `DeepSpeedEngine` shards with DeepSpeed instead. With `skips_hooks` FSDP2's hooks run for the last micro-batch
    of a step only, which takes the host less time; the root is the only module with hooks.

    From the first step whose loss or gradients are not finite, no update is applied: weights and moments remain those
    of the step before it. `diverged`, fp32 [], is 1 from that step on, else 0; it is equal on all ranks and stays on
    the device of the parameters, so that the host does not wait for it.
    """

    roots: Sequence[nn.Module]
    diverged: Tensor

    def __init__(
        self,
        roots: Sequence[nn.Module],
        models: list[Transformer],
        ranks: ParallelContext,
        *,
        zero_stage: int,
        skips_hooks: bool = False,
    ):
        self.roots = roots
        self.models = models
        self.ranks = ranks
        self.zero_stage = zero_stage
        self.skips_hooks = skips_hooks
        self.diverged = torch.zeros((), device=next(self.parameters()).device)

    def backward(self, batches: list[Batch], count: float) -> Tensor:
        """Compute and reduce the gradients of sum(weights * nll) / count; return this rank's share of the loss, [].

        `batches` are this rank's micro-batches, all of one shape (gradient accumulation); `count` is global. The
        shares, on the device, sum to the loss over all ranks; they are 0 except on loss ranks.
        """
        return self.accumulate(batches, count, reduces=True)

    def accumulate(self, batches: list[Batch], count: float, *, reduces: bool = False) -> Tensor:
        """Do what `backward` does, but unless the step `reduces` here, leave reduction and resharding to a later call.

        Then the gradients remain this rank's own and the weights gathered, except for what ZeRO 2 and 3 always shard.
        """
        (root,) = self.roots
        if self.skips_hooks:
            cast(FSDPModule, root).unshard()
        loss = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            is_last = reduces and index == len(batches) - 1
            # between micro-batches ZeRO 2 keeps sharded gradients only, and ZeRO 3 sharded parameters only
            for module in self.sharded_modules:
                module.set_requires_gradient_sync(is_last or self.zero_stage >= 2, recurse=False)
                module.set_reshard_after_backward(is_last or self.zero_stage >= 3, recurse=False)
            skips_hooks = self.skips_hooks and not is_last
            run = root.forward if skips_hooks else root
            share = run(batch.to(self.ranks.device)).sum() / count
            # the reduction averages over the data-parallel ranks, and the count is already global
            share.backward(loss_scale(share, self.ranks.data_size))
            if skips_hooks:
                add_up_gradients(self._fsdp_parameters)
            loss += share.detach()
        return loss if self.ranks.is_loss_rank else torch.zeros_like(loss)

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted nll per position, fp32 [B, S]; it is valid on loss ranks only."""
        (root,) = self.roots
        return root(batch.to(self.ranks.device), per_position=True)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale all gradients down to the global norm `limit`, 0 for no limit; return the norm before, []."""
        shards = [cast(DTensor, parameter.grad).to_local() for parameter, _ in self._sharded_parameters]
        counted = [shard for shard, (_, counts) in zip(shards, self._sharded_parameters, strict=True) if counts]
        squares = nn.utils.get_total_norm(counted).square() if counted else torch.zeros((), device=shards[0].device)
        if self.ranks.size > 1:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if limit:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            foreach_mul_(shards, scale)
        return norm

    @cached_property
    def sharded_modules(self) -> list[FSDPModule]:
        """The modules that FSDP2 wraps; walking all modules at every micro-batch would take the host longer."""
        return [module for root in self.roots for module in root.modules() if isinstance(module, FSDPModule)]

    @cached_property
    def _fsdp_parameters(self) -> list[Any]:
        return fsdp_parameters(self.sharded_modules)

    @cached_property
    def _sharded_parameters(self) -> list[tuple[DTensor, bool]]:
        """This rank's parameters, each with whether it enters the norm; they must be sharded at the first use."""
        return [(parameter, self._enters_norm(parameter)) for parameter in cast(Iterator[DTensor], self.parameters())]

    def _enters_norm(self, parameter: DTensor) -> bool:
        """Return whether this rank's shard of a parameter is counted in the norm: one of several equal copies is."""
        mesh, placements = parameter.device_mesh, parameter.placements
        return all(
            mesh.get_local_rank(axis) == 0 for axis, placement in enumerate(placements) if placement == Replicate()
        )

    def update(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Clip, step and clear the gradients; return the global norm before clipping, [].

        The optimizer skips the step where its attribute `found_inf`, a tensor, is 1, as PyTorch's fused AdamW does.
        """
        norm = self.clip(limit)
        self.skip_if_diverged(optimizer, norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def skip_if_diverged(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Make the optimizer skip its steps if the global norm of this or of an earlier step is not finite."""
        self.diverged = torch.where(norm.isfinite(), self.diverged.to(norm.device), 1.0)
        cast(Any, optimizer).found_inf = self.diverged

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name: `model.<name>` and `optimizer.<moment>.<name>`.

        They are this rank's shards and stages. All ranks must call this.
        """
        self.reshard()
        named = dict(self.named_parameters())
        state = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            for moment, tensor in optimizer.state[parameter].items():
                if moment != "step":  # the checkpoint has its own step count
                    state[f"optimizer.{moment}.{name}"] = tensor
        return state

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Adopt a checkpoint, `steps` steps old, that was read into what `tensors` returned.

        Here nothing is left to do; `DeepSpeedEngine.tensors` returns copies, which its `load` writes back.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by the names that they have in the whole model."""
        for model in self.models:
            yield from model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self, training: bool = True) -> None:
        """Set training mode, with dropout, or evaluation mode."""
        for root in self.roots:
            root.train(training)

    def eval(self) -> None:
        """Set evaluation mode."""
        self.train(False)

    def reshard(self) -> None:
        """Free parameters that a forward pass gathered; checkpoints and the optimizer see shards again."""
        for module in self.sharded_modules:
            module.reshard()
