"""Compiled blocks give the results of uncompiled ones, in the layouts that change what a block is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from megatron.config.sections import ParallelConfig
from megatron.model.attention import block_mask
from megatron.objectives.documents import DocumentRules
from megatron.parallel import apply, compiled
from megatron.parallel.compiled import takes_block_masks
from megatron.parallel.mesh import ParallelContext, build_parallel_context
from megatron.torch_private import forget_compiled_code, hide_gradients_from_compiler
from tests.distributed import joined, spawn
from tests.steps import Case, batches_of_step, build, whole

CASE = Case("mdm", micro_batch=2)
CAUSAL = Case("ar", micro_batch=2)
# what objectives and regularisers change in a block: masks, target positions, residual scales, and two kinds of graph
KINDS = [
    Case("block-diffusion", {"diffusion_block_size": 4, "stochastic_depth": 0.5}, micro_batch=2),
    Case("dual", micro_batch=2),
    Case(
        "ar",
        {"target_positions": True, "num_order_list": 3, "randmask_ratio": 0.5, "masked_input_weight": 0.4},
        micro_batch=2,
    ),
    Case("ar", documents=DocumentRules(7, True, True, True), micro_batch=2),
    Case("mdm", {"stochastic_depth": 0.5}, micro_batch=2, model={"num_loops": 3}),
]
NAMES = ["-".join([case.name, *case.options]) for case in KINDS]


def loss_and_norm(
    ranks: ParallelContext, parallel: ParallelConfig, compile: bool, case: Case = CASE, bf16: bool = False
) -> tuple[float, float]:
    torch._dynamo.reset()  # a run compiles one kind of model
    counters.clear()
    engine, _, data = build(ranks, case, parallel, compile=compile, bf16=bf16)
    loss = engine.backward(batches_of_step(data, 0), 100.0)
    assert bool(counters["stats"]["unique_graphs"]) == compile
    return ranks.sum(float(loss))[0], float(engine.clip(0.0))


def tensor_parallel(ranks: ParallelContext, granularity: str | None) -> list[tuple[float, float]]:
    ranks = build_parallel_context(ranks.rank, ranks.size, ranks.device, tensor=2)
    parallel = ParallelConfig(tensor_model_parallel_size=2, recompute_granularity=granularity)
    return [loss_and_norm(ranks, parallel, compile) for compile in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_blocks(granularity):
    parallel = ParallelConfig(recompute_granularity=granularity)
    with joined() as ranks:
        uncompiled, compiled = (loss_and_norm(ranks, parallel, compile) for compile in (False, True))
    assert compiled == pytest.approx(uncompiled, rel=1e-5)


@pytest.mark.parametrize("granularity", [pytest.param(None, marks=pytest.mark.slow), "selective"])
def test_tensor_parallel_blocks(granularity):
    uncompiled, compiled = spawn(tensor_parallel, 2, granularity)[0]
    assert compiled == pytest.approx(uncompiled, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case is not KINDS[0])) for case in KINDS],
    ids=NAMES,
)
def test_what_objectives_change(case):
    with joined() as ranks:
        plain = ParallelConfig()
        uncompiled, compiled = (loss_and_norm(ranks, plain, compile, case) for compile in (False, True))
    assert compiled == pytest.approx(uncompiled, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS, ids=NAMES)
def test_what_objectives_change_in_bf16(case):
    with joined() as ranks:
        uncompiled = loss_and_norm(ranks, ParallelConfig(), False, case)
        rounded = loss_and_norm(ranks, ParallelConfig(), True, case, bf16=True)
    assert rounded == pytest.approx(uncompiled, rel=0.02) and rounded != pytest.approx(uncompiled, rel=1e-5)


NO_GROUP = {"one rank": 0, "several ranks": 0}


@pytest.mark.parametrize(
    "limit", [(apply, "ONE_GROUP_PARAMETERS", NO_GROUP), (compiled, "LONGEST_GRAPH", 1)], ids=lambda limit: limit[1]
)
def test_blocks_of_larger_models_compile_one_by_one(limit, monkeypatch):
    """Either since they have FSDP2's hooks, or since one graph of many blocks compiles slowly."""
    with joined() as ranks:
        together = loss_and_norm(ranks, ParallelConfig(), True, CAUSAL)
        assert counters["stats"]["unique_graphs"] == 1
        monkeypatch.setattr(*limit)
        by_block = loss_and_norm(ranks, ParallelConfig(), True, CAUSAL)
        assert counters["stats"]["unique_graphs"] == 3  # a block, and the two functions of the last one
    assert by_block == pytest.approx(together, rel=1e-5)


