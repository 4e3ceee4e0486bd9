"""Pipeline parallelism: which layers a stage keeps, and torch's schedules over the stages of this process."""

import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megatron.batch import Batch
from megatron.config.sizes import layers_of
from megatron.model.transformer import Transformer
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext


def keep_stage(model: Transformer, stage: int, stages: int) -> Transformer:
    """Return a copy of `model` with the layers of one stage, under the names they have in the whole model.

    The first stage has the embedding, the last one the head: where the two are tied, both have a copy of the matrix.
    """
    kept = copy.deepcopy(model)
    kept.is_first_stage, kept.is_last_stage = stage == 0, stage == stages - 1
    for name in list(kept.layers.keys() - map(str, layers_of(stage, stages, len(model.layers)))):
        del kept.layers[name]
    tied = not kept.config.untie_embeddings_and_output_weights
    if not (kept.is_first_stage or (kept.is_last_stage and tied)):
        del kept.embed_tokens
    if not kept.is_last_stage:
        del kept.norm
        if not tied:
            del kept.lm_head
    return kept


class Stage(nn.Module):
    """A stage as the schedule calls it: once for each micro-batch, in their order.

    A schedule passes tensors only, and a number as a tensor would go to the device and back.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.batches: Iterator[Batch] = iter(())

    def forward(self, hidden: Tensor | None = None, *, per_position: bool = False) -> Tensor:
        return self.model(next(self.batches), hidden, per_position)


class Pipeline(Engine):
    """The stages of one model that this process runs: one in 1F1B, several in interleaved 1F1B.

    Stage i runs on the process at place i mod pp of its pipeline.
    """

    def __init__(self, roots: list[Stage], models: list[Transformer], ranks: ParallelContext, zero_stage: int, dtype):
        super().__init__(roots, models, ranks, zero_stage)
        self.place, self.length = ranks.along("pp")
        self.group = ranks.mesh.get_group("pp")
        self.tensor_size = ranks.along("tp")[1]
        self.dtype = dtype  # of hidden states
        self.schedule, self.shape = None, None
        self.scale = 1.0
        self.tied = _tied_ends(ranks, models[0])

    def backward(self, batches: list[Batch], count: float) -> Tensor:
        losses = []
        self.scale = self.ranks.data_size / count
        batches = [batch.to(self.ranks.device) for batch in batches]
        for root in self.roots:
            root.batches = iter(batches)
        # the schedule keeps the shapes of its first step
        shape = (len(batches), *batches[0].tokens.shape)
        if shape != self.shape:
            self.schedule, self.shape = self._schedule(*shape), shape
        self.schedule.step(target=torch.arange(len(batches)), losses=losses, return_outputs=False)
        self._reduce_tied()
        loss = torch.zeros((), device=self.ranks.device)
        if self.ranks.is_loss_rank:
            loss += torch.stack(losses).sum().detach() / self.ranks.data_size
        return loss

    def nll(self, batch: Batch) -> Tensor:
        batch = batch.to(self.ranks.device)
        size, length = batch.tokens.shape
        for index, root in enumerate(self.roots):
            root.batches, hidden = iter([batch]), None
            if not root.model.is_first_stage:
                hidden = torch.empty(self._hidden_shape(size, length), dtype=self.dtype, device=self.ranks.device)
                dist.recv(hidden, group=self.group, group_src=(self.place - 1) % self.length)
            hidden = root(hidden, per_position=True)
            if not root.model.is_last_stage:
                dist.send(hidden, group=self.group, group_dst=(self.place + 1) % self.length)
        return hidden if self.roots[-1].model.is_last_stage else torch.zeros_like(batch.weights)

    def _hidden_shape(self, size: int, length: int) -> tuple[int, int, int]:
        return size, length // self.tensor_size, self.models[0].config.hidden_size

    def _schedule(self, micro_batches: int, size: int, length: int):
        hidden = torch.empty(self._hidden_shape(size, length), dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                root,
                self.place + index * self.length,
                self.length * len(self.roots),
                self.ranks.device,
                input_args=() if root.model.is_first_stage else (hidden,),
                output_args=(loss if root.model.is_last_stage else hidden,),
                group=self.group,
            )
            for index, root in enumerate(self.roots)
        ]
        schedule, stages = (ScheduleInterleaved1F1B, stages) if len(stages) > 1 else (Schedule1F1B, stages[0])
        # the loss is summed here and divided by a global count: nothing is left to scale
        return schedule(stages, micro_batches, loss_fn=lambda nll, _: nll.sum() * self.scale, scale_grads=False)

    def _reduce_tied(self) -> None:
        """Give both ends of the pipeline the gradient of the matrix they share."""
        if self.tied is not None:
            gradient = next(p.grad for name, p in self.named_parameters() if name == "embed_tokens.weight")
            dist.all_reduce(gradient.to_local(), group=self.tied)

    def _counts(self, parameter) -> bool:
        copied = self.tied is not None and self.place > 0 and parameter is self.roots[-1].model.embed_tokens.weight
        return super()._counts(parameter) and not copied


def _tied_ends(ranks: ParallelContext, model: Transformer) -> dist.ProcessGroup | None:
    """Return the group of the first and the last process of this pipeline, on these two, where the head is tied."""
    if model.config.untie_embeddings_and_output_weights:
        return None
    pipelines = ranks.mesh.mesh.flatten(1).T.tolist()  # [one pipeline][stage] -> rank
    ends = [[ranks[0], ranks[-1]] for ranks in pipelines]
    return dist.new_subgroups_by_enumeration(ends, timeout=ranks.timeout)[0]
