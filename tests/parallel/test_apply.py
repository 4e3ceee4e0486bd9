"""Which modules FSDP2 hooks into."""

import pytest
import torch

from megatron.config.sections import ParallelConfig
from megatron.parallel import apply
from megatron.parallel.apply import is_one_group
from megatron.parallel.mesh import ParallelContext
from tests.distributed import joined, spawn
from tests.steps import DATA_PARALLEL, Case, batches_of_step, build, check_equal, patched, take

CASES = [Case("mdm", micro_batch=2), Case("ar", micro_batch=2)]
NONE = {"one rank": 0, "several ranks": 0}  # no model is one group


@pytest.mark.parametrize("options, groups", [({}, 1), ({"zero_stage": 2}, 1), ({"zero_stage": 3}, 3)], ids=str)
def test_a_single_rank_has_one_group_of_parameters(options, groups):
    """The hooks of a group cost the host more time than a compiled block."""
    with joined() as ranks:
        assert groups_of(ranks, options) == groups


def groups_of(ranks: ParallelContext, options: dict) -> int:
    engine, *_ = build(ranks, Case(), ParallelConfig(**options))
    return len(engine.sharded_modules)


def check_two_ranks(ranks: ParallelContext) -> None:
    assert groups_of(ranks, {}) == groups_of(ranks, {"zero_stage": 0}) == 1
    assert groups_of(ranks, {"zero_stage": 2}) == 3  # reduces at every micro-batch
    for case in CASES:
        check_groups(ranks, case)


def test_two_ranks():
    spawn(check_two_ranks, 2)


@pytest.mark.parametrize(
    "parameters, world_size, options, one_group",
    [
        (145_000_000, 1, {}, True),
        (417_000_000, 1, {}, False),  # 4 bytes per parameter would be too much
        (145_000_000, 2, {}, False),  # the reduction would overlap with nothing
        (20_000_000, 2, {}, True),
        (20_000_000, 2, {"zero_stage": 2}, False),
        (20_000_000, 2, {"tensor_model_parallel_size": 2}, False),
        (20_000_000, 2, {"pipeline_model_parallel_size": 2}, False),
        (145_000_000, 1, {"zero_stage": 3}, False),
        (145_000_000, 1, {"cpu_offload": True, "zero_stage": 3}, False),
    ],
)
def test_what_is_one_group(parameters, world_size, options, one_group):
    assert is_one_group(parameters, world_size, ParallelConfig(**options)) == one_group


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_do_not_change_a_step(case):
    with joined() as ranks:
        check_groups(ranks, case)


def check_groups(ranks: ParallelContext, case: Case) -> None:
    together = take(ranks, case)
    with patched(apply, "ONE_GROUP_PARAMETERS", NONE):
        by_block = take(ranks, case)
    check_equal([by_block], [together])
    assert by_block.norm == together.norm and by_block.loss == together.loss


def both_gradients(ranks: ParallelContext) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the reduced gradients of a step of several micro-batches in bf16, by name: of one group and of several."""
    together = gradients(ranks)
    with patched(apply, "ONE_GROUP_PARAMETERS", NONE):
        return together, gradients(ranks)


def gradients(ranks: ParallelContext) -> dict[str, torch.Tensor]:
    engine, _, data = build(ranks, CASES[1], DATA_PARALLEL, 1, bf16=True)
    engine.backward(batches_of_step(data, 0), 1.0)
    return {name: parameter.grad.full_tensor() for name, parameter in engine.named_parameters()}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_of_micro_batches_are_added_up_as_fsdp2_does(num_ranks):
    """To the bit, but for the tied table with torch 2.15, where FSDP2 rounds the sum of its two gradients to bf16."""
    for together, by_block in spawn(both_gradients, num_ranks):
        assert together.keys() == by_block.keys()
        for name, gradient in together.items():
            is_rounded = name == "embed_tokens.weight" and torch.__version__ >= "2.15"
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, by_block[name], rtol=0, atol=0.05 * is_rounded, msg=name)