class Layer(nn.Module):
    """A matrix product in bf16."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.bfloat16() @ self.weight


@pytest.mark.parametrize("hides", [True, False])
def test_gradients_of_another_dtype_do_not_keep_code_from_being_compiled(hides):
    """FSDP2 of torch 2.15 leaves fp32 gradients on bf16 weights between micro-batches."""
    forget_compiled_code()
    layer = Layer()
    layer.weight.grad_dtype = torch.float32
    layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    if hides:
        hide_gradients_from_compiler(layer)
    layer(torch.ones(2, 4)).sum().backward()
    try:
        layer(torch.ones(3, 4)).sum().backward()
    except Unsupported as error:
        assert not hides and "dtype mismatch between tensor and its gradient" in str(error)
    else:
        assert hides and torch.equal(layer.weight.grad, torch.full((4, 4), 5.0))  # fp32
    finally:
        forget_compiled_code()


MASKED = [KINDS[0], KINDS[3]]  # one mask per sequence, and one for all


def nll_and_gradients(ranks: ParallelContext, case: Case, block_mask: bool) -> tuple[list[torch.Tensor], dict]:
    """Return the nll of a step's batches and its gradients, with dense attention masks or BlockMasks."""
    engine, _, data = build(ranks, case, ParallelConfig())
    engine.models[0].uses_block_mask = block_mask
    engine.backward(batches_of_step(data, 0), 100.0)
    gradients = whole((name, parameter.grad) for name, parameter in engine.named_parameters())
    return [engine.nll(batch) for batch in batches_of_step(data, 0)], gradients


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_block_masks_mask_the_same(case, monkeypatch):
    # FlexAttention has no compiled backward pass on a CPU and refuses the uncompiled one, which this test uses
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with joined() as ranks:
        dense, tiled = (nll_and_gradients(ranks, case, block_mask) for block_mask in (False, True))
    for expected, nll in zip(dense[0], tiled[0], strict=True):
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in dense[1].items():
        np.testing.assert_allclose(tiled[1][name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "kib, largest_bf16, largest_fp32",
    [(228, 256, 256), (164, 256, 128), (100, 128, 64)],
    ids=["H100", "A100", "L40S"],
)
def test_heads_of_block_masks_fit_into_shared_memory(kib, largest_bf16, largest_fp32):
    for dtype, largest in ((torch.bfloat16, largest_bf16), (torch.float32, largest_fp32)):
        sizes = [size for size in range(1, 300) if takes_block_masks(size, dtype, kib * 1024)]
        assert sizes == list(range(16, largest + 1))


@pytest.mark.parametrize("length", [300, 384])
@pytest.mark.parametrize("sequences", [1, 2])
def test_tiles_that_are_fully_or_not_at_all_masked(length, sequences):
    """Some documents end inside tiles of 128 x 128, and some fill several tiles."""
    positions = torch.arange(length)
    documents = torch.stack([positions // 140, positions // 290])[:sequences]
    visible = documents[:, :, None] == documents[:, None, :]
    mask = block_mask(visible)
    full, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
    assert full and partial and full + partial < sequences * 3 * 3
    query, key, value = torch.randn(3, 2, 4, length, 16, generator=torch.Generator().manual_seed(1))
    key, value = key[:, :2], value[:, :2]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], enable_gqa=True)
    output = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_compiled_block_masks_mask_the_same_and_compile_once(case):
    case = replace(case, model={"num_attention_heads": 1})  # head size 16
    torch._dynamo.reset()
    losses = []  # per compile option, a list of nll [B, S]
    with joined() as ranks, torch.no_grad():
        for compile in (False, True):
            counters.clear()
            engine, _, data = build(ranks, case, ParallelConfig(), 3, compile=compile)
            engine.models[0].uses_block_mask = compile
            engine.eval()
            losses.append([engine.nll(batch) for step in range(3) for batch in batches_of_step(data, step)])
    # all blocks; where positions are selected, all but the last one, and the two functions of the last one
    assert counters["stats"]["unique_graphs"] == (1 if case.name == "ar" else 3)
    for expected, nll in zip(*losses, strict=True):
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
