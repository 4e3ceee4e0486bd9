"""Tensor parallelism: layers are replaced by tensor-parallel ones, and the model code does not change.

Parameters are DTensors, so that checkpoints, gradient clipping and FSDP2 know their global shapes; activations are
plain tensors, so that attention kernels, dropout and loss need no changes. Norms, dropout and the residual stream act
on a shard of the sequence (sequence parallelism is always on).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from megatron.model.transformer import Transformer
from megatron.parallel.collectives import gather_sequence, scatter_sequence
from megatron.parallel.vocab_parallel import VocabParallelHead

# the column-parallel and the row-parallel layers of a block
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")
HIDDEN_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # of hidden states
HEAD_NORMS = ("q_norm", "k_norm")  # of attention heads


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Replace the layers of `model` by tensor-parallel ones over the one-dimensional `mesh`, in place.

    Every rank holds all weights before; nothing is communicated.
    """
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if name in (*COLUMNS, "lm_head"):
                setattr(owner, name, ColumnParallelLinear(cast(nn.Linear, layer), mesh))
            elif name in ROWS:
                setattr(owner, name, RowParallelLinear(cast(nn.Linear, layer), mesh))
            elif name in (*HIDDEN_NORMS, *HEAD_NORMS) and isinstance(layer, nn.RMSNorm | nn.LayerNorm):
                setattr(owner, name, ParallelNorm(layer, mesh, gather=name in HIDDEN_NORMS))
            elif name == "embed_tokens":
                setattr(owner, name, VocabParallelEmbedding(cast(nn.Embedding, layer), mesh))
    model.head_shard = VocabParallelHead(mesh, model.vocabulary.padded_size)


def _distribute(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """Return a parameter that every rank holds whole as a DTensor, of which each rank keeps its shard."""
    shards = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return cast(DTensor, nn.Parameter(shards))  # an nn.Parameter keeps the class of its tensor


def _distribute_bias(bias: Tensor | None, mesh: DeviceMesh, placement: Placement) -> DTensor | None:
    return None if bias is None else _distribute(bias, mesh, placement)


def _replicated(parameter: DTensor) -> Tensor:
    """Return the local copy of a replicated parameter that acts on a shard of the data: its gradient is partial."""
    return parameter.to_local(grad_placements=[Partial()])


class ColumnParallelLinear(nn.Module):
    """Linear layer sharded over its outputs: the whole sequence [B, S, H] -> this rank's columns [B, S, out/tp]."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__()
        self.weight = _distribute(linear.weight, mesh, Shard(0))
        self.bias = _distribute_bias(linear.bias, mesh, Shard(0))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return this rank's output columns; no communication."""
        return F.linear(hidden, self.weight.to_local(), None if self.bias is None else self.bias.to_local())


class RowParallelLinear(nn.Module):
    """Linear layer sharded over its inputs: this rank's columns [B, S, in/tp] -> its sequence shard [B, S/tp, H]."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__()
        self.group = mesh.get_group()
        self.weight = _distribute(linear.weight, mesh, Shard(1))
        self.bias = _distribute_bias(linear.bias, mesh, Replicate())

    def forward(self, columns: Tensor) -> Tensor:
        """Return this rank's sequence shard of the sum over all ranks; one reduce-scatter."""
        hidden = scatter_sequence(F.linear(columns, self.weight.to_local()), self.group)
        return hidden if self.bias is None else hidden + _replicated(self.bias)


class ParallelNorm(nn.Module):
    """RMSNorm or LayerNorm of a sequence shard, then gathered, [B, S/tp, H] -> [B, S, H]; or of this rank's heads."""

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm, mesh: DeviceMesh, gather: bool):
        super().__init__()
        assert norm.eps is not None
        self.shape, self.eps, self.layernorm = norm.normalized_shape, norm.eps, isinstance(norm, nn.LayerNorm)
        self.group = mesh.get_group() if gather else None
        self.weight = _distribute(norm.weight, mesh, Replicate())
        self.bias = _distribute_bias(getattr(norm, "bias", None), mesh, Replicate())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised hidden states, all-gathered along the sequence unless they are heads."""
        weight = _replicated(self.weight)
        if self.layernorm:
            bias = None if self.bias is None else _replicated(self.bias)
            hidden = F.layer_norm(hidden, self.shape, weight, bias, self.eps)
        else:
            hidden = F.rms_norm(hidden, self.shape, weight, self.eps)
        return hidden if self.group is None else gather_sequence(hidden, self.group)


class VocabParallelEmbedding(nn.Module):
    """Embedding sharded over the vocabulary: token ids [B, S] -> this rank's sequence shard [B, S/tp, H]."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh):
        super().__init__()
        self.group = mesh.get_group()
        self.weight = _distribute(embedding.weight, mesh, Shard(0))
        self.start = VocabParallelHead(mesh, embedding.num_embeddings).start

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the ids of this rank's vocabulary rows, zeros for the others; one reduce-scatter."""
        table = self.weight.to_local()  # [V/tp, H]
        index = tokens - self.start
        is_local = (index >= 0) & (index < len(table))
        embedded = F.embedding(index.where(is_local, 0), table) * is_local[..., None]
        return scatter_sequence(embedded, self.group)
