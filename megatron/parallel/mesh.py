"""ParallelContext: this rank's position in the layout, and the small reductions that a step needs."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron.parallel.gloo_workaround import gather_under_a_short_name
from megatron.parallel.launch import device, join, rank, world_size
from megatron.torch_private import set_group_timeout

PATIENCE = timedelta(days=1)  # timeout while ranks wait for a disk; the failure detector notices a rank that dies
AXES = ("pp", "replicate", "shard", "tp")  # outermost first: neighbouring ranks share a tensor-parallel group

Result = TypeVar("Result")


@dataclass(frozen=True)
class ParallelContext:
    """This rank in a device mesh with the axes pp, replicate, shard and tp. World size 1 has process groups too.

    pp: pipeline stages. replicate: replicas of the sharded state. shard: shards of it. tp: tensor-parallel shards.
    Replicas and shards together are the data-parallel ranks (data parallel, dp), each of which reads its own samples;
    all pipeline and tensor-parallel ranks of a data-parallel replica read the same samples.
    """

    rank: int
    size: int  # world size
    device: torch.device
    mesh: DeviceMesh  # axes: AXES
    timeout: timedelta = timedelta(minutes=10)  # of a collective
    patient: dist.ProcessGroup | None = None  # gloo group with the timeout PATIENCE; None for world size 1

    def along(self, axis: str) -> tuple[int, int]:
        """Return this rank's index on an axis, and the size of the axis."""
        return self.mesh.get_local_rank(axis), self.mesh.size(AXES.index(axis))

    @cached_property
    def data_rank(self) -> int:
        """The data-parallel rank, in [0, data_size): which samples this rank reads."""
        replica, (shard, num_shards) = self.along("replicate")[0], self.along("shard")
        return replica * num_shards + shard

    @cached_property
    def data_size(self) -> int:
        """The data-parallel size."""
        return self.along("replicate")[1] * self.along("shard")[1]

    @cached_property
    def is_loss_rank(self) -> bool:
        """Whether this rank reports the loss of its data-parallel replica (last pipeline stage, TP rank 0).

        What is counted in samples is summed over the loss ranks, so that every sample counts once.
        """
        stage, num_stages = self.along("pp")
        return stage == num_stages - 1 and self.mesh.get_local_rank("tp") == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all ranks, computed on the CPU so that no device is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_rank_0(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0; return its result, or raise its exception, on every rank.

        The other ranks wait up to PATIENCE, such as for the checksums of a large checkpoint.
        """
        outcome: list[Any] = [None, None]  # result, exception
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:  # the other ranks wait in the broadcast and need it
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, group=self.patient)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def initialize_parallel(
    *, tensor: int = 1, pipeline: int = 1, replicas: int = 1, minutes: float = 10.0
) -> ParallelContext:
    """Initialise torch.distributed, unless that is done, and return this rank's context in the layout.

    `tensor` x `pipeline` must divide the world size, and `replicas` the data-parallel size.
    """
    if not dist.is_initialized():
        join(minutes, detect_failures=False)
    sizes = {"tensor": tensor, "pipeline": pipeline, "replicas": replicas}
    return build_parallel_context(rank(), world_size(), device(), minutes=minutes, **sizes)


def build_parallel_context(
    rank: int,
    size: int,
    device: torch.device,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    replicas: int = 1,
    minutes: float = 10.0,
) -> ParallelContext:
    """Build the device mesh and return this rank's context; all ranks must call this."""
    gather_under_a_short_name()
    shape = (pipeline, replicas, size // (pipeline * replicas * tensor), tensor)
    timeout = timedelta(minutes=minutes)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    for axis in AXES:
        set_group_timeout(timeout, mesh.get_group(axis))
    patient = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)) if size > 1 else None
    return ParallelContext(rank=rank, size=size, device=device, mesh=mesh, timeout=timeout, patient=patient)


def destroy_parallel() -> None:
    """Destroy the process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
