"""Tensor parallelism: four kinds of layer are replaced, and the model stays as it is.

Parameters are DTensors at rest, so that checkpoints, clipping and FSDP2 know their whole shapes; what flows between
layers are plain tensors, so that attention kernels, dropout and loss need not know. Normalisation, dropout and the
residual stream act on a part of the sequence (sequence parallelism is always on).
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

from megatron.config.sizes import COLUMNS, ROWS
from megatron.model.transformer import Transformer
from megatron.parallel.collectives import gather_sequence, scatter_sequence
from megatron.parallel.vocab_parallel import HeadPart

NORMS_OF_THE_STREAM = ("input_layernorm", "post_attention_layernorm", "norm")
NORMS_OF_HEADS = ("q_norm", "k_norm")


def split_layers(model: Transformer, mesh: DeviceMesh) -> None:
    """Split the layers of `model` over the one-dimensional `mesh`, in place; no process needs another's weights."""
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if name in (*COLUMNS, "lm_head"):
                setattr(owner, name, ColumnParallelLinear(layer, mesh))
            elif name in ROWS:
                setattr(owner, name, RowParallelLinear(layer, mesh))
            elif name in (*NORMS_OF_THE_STREAM, *NORMS_OF_HEADS) and not isinstance(layer, nn.Identity):
                setattr(owner, name, ParallelNorm(layer, mesh, gather=name in NORMS_OF_THE_STREAM))
            elif name == "embed_tokens":
                setattr(owner, name, VocabParallelEmbedding(layer, mesh))
    model.head_shard = HeadPart(mesh, model.vocabulary.padded_size)


def _split(parameter: nn.Parameter | None, mesh: DeviceMesh, placement: Placement) -> nn.Parameter | None:
    """Return a parameter that every process holds whole as a DTensor of which it keeps its part."""
    if parameter is None:
        return None
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None))


def _shared(parameter: nn.Parameter | None) -> Tensor | None:
    """Return the local copy of a replicated parameter that acts on a part of the data: gradients are parts of a sum."""
    return None if parameter is None else parameter.to_local(grad_placements=[Partial()])


class ColumnParallelLinear(nn.Module):
    """This process's columns of the output, from the whole sequence: [B, S, H] -> [B, S, out/tp]."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__()
        self.weight, self.bias = _split(linear.weight, mesh, Shard(0)), _split(linear.bias, mesh, Shard(0))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.to_local(), None if self.bias is None else self.bias.to_local())


class RowParallelLinear(nn.Module):
    """This process's part of the sequence, from its columns of the input: [B, S, in/tp] -> [B, S/tp, H]."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__()
        self.group = mesh.get_group()
        self.weight, self.bias = _split(linear.weight, mesh, Shard(1)), _split(linear.bias, mesh, Replicate())

    def forward(self, columns: Tensor) -> Tensor:
        hidden = scatter_sequence(F.linear(columns, self.weight.to_local()), self.group)
        return hidden if self.bias is None else hidden + _shared(self.bias)


class ParallelNorm(nn.Module):
    """RMSNorm or LayerNorm of a part of the sequence, then gathered, [B, S/tp, H] -> [B, S, H]; or of some heads."""

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm, mesh: DeviceMesh, gather: bool):
        super().__init__()
        self.shape, self.eps, self.layernorm = norm.normalized_shape, norm.eps, isinstance(norm, nn.LayerNorm)
        self.group = mesh.get_group() if gather else None
        self.weight = _split(norm.weight, mesh, Replicate())
        self.bias = _split(getattr(norm, "bias", None), mesh, Replicate())

    def forward(self, hidden: Tensor) -> Tensor:
        weight = _shared(self.weight)
        if self.layernorm:
            hidden = F.layer_norm(hidden, self.shape, weight, _shared(self.bias), self.eps)
        else:
            hidden = F.rms_norm(hidden, self.shape, weight, self.eps)
        return hidden if self.group is None else gather_sequence(hidden, self.group)


class VocabParallelEmbedding(nn.Module):
    """Each process looks up the ids whose rows it holds: [B, S] -> this process's part of the sequence [B, S/tp, H]."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh):
        super().__init__()
        self.group = mesh.get_group()
        self.weight = _split(embedding.weight, mesh, Shard(0))
        self.start = HeadPart(mesh, embedding.num_embeddings).start

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.to_local()
        index = tokens - self.start
        here = (index >= 0) & (index < len(rows))
        found = F.embedding(index.where(here, 0), rows) * here[..., None]
        return scatter_sequence(found, self.group)
