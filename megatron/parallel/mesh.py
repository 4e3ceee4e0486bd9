"""Processes: who runs beside us, and the two small reductions a step needs."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Processes:
    """This process among its peers. Even a single process has a group, so that there is one path."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # one axis: data parallel

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all processes, computed on the CPU so that no device is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, function):
        """Return what `function` gives on the first process; every process returns or raises the same."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:  # the others wait below: they must hear of it, whatever it is
                answer[1] = error
        if self.size > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start_processes() -> Processes:
    """Join the group that torchrun describes, or make a group of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if "RANK" not in os.environ else None
        options = {"store": store, "rank": 0, "world_size": 1} if store else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=10), **options)
    return Processes(rank, size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("dp",)))


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
