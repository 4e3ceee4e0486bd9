"""What the host does in a step, in counts, which the load of the machine does not change; to be lowered, not raised.

On a GPU the kernels of a small model end before the host has launched the next ones, so every operator, hook and walk
over modules in a step costs tokens per second.
"""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel.mesh import ParallelContext
from megatron.training.step import train_step
from tests.distributed import joined, spawn
from tests.steps import DATA_PARALLEL, Case, batches_of_step, build

STEADY = 2  # steps before the one that is counted; they set up state
CASE = Case("ar", micro_batch=2)
RATES = {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
WALKS = [getattr(nn.Module, name) for name in ("modules", "named_modules", "parameters", "named_parameters", "buffers")]
WALKS += [getattr(nn.Module, name) for name in ("children", "named_children", "named_buffers", "apply", "state_dict")]
HOOKS = ("_pre_forward", "_post_forward", "_pre_backward", "pre_backward", "post_backward")
# of a step, by number of ranks: one rank has 4 micro-batches, each of two ranks has 2; hooks run for the last one
MOST = {
    1: {"operators": 2694, "calls of FSDP2's hooks": 5},
    2: {"operators": 1405, "calls of FSDP2's hooks": 5},
}
NONE = ("operators on DTensors", "walks over modules", "slices of the mesh")


class Operators(TorchDispatchMode):
    """Counts operators, and those on DTensors."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = "operators on DTensors" if any(issubclass(type, DTensor) for type in types) else "operators"
        self.counts[kind] += 1
        return function(*args, **(kwargs or {}))


class Calls:
    """Counts calls of hooks, of walks over modules and of slices of the mesh, as `sys.setprofile` reports them."""

    def __init__(self, counts: Counter):
        self.counts = counts
        self.kinds = {function.__code__: "walks over modules" for function in WALKS}
        self.kinds[DeviceMesh.__getitem__.__code__] = "slices of the mesh"

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event != "call":
            return
        if code.co_name in HOOKS and "_fully_shard" in code.co_filename:
            self.counts["calls of FSDP2's hooks"] += 1
        elif code in self.kinds:
            self.counts[self.kinds[code]] += 1


def counts_of_step(ranks: ParallelContext, fault: str = "") -> Counter:
    """Return the counts of a steady step, during which the engine's `clip` does what `fault` says."""
    engine, optimizer, data = build(ranks, CASE, DATA_PARALLEL, STEADY + 2, bf16=True)
    clip, counts = engine.clip, Counter()
    for step in range(STEADY):
        train_step(engine, optimizer, batches_of_step(data, step), **RATES)

    def faulty_clip(limit: float) -> torch.Tensor:
        exec(fault, {"engine": engine, "torch": torch})
        return clip(limit)

    engine.clip = faulty_clip
    batches = batches_of_step(data, STEADY)
    with Operators(counts):
        train_step(engine, optimizer, batches, **RATES)
    batches = batches_of_step(data, STEADY + 1)
    sys.setprofile(Calls(counts))
    try:
        train_step(engine, optimizer, batches, **RATES)
    finally:
        sys.setprofile(None)
    return counts


def check(counts: Counter, num_ranks: int) -> None:
    for what, most in MOST[num_ranks].items():
        assert 0 < counts[what] <= most, what
    assert not {what: counts[what] for what in NONE if counts[what]}


FAULTS = {
    "operators": "torch.ones(())",
    "operators on DTensors": "next(engine.parameters()).detach()",
    "walks over modules": "list(engine.models[0].modules())",
    "slices of the mesh": "engine.ranks.mesh['shard']",
}


def test_a_rank_by_itself():
    with joined() as ranks:
        check(counts_of_step(ranks), 1)


def test_each_of_two_ranks():
    for counts in spawn(counts_of_step, 2):
        check(counts, 2)


@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_counted(what):
    with joined() as ranks:
        plain, faulty = (counts_of_step(ranks, fault) for fault in ("", FAULTS[what]))
    assert faulty[what] > plain[what]
