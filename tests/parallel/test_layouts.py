"""The layout does not change results: loss, gradient norm and every gradient equal those of a single rank."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch

from megatron.config.layout_checks import layers_of
from megatron.config.sections import ParallelConfig
from megatron.objectives.documents import DocumentRules
from megatron.parallel import tensor
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext, build_parallel_context
from megatron.parallel.pipeline import Pipeline
from megatron.parallel.vocab_parallel import VocabParallelHead
from megatron.training import muon
from tests import steps
from tests.distributed import joined, spawn
from tests.steps import Case, Step, build, check_equal, curve, dropout_shared_by_ranks, patched, take

# 3 layers over 2 stages are uneven; of 128 vocabulary rows over 2 ranks the second rank has no id below 61
MODEL = dict(num_layers=3, num_attention_heads=4, group_query_attention=True, num_query_groups=2, qk_layernorm=True)
TERMS = dict(label_smoothing=0.2, z_loss=0.05)
UNTIED = dict(untie_embeddings_and_output_weights=True, normalization="layernorm", swiglu=False)
MUP = dict(parametrization="mup", base_hidden_size=4, base_kv_channels=2)
COMPLETEP = dict(parametrization="completep", base_hidden_size=4, base_num_layers=1)


@dataclass(frozen=True)
class Layout:
    """Data-, tensor- and pipeline-parallel sizes, and other options of the parallel section."""

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


def described(check: tuple[Layout, str]) -> str:
    layout, name = check
    options = "".join(f"-{key.split('_')[0]}{value}" for key, value in layout.options.items())
    return f"{name}-dp{layout.data}-tp{layout.tensor}-pp{layout.pipeline}{options}"


def looped(layers: str | None, loops: int = 2) -> dict:
    """Return the fields of a model with weight-shared loops."""
    return MODEL | {"num_loops": loops, "loop_layers": layers}


OBJECTIVES = {
    "ar": Case("ar", micro_batch=2, model=MODEL),
    "mdm": Case("mdm", micro_batch=2, model=MODEL),
    "ar-token-dropout": Case("ar", options={"token_dropout": 0.4}, micro_batch=2, model=MODEL),
}
# every option of an objective: its random draws, masks and skipped blocks are the same in every layout
OPTIONS = {
    "dual": Case("dual", micro_batch=2, model=MODEL),
    "any-order": Case("any-order", micro_batch=2, model=MODEL),
    "block-diffusion": Case("block-diffusion", {"diffusion_block_size": 4}, micro_batch=2, model=MODEL),
    "ar-orders": Case("ar", {"num_order_list": 4, "target_positions": True}, micro_batch=2, model=MODEL),
    "ar-backwards": Case(
        "ar",
        {"right_to_left_ratio": 0.5, "target_offset_max": 3, "target_positions": True, "random_replacement": 0.2},
        micro_batch=2,
        model=MODEL,
    ),
    "ar-masked-input": Case(
        "ar", {"masked_input_weight": 0.4, "randmask_ratio": 0.5}, micro_batch=2, samples=5, model=MODEL
    ),
    "ar-documents": Case("ar", documents=DocumentRules(7, True, True, True), micro_batch=2, model=MODEL),
    "mdm-bell": Case("mdm", {"mask_time_distribution": "bell", "mdm_loss": "simple"}, micro_batch=2, model=MODEL),
    "mdm-depth": Case("mdm", {"ar_ratio": 0.5, "stochastic_depth": 0.5}, micro_batch=2, model=MODEL),
}
CASES = (
    OBJECTIVES
    | OPTIONS
    | {
        "mdm-short": Case("mdm", micro_batch=2, samples=5, model=MODEL),
        "mdm-nothing-masked": Case("mdm", micro_batch=2, nothing_masked=True, model=MODEL),
        "mdm-untied": Case("mdm", micro_batch=2, model=MODEL | UNTIED),
        "mdm-terms": Case("mdm", micro_batch=2, model=MODEL | TERMS),
        "ar-clipped": Case("ar", micro_batch=2, clip=0.05, model=MODEL),
        "mdm-deep": Case("mdm", micro_batch=2, model=MODEL | {"num_layers": 4}),
        "mdm-thirds": Case(  # 128 vocabulary rows in shards of 43, 43 and 42
            "mdm", micro_batch=2, model={"hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 48}
        ),
        "ar-thirds-terms": Case(
            "ar", micro_batch=2, model={"hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 48} | TERMS
        ),
        "mdm-muon": Case("mdm", micro_batch=2, model=MODEL, optimizer={"optimizer": "muon"}),
        "ar-completep": Case("ar", micro_batch=2, model=MODEL | UNTIED | COMPLETEP),
        "mdm-mup-muon": Case("mdm", micro_batch=2, model=MODEL | MUP, optimizer={"optimizer": "muon"}),
        "ar-distilled": Case(
            "ar", {"stochastic_depth": 0.5}, micro_batch=2, model=MODEL, teachers=({"num_layers": 1},)
        ),
        "mdm-distilled": Case(
            "mdm", micro_batch=2, samples=5, model=MODEL | TERMS, teachers=(MODEL, {"hidden_size": 24} | UNTIED)
        ),
        "mdm-muon-meta": Case(
            "mdm", micro_batch=2, model=MODEL, optimizer={"optimizer": "muon", "meta_gradient_norm": 0.5}
        ),
        "ar-deep-untied": Case("ar", micro_batch=2, model=MODEL | UNTIED | {"num_layers": 4}),
        # in a pipeline each loop is inside one stage: the first of two, the second of two, the third of four
        "mdm-loops": Case("mdm", {"stochastic_depth": 0.5}, micro_batch=2, model=looped("0-1", 3)),
        "ar-last-loops": Case("ar", micro_batch=2, model=looped("2-2")),
        "mdm-deep-loops": Case("mdm", micro_batch=2, model=looped("2-2") | {"num_layers": 4}),
        "mdm-all-loops": Case("mdm", micro_batch=2, model=looped(None)),
    }
)
GRID = [Layout(data, tensor, pipeline) for data in (1, 2) for tensor in (1, 2) for pipeline in (1, 2)][1:]
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}
CHECKS = [(layout, name) for layout in GRID for name in OBJECTIVES]
CHECKS += [(layout, name) for layout in (Layout(2, 1, 1), Layout(1, 2, 2)) for name in OPTIONS]
VARIATIONS = ("mdm-short", "mdm-nothing-masked", "mdm-untied", "mdm-terms", "ar-clipped")
CHECKS += [(layout, name) for layout in GRID for name in VARIATIONS]
CHECKS += [(Layout(2, 3, 1), name) for name in ("mdm-thirds", "ar-thirds-terms")]
CHECKS += [(Layout(1, 1, 4), "mdm-deep")]  # the two inner stages have neither embedding nor head
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
CHECKS += [(layout, "mdm-loops") for layout in GRID]
CHECKS += [(Layout(1, 1, 2), "ar-last-loops"), (Layout(1, 1, 2, INTERLEAVED), "mdm-deep-loops")]
CHECKS += [(Layout(2, 1, 1, {"zero_stage": stage}), "mdm-all-loops") for stage in (0, 1, 2, 3)]
CHECKS += [
    (Layout(2, 1, 1, {"zero_stage": stage, "recompute_granularity": granularity}), "mdm-all-loops")
    for stage, granularity in ((3, "full"), (1, "selective"))
]
# all placements of a matrix
MUON = [layout for layout in GRID if layout.size == 2] + [Layout(2, 2, 1)]
MUON += [Layout(2, 1, 1, {"zero_stage": stage}) for stage in (0, 3)]
CHECKS += [(layout, "mdm-muon") for layout in MUON]
CHECKS += [(layout, "ar-completep") for layout in (Layout(2, 1, 1, {"zero_stage": 3}), Layout(1, 2, 2))]
CHECKS += [(Layout(1, 1, 2, {"recompute_granularity": "full"}), "ar-completep"), (Layout(2, 2, 1), "mdm-mup-muon")]

DISTILLED = [layout for layout in GRID if layout.pipeline == 1]
DISTILLED += [Layout(2, 1, 1, {"zero_stage": stage}) for stage in (0, 2, 3)]
DISTILLED += [Layout(1, 2, 1, {"recompute_granularity": "full"})]
CHECKS += [(layout, name) for layout in DISTILLED for name in ("ar-distilled", "mdm-distilled")]
CHECKS += [(Layout(1, 2, 1), "mdm-muon-meta")]  # data-parallel ranks move their weights differently

CURVES = [
    (layout, name)
    for layout in (*GRID, Layout(2, 1, 1, {"zero_stage": 0}), Layout(2, 1, 1, {"zero_stage": 3}))
    for name in ("mdm", "ar-token-dropout")
]
CURVES += [(Layout(1, 2, 2, INTERLEAVED), "mdm-deep")]
CURVES += [(Layout(2, 2, 1), "mdm-muon"), (Layout(1, 2, 2), "mdm-mup-muon")]
HALVED = [Layout(2, 1, 1), Layout(2, 1, 1, {"zero_stage": 3}), Layout(1, 2, 1), Layout(1, 1, 2)]


# on 4 ranks that are not 2 stages of 2 tensor-parallel ranks, the fast checks are of these cases
FOUR_RANKS = ("mdm", "mdm-deep", "mdm-mup-muon", "mdm-distilled")
# a fast check of these cases has both tensor and pipeline parallelism, another one data parallelism
BOTH = (*VARIATIONS, "mdm-loops")
# their random draws are of the kinds that other options have
SIMPLE = ("any-order", "ar-backwards", "ar-masked-input", "mdm-bell")


def is_slow(layout: Layout, name: str) -> bool:
    """Whether a check is a slow test: more than 4 ranks, or a variant of fast checks."""
    if layout.options.get("zero_stage") in (0, 2) and (layout.size > 2 or name not in ("mdm-untied", "mdm-muon")):
        return True
    if layout.size == 4:
        return name in SIMPLE if layout == Layout(1, 2, 2) else name not in FOUR_RANKS
    return layout.size > 4 or (name in BOTH and layout in (Layout(1, 2, 1), Layout(1, 1, 2)))


def is_slow_curve(layout: Layout, name: str) -> bool:
    """Whether a curve is a slow test: more than 2 ranks, or a variant of fast curves."""
    return layout.size > 2 or layout.options == {"zero_stage": 0} or (name != "mdm" and layout.tensor == 1)


def tied_gradient_not_reduced():
    """The gradients of tied weights are not summed over the two ends of a pipeline."""
    return patched(Pipeline, "_reduce_tied", lambda self: None)


def tied_matrix_counted_twice():
    """The norm counts tied weights at both ends of a pipeline."""
    return patched(Pipeline, "_enters_norm", Engine._enters_norm)


def norm_gradient_not_reduced():
    """The gradients of norm weights are not summed over the sequence shards."""
    return patched(tensor, "_replicated", lambda parameter: None if parameter is None else parameter.to_local())


def replicas_counted_twice():
    """The norm counts replicated parameters on every tensor-parallel rank."""
    return patched(Engine, "_enters_norm", lambda self, parameter: True)


def softmax_of_a_shard():
    """Each rank normalises over its own vocabulary shard."""
    return patched(VocabParallelHead, "total", lambda self, values: values)


def shards_orthogonalised():
    """Each of two ranks orthogonalises its own shard of a matrix."""
    original = muon.orthogonalise
    return patched(muon, "orthogonalise", lambda matrix: torch.cat([original(shard) for shard in matrix.chunk(2)]))


PLANTED = [
    (tied_gradient_not_reduced, Layout(1, 1, 2)),
    (tied_matrix_counted_twice, Layout(1, 1, 2)),
    (norm_gradient_not_reduced, Layout(1, 2, 1)),
    (replicas_counted_twice, Layout(1, 2, 1)),
    (softmax_of_a_shard, Layout(1, 2, 1)),
]


def dropped(ranks: ParallelContext) -> np.ndarray:
    """Return which elements of the embeddings, [B, S/2, H], this tensor-parallel rank drops."""
    case = Case("ar", micro_batch=2, model=MODEL | {"embedding_dropout": 0.5})
    layout = Layout(1, 2, 1)
    engine, _, data = build(context(ranks, layout), case, layout.parallel)
    is_zero = []
    engine.models[0].layers["0"].register_forward_pre_hook(lambda _, inputs: is_zero.append(inputs[0] == 0))
    steps.reseed(7, 0, ranks)
    engine.backward([replace(data[0][0], tokens=torch.zeros_like(data[0][0].tokens))], 1.0)
    return is_zero[0].numpy()


def all_layouts(ranks: ParallelContext, size: int, slow: bool) -> tuple[dict, dict]:
    """Return the steps of all slow or fast checks, and the curves, at one world size, by index or name."""
    results, curves = {}, {}
    if size == 2 and not slow:
        for layout in HALVED:
            curves["bf16", described((layout, "mdm"))] = curve(
                context(ranks, layout), CASES["mdm"], layout.parallel, bf16=True
            )
        for fault, layout in PLANTED:
            with fault():
                results[fault] = take(context(ranks, layout), CASES["mdm"], layout.parallel)
        with shards_orthogonalised():
            results[shards_orthogonalised] = take(ranks, CASES["mdm-muon"])
        results["dropped"] = dropped(ranks)
        with dropout_shared_by_ranks():
            results["dropped", "shared"] = dropped(ranks)
    for index, (layout, name) in enumerate(CHECKS):
        if layout.size == size and is_slow(layout, name) == slow:
            results[index] = take(context(ranks, layout), CASES[name], layout.parallel)
    return results, curves | (all_curves(ranks, size, slow=False) if size == 2 and not slow else {})


def all_curves(ranks: ParallelContext, size: int, slow: bool) -> dict[int, np.ndarray]:
    """Return the slow or fast curves at one world size, by index."""
    return {
        index: curve(context(ranks, layout), CASES[name], layout.parallel)
        for index, (layout, name) in enumerate(CURVES)
        if layout.size == size and is_slow_curve(layout, name) == slow
    }


def context(ranks: ParallelContext, layout: Layout) -> ParallelContext:
    """Return this rank's context in `layout`."""
    replicas = layout.parallel.replicas(layout.data)
    return _cached_context(ranks.rank, ranks.size, layout.tensor, layout.pipeline, replicas)


