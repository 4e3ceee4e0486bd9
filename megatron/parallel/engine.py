"""The engine: a parallel model as training sees it, whatever the layout."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatron.batch import Batch
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import ParallelContext

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


class Engine:
    """One sharded model that this process runs from the first layer to the last; `Pipeline` runs stages of one.

    `roots` are the modules that FSDP2 has sharded: the model itself. `DeepSpeedEngine` is the other way to share one.
    """

    def __init__(self, roots: list[nn.Module], models: list[Transformer], ranks: ParallelContext, zero_stage: int):
        self.roots, self.models, self.ranks, self.zero_stage = roots, models, ranks, zero_stage

    def backward(self, batches: list[Batch], count: float) -> Tensor:
        """Leave the gradients of sum(weights * nll) / count over all processes, reduced; return a share of that sum.

        `batches` are this process's micro-batches, all of one shape, and `count` is global. The shares, [] on the
        device, sum to the loss over all processes; only those that speak have one.
        """
        (root,) = self.roots
        loss = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            # ZeRO 2 keeps no whole gradients between micro-batches, ZeRO 3 no whole parameters either
            root.set_requires_gradient_sync(last or self.zero_stage >= 2)
            root.set_reshard_after_backward(last or self.zero_stage >= 3)
            share = root(batch.to(self.ranks.device)).sum() / count
            # the reduction averages over the data-parallel processes, and the count is already global
            (share * self.ranks.data_size).backward()
            loss += share.detach()
        return loss if self.ranks.is_loss_rank else torch.zeros_like(loss)

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted nll per position, fp32 [B, S]; it means something where the process speaks."""
        (root,) = self.roots
        return root(batch.to(self.ranks.device), per_position=True)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale all gradients down to the global norm `limit`, 0 for no limit; return the norm before, []."""
        gradients = [parameter.grad for parameter in self.parameters()]
        local = [gradient.to_local() for gradient in gradients]
        counted = [part for part, parameter in zip(local, self.parameters(), strict=True) if self._counts(parameter)]
        squares = nn.utils.get_total_norm(counted).square() if counted else torch.zeros((), device=local[0].device)
        if self.ranks.size > 1:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if limit:
            torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _counts(self, parameter: DTensor) -> bool:
        """Return whether this process's part of a parameter enters the norm: one of several equal copies does."""
        mesh, placements = parameter.device_mesh, parameter.placements
        return all(
            mesh.get_local_rank(axis) == 0 for axis, placement in enumerate(placements) if placement == Replicate()
        )

    def update(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Clip, step and clear the gradients; return the global norm before clipping, []."""
        norm = self.clip(limit)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return what a checkpoint holds by name: the parameters, and their moments under optimizer.<moment>.

        Tensors and names are those held here; all processes take part.
        """
        self.reshard()
        named = dict(self.named_parameters())
        state = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            for moment, tensor in optimizer.state[parameter].items():
                if moment != "step":  # which follows from the checkpoint's own
                    state[f"optimizer.{moment}.{name}"] = tensor
        return state

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Take over what `tensors` returned and a checkpoint, `steps` steps old, was read into: it is in place."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters held here by the names they have in the whole model."""
        for model in self.models:
            yield from model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self, training: bool = True) -> None:
        for root in self.roots:
            root.train(training)

    def eval(self) -> None:
        self.train(False)

    def reshard(self) -> None:
        """Free whole parameters that a forward pass left behind; checkpoints and the optimizer see shards again."""
        for root in self.roots:
            for module in root.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
