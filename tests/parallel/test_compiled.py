"""Compiled blocks give what eager ones give, in the layouts that change what a block is."""

import pytest
import torch
from torch._dynamo.utils import counters

from megatron.config.sections import ParallelConfig
from megatron.objectives.documents import DocumentRules
from megatron.parallel.mesh import Processes, arrange
from tests.distributed import joined, spawn
from tests.steps import Case, batches_of_step, build

CASE = Case("mdm", micro_batch=2)
# what objectives and regularisers change in a block: masks, told places, branches, and graphs of two kinds
KINDS = [
    Case("block-diffusion", {"diffusion_block_size": 4, "stochastic_depth": 0.5}, micro_batch=2),
    Case("dual", micro_batch=2),
    Case(
        "ar",
        {"target_positions": True, "num_order_list": 3, "randmask_ratio": 0.5, "masked_input_weight": 0.4},
        micro_batch=2,
    ),
    Case("ar", documents=DocumentRules(7, True, True, True), micro_batch=2),
]
RECOMPUTED = [{}, {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}]


def loss_and_norm(
    processes: Processes, parallel: ParallelConfig, compile: bool, case: Case = CASE, bf16: bool = False
) -> tuple[float, float]:
    torch._dynamo.reset()  # a run compiles one kind of network
    counters.clear()
    engine, _, data = build(processes, case, parallel, compile=compile, bf16=bf16)
    loss = engine.backward(batches_of_step(data, 0), 100.0)
    assert bool(counters["stats"]["unique_graphs"]) == compile
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
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_split_blocks():
    eager, compiled = spawn(split, 2)[0]
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case is not KINDS[0])) for case in KINDS],
    ids=["-".join([case.name, *case.options]) for case in KINDS],
)
def test_what_objectives_change(case):
    with joined() as processes:
        plain = ParallelConfig()
        eager, compiled = (loss_and_norm(processes, plain, compile, case) for compile in (False, True))
        rounded = loss_and_norm(processes, plain, True, case, bf16=True)
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert rounded == pytest.approx(eager, rel=0.02) and rounded != pytest.approx(eager, rel=1e-5)