@cache  # with new process groups for every check, their threads make the last of a hundred checks 3x slower
def _cached_context(rank: int, size: int, tensor: int, pipeline: int, replicas: int) -> ParallelContext:
    return build_parallel_context(rank, size, torch.device("cpu"), tensor=tensor, pipeline=pipeline, replicas=replicas)


@pytest.fixture(scope="module")
def parallel():
    """The steps of the fast checks, and the fast curves, by index; lists over ranks."""
    return at_world_sizes(2, 4, slow=False)


@pytest.fixture(scope="module")
def large():
    """The steps of the slow checks, which takes minutes on two cores."""
    return at_world_sizes(2, 4, 6, 8, slow=True)


def at_world_sizes(*sizes: int, slow: bool) -> tuple[dict, dict]:
    results, curves = {}, {}
    for size in sizes:
        by_rank = spawn(all_layouts, size, size, slow)
        results |= {index: [steps[index] for steps, _ in by_rank] for index in by_rank[0][0]}
        curves |= {index: [losses[index] for _, losses in by_rank] for index in by_rank[0][1]}
    return results, curves


@pytest.fixture(scope="module")
def long_curves():
    """The losses of the slow curves, which take minutes on two cores."""
    by_size = [spawn(all_curves, size, size, True) for size in (2, 4, 8)]
    return {index: [losses[index] for losses in by_rank] for by_rank in by_size for index in by_rank[0]}


