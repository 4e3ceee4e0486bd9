"""The memory formula against measured peaks of real steps, and its constants against the code that they describe."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory.cases import (
    CPU_CASES,
    CUDA_CASES,
    FULL,
    GELU,
    INTERLEAVED,
    LOOPS,
    PIPELINE,
    RICH,
    SHORT,
    SMALL,
    TENSOR,
    Case,
)
from benchmarks.memory.run import measure, table
from benchmarks.memory.run import on_cpu as measure_on_cpu
from megatron.config.sections import ModelConfig
from megatron.config.sizes import block_shapes, parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.model import linear_cross_entropy
from megatron.model.block import Block
from megatron.model.transformer import Transformer
from megatron.objectives.registry import capabilities
from megatron.parallel import rank_sizes
from megatron.parallel.memory_estimate import peak_memory
from megatron.parallel.rank_sizes import RankSizes
from tests.distributed import joined
from tests.steps import patched

CPU = torch.device("cpu")
TOLERANCE = 0.04  # of the total
CASES = [
    Case(SMALL, 1, 2),
    Case(f"{SMALL} {FULL}"),
    Case(f"{SHORT} --optimizer muon"),
    Case(f"{SHORT.replace('--bf16', '--fp32')}"),
    Case(f"{SHORT} --zero-stage 2", 1, 2),
    *(Case(f"{SHORT} --zero-stage {stage}", 2) for stage in (0, 1, 3)),
    Case(f"{SMALL} --zero-stage 2", 2, 2),
    Case(f"{SMALL} {TENSOR}", 2),
    Case(f"{SMALL} {PIPELINE}", 2, 4),
    Case(f"{SMALL} {INTERLEAVED}", 2, 4),
    Case(f"{RICH} {TENSOR}", 2, 1, 20000),
    Case(f"{SHORT} --num-distributed-optimizer-instances 2", 4, 2),
    Case(f"{SMALL} {TENSOR} {PIPELINE} {FULL}", 4, 4),
    Case(SHORT, 1, 1, 20000, num_teachers=2),
    Case(f"{SMALL} {TENSOR}", 2, 1, 20000, num_teachers=2),
    Case(f"{SHORT} --zero-stage 3", 2, num_teachers=2),
    Case(f"{SMALL} {LOOPS} {FULL}"),
    *(Case(f"{SHORT} {LOOPS} --zero-stage {stage}", 2) for stage in (1, 3)),
    *(Case(f"{SHORT} --meta-gradient-norm 0.5", processes, 2) for processes in (1, 2)),
]
MODELS = [
    {},
    {"swiglu": False, "normalization": "layernorm", "untie_embeddings_and_output_weights": True},
    {"group_query_attention": True, "num_query_groups": 2, "qk_layernorm": True, "add_bias_linear": True},
    {"qk_layernorm": True, "normalization": "layernorm", "kv_channels": 6},
]


@pytest.fixture(scope="module")
def alone():
    """The peak of one step of the cases with one rank; later steps have the same peak."""
    with joined():
        return {case: measure(case, 0, CPU, steps=1) for case in CASES if case.processes == 1}


@pytest.fixture(scope="module")
def measured(alone):
    """The peaks of all cases; those with several ranks take minutes on two cores."""
    several = [case for case in CASES if case.processes > 1]
    return alone | dict(zip(several, measure_on_cpu(several, steps=1), strict=True))


def names(case: Case) -> str:
    teachers = f"-{case.num_teachers}-teachers" if case.num_teachers else ""
    return f"{case.processes}x{case.micro_batches}{teachers}{case.flags.partition('--bf16')[2].replace(' ', '')}"


@pytest.mark.parametrize("case", [case for case in CASES if case.processes == 1], ids=names)
def test_the_formula_gives_the_measured_peak_of_a_process(alone, case):
    check(case, alone[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.processes > 1], ids=names)
def test_the_formula_gives_the_measured_peak_of_each_of_several(measured, case):
    check(case, measured[case])


def check(case: Case, peak: dict) -> None:
    computed = case.formula("cpu")
    assert computed.total == pytest.approx(peak["total"], rel=TOLERANCE)
    assert computed.master_weights == pytest.approx(peak["master weights"], rel=0.01)
    assert computed.optimizer_states == pytest.approx(peak["optimizer states"], rel=0.01)
    states = peak["master weights"] + peak["optimizer states"]
    without_states = computed.total - computed.master_weights - computed.optimizer_states
    assert without_states == pytest.approx(peak["total"] - states, rel=2 * TOLERANCE)


FAULTS = [
    ("head", lambda self: 0, CASES[12]),
    ("backward_workspace", 0, CASES[14]),
    ("compute_weights", lambda self, *_: 0, CASES[8]),
    ("pipeline_buffers", 0, CASES[11]),
    ("in_flight", 1, CASES[10]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, value, case", FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_planted_omission_is_detected(measured, name, value, case):
    with patched(RankSizes, name, value), pytest.raises(AssertionError):
        check(case, measured[case])


def test_the_table_of_the_benchmark_has_a_line_a_case(alone):
    rows = [(case, case.formula("cpu"), peak) for case, peak in alone.items()]
    header, _, *lines = table(rows).splitlines()
    assert header.startswith("| processes | micro-batches | flags | measured MB | formula MB | ratio |")
    assert len(lines) == len(alone) and lines[0].startswith("| 1 | 2 | small | ")


def test_every_case_of_the_benchmark_is_a_layout():
    assert all(case.formula("cpu").total > 0 for case in CPU_CASES)
    assert all(0 < case.formula("cuda").total < 80e9 for case in CUDA_CASES)


@pytest.mark.slow
def test_the_head_as_on_cuda():
    """Chunks larger than the batch, fp32 copies of whole chunks, no kernels. (RMSNorm is one operator on CUDA only.)"""
    case = Case(f"{SMALL} {GELU}", 1, 1, 20000)
    with (
        patched(linear_cross_entropy, "CHUNK_ROWS", {"cpu": 1500}),
        patched(linear_cross_entropy, "CACHED_NUMBERS", 10**12),
        joined(),
    ):
        peak = measure(case, 0, CPU, steps=1)["total"]
    with patched(rank_sizes, "HEAD_POSITIONS", {"cuda": 1500}), patched(rank_sizes, "HEAD_IN_PLACE", set()):
        computed = case.formula("cuda")
    assert computed.moment == "head" and computed.head > 0.4 * computed.total
    assert computed.total == pytest.approx(peak, rel=TOLERANCE)


def test_offload_moves_the_states_to_the_host():
    on_device = Case(SMALL, 2).formula("cuda")
    offloaded = Case(f"{SMALL} --cpu-offload", 2).formula("cuda")
    assert offloaded.master_weights == offloaded.optimizer_states == on_device.host == 0
    assert offloaded.host == 4 * on_device.master_weights and offloaded.total < on_device.total


def test_repeated_heads_are_counted_on_cuda():
    """Under a mask, and in fp32, attention stores as many key/value heads as query heads."""
    flags = f"{SHORT} --num-attention-heads 8 --group-query-attention --num-query-groups 2"
    config = Case(flags).config
    masked = replace(config, data=replace(config.data, reset_attention_mask=True))
    sizes = {
        (device, precision, bool(changed)): peak_memory(
            changed or config, Vocabulary(500), capabilities("ar"), world_size=1, precision=precision, device=device
        ).activations
        for device in ("cuda", "cpu")
        for precision in ("bf16", "fp32")
        for changed in (None, masked)
    }
    model, tokens = config.model, config.training.micro_batch_size * config.data.seq_length
    repeated = 2 * 2 * tokens * (8 - 2) * model.head_size  # of keys and values in bf16, in one block
    difference = sizes["cuda", "bf16", True] - sizes["cuda", "bf16", False]
    assert difference % repeated == 0 and 0 < difference // repeated <= model.num_layers
    assert sizes["cuda", "fp32", True] == sizes["cuda", "fp32", False]
    assert sizes["cpu", "bf16", True] == sizes["cpu", "bf16", False]


def test_the_rank_that_needs_most_decides():
    config = Case(f"{SMALL} {PIPELINE}", 2, 4).config
    deep = replace(config, model=replace(config.model, num_layers=24))
    wide = Vocabulary(500_000)
    settings = {"world_size": 2, "precision": "bf16"}
    assert peak_memory(deep, Vocabulary(500), capabilities("ar"), **settings).stage == 0  # more micro-batches in flight
    assert peak_memory(config, wide, capabilities("ar"), **settings).stage == 1  # the head


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: "-".join(changes) or "plain")
def test_shapes_are_those_of_the_model(changes):
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **changes)
    vocabulary = Vocabulary(500)
    shapes = {name: tuple(parameter.shape) for name, parameter in Block(model).named_parameters()}
    assert block_shapes(model) == shapes
    assert parameter_count(model, vocabulary) == sum(p.numel() for p in Transformer(model, vocabulary).parameters())


def test_constants_equal_those_of_the_head():
    assert rank_sizes.HEAD_POSITIONS == linear_cross_entropy.CHUNK_ROWS
    assert rank_sizes.TEACHER_POSITIONS == linear_cross_entropy.TEACHER_ROWS
    assert rank_sizes.HEAD_ELEMENTS == {"cpu": linear_cross_entropy.CACHED_NUMBERS}
