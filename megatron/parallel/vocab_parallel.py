"""The output head split over its rows, the vocabulary: what its loss needs to know of the other parts."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron.model.linear_cross_entropy import WholeHead


class HeadPart(WholeHead):
    """This process's part of `rows` rows: an even share rounded up; the last process may hold fewer."""

    whole = False

    def __init__(self, mesh: DeviceMesh, rows: int):
        self.group = mesh.get_group()
        self.start = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())

    def local(self, weight: Tensor) -> Tensor:
        return weight.to_local()

    def highest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values
