"""Which modules FSDP2 hooks into."""

import pytest
from torch.distributed.fsdp import FSDPModule

from megatron.config.sections import ParallelConfig
from megatron.parallel import apply
from megatron.parallel.apply import is_one_group
from tests.distributed import joined
from tests.steps import Case, build, check_equal, patched, take


@pytest.mark.parametrize("options, groups", [({}, 1), ({"zero_stage": 2}, 1), ({"zero_stage": 3}, 3)], ids=str)
def test_a_single_rank_has_one_group_of_parameters(options, groups):
    """The hooks of a group cost the host more time than a compiled block."""
    with joined() as ranks:
        engine, *_ = build(ranks, Case(), ParallelConfig(**options))
        assert sum(isinstance(module, FSDPModule) for module in engine.roots[0].modules()) == groups


@pytest.mark.parametrize(
    "parameters, world_size, options, one_group",
    [
        (145_000_000, 1, {}, True),
        (417_000_000, 1, {}, False),  # 4 bytes per parameter would be too much
        (145_000_000, 2, {}, False),
        (145_000_000, 1, {"zero_stage": 3}, False),
        (145_000_000, 1, {"cpu_offload": True, "zero_stage": 3}, False),
    ],
)
def test_what_is_one_group(parameters, world_size, options, one_group):
    assert is_one_group(parameters, world_size, ParallelConfig(**options)) == one_group


@pytest.mark.parametrize("case", [Case("mdm", micro_batch=2), Case("ar", micro_batch=2)], ids=lambda case: case.name)
def test_groups_do_not_change_a_step(case):
    with joined() as ranks:
        together = take(ranks, case)
        with patched(apply, "ONE_GROUP_PARAMETERS", 0):
            by_block = take(ranks, case)
    check_equal([by_block], [together])
    assert by_block.norm == together.norm and by_block.loss == together.loss
