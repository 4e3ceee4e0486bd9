"""The layout does not change the science: loss, gradient norm and every gradient equal those of a single process."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from megatron.config.sections import ParallelConfig
from megatron.parallel.mesh import Processes, arrange
from tests.distributed import joined, spawn
from tests.steps import Case, Step, check_equal, take

# 3 layers over 2 stages are uneven; 61 ids over 2 parts of 128 rows leave the second part without one
MODEL = dict(num_layers=3, num_attention_heads=4, group_query_attention=True, num_query_groups=2, qk_layernorm=True)
UNTIED = dict(untie_embeddings_and_output_weights=True, normalization="layernorm", swiglu=False)


@dataclass(frozen=True)
class Layout:
    """The places of `data` x tensor x pipeline processes."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    options: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def parallel(self) -> ParallelConfig:
        sizes = {"tensor_model_parallel_size": self.tensor, "pipeline_model_parallel_size": self.pipeline}
        return ParallelConfig(**sizes, **self.options)


OBJECTIVES = {
    "ar": Case("ar", micro_batch=2, model=MODEL),
    "mdm": Case("mdm", micro_batch=2, model=MODEL),
    "ar-token-dropout": Case("ar", token_dropout=0.4, micro_batch=2, model=MODEL),
}
CASES = OBJECTIVES | {
    "mdm-short": Case("mdm", micro_batch=2, samples=5, model=MODEL),
    "mdm-untied": Case("mdm", micro_batch=2, model=MODEL | UNTIED),
    "ar-clipped": Case("ar", micro_batch=2, clip=0.05, model=MODEL),
    "mdm-deep": Case("mdm", micro_batch=2, model=MODEL | {"num_layers": 4}),
    "ar-deep-untied": Case("ar", micro_batch=2, model=MODEL | UNTIED | {"num_layers": 4}),
}
GRID = [Layout(data, tensor, pipeline) for data in (1, 2) for tensor in (1, 2) for pipeline in (1, 2)][1:]
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}
CHECKS = [(layout, name) for layout in GRID for name in OBJECTIVES]
CHECKS += [(layout, name) for layout in GRID for name in ("mdm-short", "mdm-untied", "ar-clipped")]
CHECKS += [(Layout(2, 1, 1, {"zero_stage": stage}), name) for stage in (0, 2, 3) for name in ("ar", "mdm-untied")]
CHECKS += [(Layout(2, tensor, 2, {"zero_stage": stage}), "mdm") for tensor in (1, 2) for stage in (0, 3)]
CHECKS += [
    (Layout(4, 1, 1, {"zero_stage": stage, "num_distributed_optimizer_instances": 2}), "mdm") for stage in (1, 2, 3)
]
CHECKS += [
    (Layout(data, tensor, 2, INTERLEAVED), name)
    for data, tensor in ((1, 1), (2, 1), (1, 2))
    for name in ("mdm-deep", "ar-deep-untied")
]
CHECKS += [
    (Layout(data, tensor, pipeline, {"recompute_granularity": granularity}), "mdm")
    for data, tensor, pipeline in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
    for granularity in ("full", "selective")
]


def all_layouts(processes: Processes, size: int) -> dict:
    """Return the steps of all checks on so many processes."""
    steps = {}
    for index, (layout, name) in enumerate(CHECKS):
        if layout.size == size:
            steps[index] = take(places(processes, layout), CASES[name], layout.parallel)
    return steps


def places(processes: Processes, layout: Layout) -> Processes:
    return arrange(
        processes.rank,
        processes.size,
        torch.device("cpu"),
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        replicas=layout.parallel.replicas(layout.data),
    )


@pytest.fixture(scope="module")
def parallel():
    """The steps of every check by its number, one a process."""
    found = {}
    for size in (2, 4, 8):
        ranks = spawn(all_layouts, size, size)
        found |= {index: [steps[index] for steps in ranks] for index in ranks[0]}
    return found


@pytest.fixture(scope="module")
def single():
    with joined() as processes:
        return {name: take(processes, case) for name, case in CASES.items()}


def merged(ranks: list[Step]) -> Step:
    """Return the step of the whole model: a process of a pipeline has the gradients of its own stages."""
    gradients = {}
    for step in ranks:
        for name, gradient in step.gradients.items():
            np.testing.assert_array_equal(gradients.setdefault(name, gradient), gradient, err_msg=name)
    return replace(ranks[0], loss=sum(step.loss for step in ranks), gradients=gradients)


@pytest.mark.parametrize("index", range(len(CHECKS)), ids=lambda index: f"{CHECKS[index][1]}-{CHECKS[index][0]}")
def test_a_step_equals_that_of_one_process(parallel, single, index):
    ranks, name = parallel[index], CHECKS[index][1]
    check_equal([single[name]], [merged(ranks)])
    assert len({step.norm for step in ranks}) == 1
