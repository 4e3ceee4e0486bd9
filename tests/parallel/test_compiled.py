"""Compiled blocks give what eager ones give, in the layouts that change what a block is."""

import pytest

from megatron.config.sections import ParallelConfig
from megatron.parallel.mesh import Processes, arrange
from tests.distributed import joined, spawn
from tests.steps import Case, batches_of_step, build

CASE = Case("mdm", micro_batch=2)
RECOMPUTED = [{}, {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}]


def loss_and_norm(processes: Processes, parallel: ParallelConfig, compile: bool) -> tuple[float, float]:
    engine, _, data = build(processes, CASE, parallel, compile=compile)
    loss = engine.backward(batches_of_step(data, 0), 100.0)
    return processes.sum(float(loss))[0], float(engine.clip(0.0))


def split(processes: Processes) -> list[tuple[float, float]]:
    processes = arrange(processes.rank, processes.size, processes.device, tensor=2)
    return [
        loss_and_norm(processes, ParallelConfig(tensor_model_parallel_size=2), compile) for compile in (False, True)
    ]


@pytest.mark.parametrize("options", RECOMPUTED, ids=str)
def test_recomputed_blocks(options):
    with joined() as processes:
        eager, compiled = (loss_and_norm(processes, ParallelConfig(**options), compile) for compile in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-5) and compiled != eager


def test_split_blocks():
    eager, compiled = spawn(split, 2)[0]
    assert compiled == pytest.approx(eager, rel=1e-5) and compiled != eager
