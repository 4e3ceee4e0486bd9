"""Tensor parallelism: layers are replaced by tensor-parallel ones, and the model code does not change.

Parameters are DTensors, so that checkpoints, gradient clipping and FSDP2 know their global shapes; activations are
plain tensors, so that attention kernels, dropout and loss need no changes. Norms, dropout and the residual stream act
on a shard of the sequence (sequence parallelism is always on).
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from megatron.model.transformer import Transformer
from megatron.parallel.collectives import gather_sequence, scatter_sequence
from megatron.parallel.vocab_parallel import VocabParallelHead


def _replicated(parameter: DTensor) -> Tensor:
    """Return the local copy of a replicated parameter that acts on a shard of the data: its gradient is partial."""
    return parameter.to_local(grad_placements=[Partial()])


class ParallelLayer(nn.Module):
    """A layer whose weight and bias, if it has one, are DTensors over the ranks of a tensor-parallel group."""

    placements: ClassVar[dict[str, Placement]]  # of "weight" and "bias"
    weight: DTensor
    bias: DTensor | None

    def __init__(self, layer: nn.Module, mesh: DeviceMesh):
        super().__init__()
        for name, placement in self.placements.items():
            parameter = getattr(layer, name, None)
            if parameter is not None:  # every rank holds it whole and keeps its shard
                shards = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
                parameter = nn.Parameter(shards)  # keeps the class of its tensor
            self.register_parameter(name, parameter)


class ColumnParallelLinear(ParallelLayer):
    """Linear layer sharded over its outputs: the whole sequence [B, S, H] -> this rank's columns [B, S, out/tp]."""

    placements: ClassVar = {"weight": Shard(0), "bias": Shard(0)}

    def forward(self, hidden: Tensor) -> Tensor:
        """Return this rank's output columns; no communication."""
        return F.linear(hidden, self.weight.to_local(), None if self.bias is None else self.bias.to_local())


class RowParallelLinear(ParallelLayer):
    """Linear layer sharded over its inputs: this rank's columns [B, S, in/tp] -> its sequence shard [B, S/tp, H]."""

    placements: ClassVar = {"weight": Shard(1), "bias": Replicate()}

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__(linear, mesh)
        self.group = mesh.get_group()

    def forward(self, columns: Tensor) -> Tensor:
        """Return this rank's sequence shard of the sum over all ranks; one reduce-scatter."""
        hidden = scatter_sequence(F.linear(columns, self.weight.to_local()), self.group)
        return hidden if self.bias is None else hidden + _replicated(self.bias)


class ParallelNorm(ParallelLayer):
    """RMSNorm or LayerNorm of this rank's attention heads, [B, S, heads/tp, D] -> the same."""

    placements: ClassVar = {"weight": Replicate(), "bias": Replicate()}

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm, mesh: DeviceMesh):
        super().__init__(norm, mesh)
        assert norm.eps is not None
        self.shape, self.eps, self.layernorm = norm.normalized_shape, norm.eps, isinstance(norm, nn.LayerNorm)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised values; no communication."""
        weight = _replicated(self.weight)
        if not self.layernorm:
            return F.rms_norm(hidden, self.shape, weight, self.eps)
        bias = None if self.bias is None else _replicated(self.bias)
        return F.layer_norm(hidden, self.shape, weight, bias, self.eps)


class VocabParallelEmbedding(ParallelLayer):
    """Embedding sharded over the vocabulary: token ids [B, S] -> this rank's sequence shard [B, S/tp, H]."""

    placements: ClassVar = {"weight": Shard(0)}

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh):
        super().__init__(embedding, mesh)
        self.group = mesh.get_group()
        self.start = VocabParallelHead(mesh, embedding.num_embeddings).start

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the ids of this rank's vocabulary rows, zeros for the others; one reduce-scatter."""
        table = self.weight.to_local()  # [V/tp, H]
        index = tokens - self.start
        is_local = (index >= 0) & (index < len(table))
        embedded = F.embedding(index.where(is_local, 0), table) * is_local[..., None]
        return scatter_sequence(embedded, self.group)


class SequenceParallelNorm(ParallelNorm):
    """RMSNorm or LayerNorm of a sequence shard of hidden states, then gathered, [B, S/tp, H] -> [B, S, H]."""

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm, mesh: DeviceMesh):
        super().__init__(norm, mesh)
        self.group = mesh.get_group()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised hidden states of the whole sequence; one all-gather."""
        return gather_sequence(super().forward(hidden), self.group)


REPLACEMENTS: dict[str, type[ParallelLayer]] = {  # by the name of the layer in its module
    "embed_tokens": VocabParallelEmbedding,
    "input_layernorm": SequenceParallelNorm,
    "q_proj": ColumnParallelLinear,
    "k_proj": ColumnParallelLinear,
    "v_proj": ColumnParallelLinear,
    "q_norm": ParallelNorm,
    "k_norm": ParallelNorm,
    "o_proj": RowParallelLinear,
    "post_attention_layernorm": SequenceParallelNorm,
    "gate_proj": ColumnParallelLinear,
    "up_proj": ColumnParallelLinear,
    "down_proj": RowParallelLinear,
    "norm": SequenceParallelNorm,
    "lm_head": ColumnParallelLinear,
}


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Replace the layers of `model` by tensor-parallel ones over the one-dimensional `mesh`, in place.

    Every rank holds all weights before; nothing is communicated.
    """
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if name in REPLACEMENTS and not isinstance(layer, nn.Identity):
                setattr(owner, name, REPLACEMENTS[name](layer, mesh))
    model.head_shard = VocabParallelHead(mesh, model.vocabulary.padded_size)