@pytest.fixture(scope="module")
def single():
    """The step of every case with one rank, and the curve of those in CURVES."""
    with joined() as ranks:
        curve_names = {name for _, name in CURVES}
        return {
            name: (take(ranks, case), curve(ranks, case) if name in curve_names else None)
            for name, case in CASES.items()
        }


def indices(checks: list[tuple[Layout, str]], slow: Callable[[Layout, str], bool]) -> list:
    """Return the indices of checks as test parameters; those that are `slow` are slow tests."""
    marks = [[pytest.mark.slow] * slow(*check) for check in checks]
    return [pytest.param(index, id=described(checks[index]), marks=marks[index]) for index in range(len(checks))]


def merged(ranks: list[Step]) -> Step:
    """Return the step of the whole model: a pipeline rank has the parameters of its own stages."""
    gradients, after = {}, {}
    for step in ranks:
        for name, gradient in step.gradients.items():
            np.testing.assert_array_equal(gradients.setdefault(name, gradient), gradient, err_msg=name)
            np.testing.assert_array_equal(after.setdefault(name, step.after[name]), step.after[name], err_msg=name)
    return replace(ranks[0], loss=sum(step.loss for step in ranks), gradients=gradients, after=after)


def check_orthogonal_updates(expected: Step, step: Step) -> None:
    """Check that Muon's updates of the blocks' matrices are equal; AdamW's first step is a sign, often of rounding."""
    matrices = [name for name in expected.after if name.startswith("layers.") and expected.after[name].ndim == 2]
    for name in matrices:
        np.testing.assert_allclose(step.after[name], expected.after[name], rtol=0, atol=1e-5, err_msg=name)
    assert len(matrices) == 3 * 7


