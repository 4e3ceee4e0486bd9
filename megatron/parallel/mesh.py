"""ParallelContext: who runs beside us, where each stands, and the small reductions a step needs."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron.parallel.gloo_workaround import gather_under_a_short_name
from megatron.parallel.launch import device, join, rank, world_size

PATIENCE = timedelta(days=1)  # of processes that wait for a disk; a peer that dies meanwhile, the watch notices
AXES = ("pp", "replicate", "shard", "tp")  # from the outermost: neighbours in rank share a tensor-parallel group


@dataclass(frozen=True)
class ParallelContext:
    """This process among its peers. Even a single process has a group, so that there is one path.

    The mesh has four axes: pipeline stages, replicas of the sharded state, shards of it, and tensor-parallel parts.
    Replicas and shards together are the data-parallel processes, each of which reads its own samples; all stages
    and parts beside them read the same.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # axes: AXES
    timeout: timedelta = timedelta(minutes=10)  # of a collective
    patient: dist.ProcessGroup | None = None  # for waiting on files, which takes what it takes; None for one process

    def along(self, axis: str) -> tuple[int, int]:
        """Return this process's place on an axis, and the length of the axis."""
        return self.mesh.get_local_rank(axis), self.mesh[axis].size()

    @property
    def data_rank(self) -> int:
        """Which share of the data this process reads, in [0, data_size)."""
        replica, shard = self.mesh.get_local_rank("replicate"), self.mesh.get_local_rank("shard")
        return replica * self.mesh["shard"].size() + shard

    @property
    def data_size(self) -> int:
        """The number of data-parallel processes."""
        return self.mesh["replicate"].size() * self.mesh["shard"].size()

    @property
    def is_loss_rank(self) -> bool:
        """Whether this process answers for its share of the data: one of those that read the same does.

        It is on the last pipeline stage, where losses are, and the first of its tensor-parallel group. What is
        counted in samples is summed over the processes that speak.
        """
        stage, stages = self.along("pp")
        return stage == stages - 1 and self.mesh.get_local_rank("tp") == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all processes, computed on the CPU so that no device is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_rank_0(self, function):
        """Return what `function` gives on the first process; every process returns or raises the same.

        The others wait as long as it takes, such as for the checksums of a large checkpoint.
        """
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:  # the others wait below: they must hear of it, whatever it is
                answer[1] = error
        if self.size > 1:
            dist.broadcast_object_list(answer, group=self.patient)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def initialize_parallel(
    *, tensor: int = 1, pipeline: int = 1, replicas: int = 1, minutes: float = 10.0
) -> ParallelContext:
    """Join the group, unless that is done, and give this process its place in the layout.

    `tensor` x `pipeline` divides the number of processes, and `replicas` the rest.
    """
    if not dist.is_initialized():
        join(minutes, watched=False)
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
    """Give the processes of the group their places; all of them call this."""
    gather_under_a_short_name()
    shape, timeout = (pipeline, replicas, size // (pipeline * replicas * tensor), tensor), timedelta(minutes=minutes)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    for axis in AXES:
        _set_pg_timeout(timeout, mesh.get_group(axis))
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    return ParallelContext(rank, size, device, mesh, timeout, patient)


def destroy_parallel() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
