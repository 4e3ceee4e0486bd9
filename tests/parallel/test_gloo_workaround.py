"""All-gathers over gloo: correct, and without the operation whose long name two threads of a group free twice."""

import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from megatron.parallel.mesh import ParallelContext
from tests.distributed import spawn

GATHER = torch.ops._c10d_functional


def gathered(ranks: ParallelContext) -> tuple[list, list, float, set[str]]:
    """Return a matrix of 5 rows gathered by DTensor, a gathered tensor and scalar, and the names of the operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    mesh = ranks.mesh["shard"]
    matrix = torch.arange(15.0).view(5, 3)
    shard = torch.full((3, 2), float(ranks.rank))
    with torch.profiler.profile(activities=activities) as profile:
        uneven = distribute_tensor(matrix, mesh, [Shard(0)]).full_tensor()
        group = mesh.get_group().group_name
        plain, scalar = (
            GATHER.wait_tensor(GATHER.all_gather_into_tensor(value, 2, group)) for value in (shard, shard[0, 0])
        )
    return uneven.tolist(), plain.tolist(), scalar.tolist(), {event.name for event in profile.events()}


def test_gathers_are_right_and_have_a_short_name():
    for uneven, plain, scalar, operators in spawn(gathered, 2):
        assert uneven == torch.arange(15.0).view(5, 3).tolist()
        assert plain == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3 and scalar == [0.0, 1.0]
        assert "c10d::_allgather_base_" in operators
        assert not any("coalesced" in operator for operator in operators)


# Without the workaround one process in two aborts within seconds (torch 2.13, two cores).
BURSTS = """
import torch, torch.distributed as dist
from tests.distributed import joined
gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
with joined():
    for _ in range(3000):
        for work in [gather(torch.ones(8), 1, "0") for _ in range(100)]:
            wait(work)
import os; os._exit(0)
"""


@pytest.mark.slow
def test_many_gathers_at_once_do_not_abort():
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "123"}
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", BURSTS], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-500:]