@pytest.mark.parametrize("index", indices(CHECKS, is_slow))
def test_a_step_equals_that_of_one_rank(request, single, index):
    layout, name = CHECKS[index]
    ranks = request.getfixturevalue("large" if is_slow(layout, name) else "parallel")[0][index]
    check_equal([single[name][0]], [merged(ranks)])
    assert len({step.norm for step in ranks}) == 1
    if CASES[name].optimizer:
        check_orthogonal_updates(single[name][0], merged(ranks))


@pytest.mark.parametrize("fault, layout", PLANTED)
def test_a_planted_fault_is_detected(parallel, single, fault, layout):
    with pytest.raises(AssertionError):
        check_equal([single["mdm"][0]], [merged(parallel[0][fault])])


def test_orthogonalised_shards_are_detected(parallel, single):
    with pytest.raises(AssertionError):
        check_orthogonal_updates(single["mdm-muon"][0], merged(parallel[0][shards_orthogonalised]))


def test_tensor_parallel_ranks_have_different_dropout_masks(parallel):
    first, second = parallel[0]["dropped"]
    assert 0.4 < first.mean() < 0.6 and not np.array_equal(first, second)
    assert np.array_equal(*parallel[0]["dropped", "shared"])


@pytest.mark.parametrize("index", indices(CURVES, is_slow_curve))
def test_ten_steps_follow_those_of_one_rank(request, single, index):
    is_slow = is_slow_curve(*CURVES[index])
    curves = request.getfixturevalue("long_curves") if is_slow else request.getfixturevalue("parallel")[1]
    expected = single[CURVES[index][1]][1]
    np.testing.assert_allclose(sum(curves[index]), expected, rtol=1e-4)
    assert np.ptp(expected) > 0.1  # the loss changes


@pytest.mark.parametrize("layout", HALVED, ids=[described((layout, "mdm")) for layout in HALVED])
def test_ten_steps_in_bf16_stay_near_those_in_fp32(parallel, single, layout):
    losses, expected = sum(parallel[1]["bf16", described((layout, "mdm"))]), single["mdm"][1]
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    assert not np.allclose(losses, expected, rtol=1e-5)  # something was rounded


@pytest.mark.parametrize("stages, layers", [(1, 3), (2, 3), (4, 18), (3, 47), (5, 5)])
def test_stages_take_every_layer_once_in_even_shares(stages, layers):
    shares = [layers_of(stage, stages, layers) for stage in range(stages)]
    assert [layer for share in shares for layer in share] == list(range(layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
