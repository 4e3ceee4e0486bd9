"""Pipeline parallelism: the layers of a stage, and torch's schedules over this rank's stages."""

import copy
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from megatron.batch import Batch
from megatron.config.layout_checks import layers_of
from megatron.model.transformer import Transformer
from megatron.parallel.engine import Engine, loss_scale
from megatron.parallel.mesh import ParallelContext


def extract_stage(model: Transformer, stage: int, num_stages: int) -> Transformer:
    """Return a copy of `model` with the layers of one stage, under the names that they have in the whole model.

    The first stage has the embedding, the last one the head; with tied weights both have a copy of the matrix.
    """
    piece = copy.deepcopy(model)
    piece.is_first_stage = stage == 0
    piece.is_last_stage = stage == num_stages - 1
    for name in list(piece.layers.keys() - map(str, layers_of(stage, num_stages, len(model.layers)))):
        del piece.layers[name]
    piece.schedule = [(position, name) for position, name in piece.schedule if name in piece.layers]
    is_tied = not piece.config.untie_embeddings_and_output_weights
    if not (piece.is_first_stage or (piece.is_last_stage and is_tied)):
        del piece.embed_tokens
    if not piece.is_last_stage:
        del piece.norm
        if not is_tied:
            del piece.lm_head
    return piece


class Stage(nn.Module):
    """A pipeline stage in the form that torch's schedules call: once per micro-batch, in order.

    A schedule passes hidden states only; the batches come from an iterator, so that none of their fields goes to the
    device and back.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.batches: Iterator[Batch] = iter(())

    def forward(self, hidden: Tensor | None = None, *, per_position: bool = False) -> Tensor:
        """Run the stage on the next batch and the hidden states [B, S/tp, H] of the previous stage."""
        return self.model(next(self.batches), hidden, per_position)


class Pipeline(Engine):
    """This rank's stages of a model: one in 1F1B, several in interleaved 1F1B.

    Stage i runs on pipeline rank i mod pp.
    """

    roots: list[Stage]

    def __init__(
        self,
        roots: list[Stage],
        models: list[Transformer],
        ranks: ParallelContext,
        *,
        zero_stage: int,
        dtype: torch.dtype,
    ):
        super().__init__(roots, models, ranks, zero_stage=zero_stage)
        self.pp_rank, self.pp_size = ranks.along("pp")
        self.group = ranks.mesh.get_group("pp")
        self.tp_size = ranks.along("tp")[1]
        self.dtype = dtype  # of hidden states
        self.schedule = None
        self.shape = None  # (micro-batches, B, S) of the schedule
        self.scale = 1.0
        self.tied_group = _tied_group(ranks, models[0])

    def backward(self, batches: list[Batch], count: float) -> Tensor:
        """Do what `Engine.backward` does with one step of the schedule over all micro-batches."""
        losses = []
        self.scale = self.ranks.data_size / count
        batches = [batch.to(self.ranks.device) for batch in batches]
        for root in self.roots:
            root.batches = iter(batches)
        # a schedule has the shapes of its first step
        shape = (len(batches), *batches[0].tokens.shape)
        if self.schedule is None or shape != self.shape:
            self.schedule, self.shape = self._schedule(*shape), shape
        # The first stage takes no tensors, but FSDP2 of torch 2.11 needs an argument on CUDA (pytorch#183943)
        target = torch.arange(len(batches))
        self.schedule.step(target=target, losses=losses, return_outputs=False, per_position=False)
        self._reduce_tied()
        loss = torch.zeros((), device=self.ranks.device)
        if self.ranks.is_loss_rank:
            loss += torch.stack(losses).sum().detach() / self.ranks.data_size
        return loss

    def nll(self, batch: Batch) -> Tensor:
        """Do what `Engine.nll` does, stage by stage without a schedule."""
        batch = batch.to(self.ranks.device)
        size, length = batch.tokens.shape
        for root in self.roots:
            root.batches, hidden = iter([batch]), None
            if not root.model.is_first_stage:
                hidden = torch.empty(self._hidden_shape(size, length), dtype=self.dtype, device=self.ranks.device)
                dist.recv(hidden, group=self.group, group_src=(self.pp_rank - 1) % self.pp_size)
            hidden = root(hidden, per_position=True)
            if not root.model.is_last_stage:
                dist.send(hidden, group=self.group, group_dst=(self.pp_rank + 1) % self.pp_size)
        return hidden if self.roots[-1].model.is_last_stage else torch.zeros_like(batch.weights)

    def _hidden_shape(self, size: int, length: int) -> tuple[int, int, int]:
        return size, length // self.tp_size, self.models[0].config.hidden_size  # [B, S/tp, H]

    def _schedule(self, micro_batches: int, size: int, length: int) -> Schedule1F1B | ScheduleInterleaved1F1B:
        hidden = torch.empty(self._hidden_shape(size, length), dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                root,
                self.pp_rank + index * self.pp_size,
                self.pp_size * len(self.roots),
                self.ranks.device,
                input_args=() if root.model.is_first_stage else (hidden,),
                output_args=(loss if root.model.is_last_stage else hidden,),
                group=self.group,
            )
            for index, root in enumerate(self.roots)
        ]

        def loss_fn(nll: Tensor, _: Tensor) -> Tensor:
            total = nll.sum()
            return total * loss_scale(total, self.scale)

        # the loss is summed here and divided by a global count, so the schedule must not scale gradients
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(list(stages), micro_batches, loss_fn=loss_fn, scale_grads=False)
        return Schedule1F1B(stages[0], micro_batches, loss_fn=loss_fn, scale_grads=False)

    def _reduce_tied(self) -> None:
        """Sum the gradients of tied weights over the first and the last stage."""
        if self.tied_group is not None:
            gradient = next(p.grad for name, p in self.named_parameters() if name == "embed_tokens.weight")
            dist.all_reduce(cast(DTensor, gradient).to_local(), group=self.tied_group)

    def _enters_norm(self, parameter: DTensor) -> bool:
        is_copy = (
            self.tied_group is not None and self.pp_rank > 0 and parameter is self.roots[-1].model.embed_tokens.weight
        )
        return super()._enters_norm(parameter) and not is_copy


def _tied_group(ranks: ParallelContext, model: Transformer) -> dist.ProcessGroup | None:
    """Return the group of the first and the last rank of this pipeline, on these two, if the weights are tied."""
    if model.config.untie_embeddings_and_output_weights:
        return None
    pipelines = ranks.mesh.mesh.flatten(1).T.tolist()  # [pipelines, stages], global ranks
    ends = [[pipeline[0], pipeline[-1]] for pipeline in pipelines]
    group, _ = dist.new_subgroups_by_enumeration(ends, timeout=ranks.timeout)
    return cast(dist.ProcessGroup | None, group)
