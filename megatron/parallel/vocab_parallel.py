"""The output head sharded over the vocabulary, and the reductions that its loss needs."""

from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron.model.head_shard import WholeHead


class VocabParallelHead(WholeHead):
    """This rank's shard of `size` vocabulary rows: size / tp rounded up; the last rank may have fewer."""

    whole = False

    def __init__(self, mesh: DeviceMesh, size: int):
        self.group = mesh.get_group()
        self.start = min(size, -(-size // mesh.size()) * mesh.get_local_rank())

    def local(self, weight: Tensor) -> Tensor:
        """Return this rank's vocabulary rows of the DTensor `weight`, [V/tp, H]."""
        return cast(DTensor, weight).to_local()

    def highest(self, values: Tensor) -> Tensor:
        """Return the maxima over all ranks; `values` is overwritten."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the sums over all ranks; `values` is overwritten."""
        dist.all_reduce(values, group=self.group)
        return values
