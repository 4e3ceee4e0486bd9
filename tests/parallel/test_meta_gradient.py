"""The meta-gradient step against two explicit backward passes of a plain model that is moved and restored."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.step import reseed, train_step
from tests.distributed import joined, spawn
from tests.parallel.test_layouts import Layout, context
from tests.steps import MODEL, VOCABULARY, Case, batches_of_step, build, patched

SETTINGS = {"meta_gradient_norm": 0.5}
MLP = SETTINGS | {"meta_gradient_parameters": "mlp"}
CASES = {
    "ar": Case("ar", optimizer=SETTINGS),
    "mdm": Case("mdm", micro_batch=2, optimizer=SETTINGS),
    "mdm-mlp": Case("mdm", micro_batch=1, optimizer=MLP),
    "ar-muon": Case("ar", optimizer=SETTINGS | {"optimizer": "muon"}),
    "dual": Case("dual", optimizer=SETTINGS),
    "any-order": Case("any-order", optimizer=SETTINGS),
    "block-diffusion": Case("block-diffusion", optimizer=SETTINGS),
    "ar-masked-input": Case("ar", {"masked_input_weight": 0.4, "randmask_ratio": 0.5}, optimizer=MLP),
    "mdm-dropout": Case("mdm", {"stochastic_depth": 0.5}, model={"mlp_dropout": 0.2}, optimizer=SETTINGS),
    "mdm-short": Case("mdm", samples=2, micro_batch=1, optimizer=SETTINGS),  # the second half is padding
}
TWO_RANKS = [Layout(2, 1, 1), Layout(2, 1, 1, {"zero_stage": 0})]


@dataclass(frozen=True)
class Outcome:
    """A backward pass, by parameter: gathered gradients, weights before and after it, and this rank's loss."""

    loss: float
    gradients: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    reference_loss: float  # of the reference on this rank
    reference: dict[str, np.ndarray]  # its gradients on this rank


def explicit(case: Case, model: Transformer, batches: list, count: float) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of two backward passes of `model`, the second one at moved weights."""
    half, loss = len(batches) // 2, torch.zeros(())
    for batch in batches[:half]:
        share = model(batch).sum() / count
        share.backward()
        loss += share.detach()
    wanted = "mlp" if case.optimizer.get("meta_gradient_parameters") == "mlp" else "proj"
    moving = [p for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2 and wanted in name]
    assert len(moving) == 2 * (3 if wanted == "mlp" else 7)
    norm = torch.stack([parameter.grad.norm() for parameter in moving]).norm()
    for parameter in moving:
        parameter.data -= parameter.grad * (case.optimizer["meta_gradient_norm"] / norm)
    late = torch.zeros(())
    for batch in batches[half:]:
        share = model(batch).sum() / count
        share.backward()
        late += share.detach()
    return float(loss + late), {name: parameter.grad for name, parameter in model.named_parameters()}


def outcome(ranks: ParallelContext, case: Case, parallel: ParallelConfig, compile: bool = False) -> Outcome:
    engine, _, data = build(ranks, case, parallel, compile=compile)
    before = {name: parameter.full_tensor().detach().clone() for name, parameter in engine.named_parameters()}
    batches = batches_of_step(data, 0)
    (count,) = ranks.sum(sum(batch.count for batch in batches))
    plain = Transformer(ModelConfig(**MODEL | case.model), VOCABULARY)
    plain.load_state_dict(before)
    reseed(7, 0, ranks)
    reference_loss, reference = explicit(case, plain, batches, count)
    reseed(7, 0, ranks)
    loss = case.meta_gradient.backward(engine, batches, count)
    engine.reshard()
    named = list(engine.named_parameters())
    return Outcome(
        float(loss),
        {name: parameter.grad.full_tensor().numpy() for name, parameter in named},
        {name: tensor.numpy() for name, tensor in before.items()},
        {name: parameter.full_tensor().detach().numpy() for name, parameter in named},
        reference_loss,
        {name: gradient.numpy() for name, gradient in reference.items()},
    )


def check(results: list[Outcome], exact: bool) -> None:
    """Check the outcomes of all ranks: gradients and loss of the explicit passes, and weights as they were."""
    for result in results:
        np.testing.assert_equal(result.after, result.before)
    expected = {name: sum(result.reference[name] for result in results) for name in results[0].reference}
    tolerances = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-7)
    losses = [sum(result.loss for result in results), sum(result.reference_loss for result in results)]
    assert losses[0] == (losses[1] if exact else pytest.approx(losses[1], rel=1e-6))
    assert results[0].gradients.keys() == expected.keys()
    for name, gradient in results[0].gradients.items():
        np.testing.assert_allclose(gradient, expected[name], **tolerances, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_one_rank_equals_two_explicit_passes_to_the_last_bit(name):
    with joined() as ranks:
        check([outcome(ranks, CASES[name], ParallelConfig())], exact=True)


def test_recomputed_blocks_see_the_moved_weights():
    case = replace(CASES["ar"], model={"mlp_dropout": 0.2})
    with joined() as ranks:
        check([outcome(ranks, case, ParallelConfig(recompute_granularity="full"))], exact=False)


@pytest.mark.slow
def test_compiled_blocks_see_the_moved_weights():
    with joined() as ranks:
        check([outcome(ranks, CASES["ar"], ParallelConfig(), compile=True)], exact=False)


def ascending():
    """The move goes up the gradient."""
    return patched(MetaGradient, "at", lambda *_: MetaGradient(-0.5, "matrices"))


def never_moved():
    return patched(MetaGradient, "_move", lambda *_: None)


def moved_shards():
    """The move changes the weights that the optimizer updates."""
    move = MetaGradient._move

    def move_both(self, engine) -> None:
        move(self, engine)
        for matrix in (matrix for block in self._matrices(engine) for matrix in block):
            matrix.parameter.sharded_param.to_local().data.copy_(matrix.weight)

    return patched(MetaGradient, "_move", move_both)


@pytest.mark.parametrize("fault", [ascending, never_moved, moved_shards])
def test_a_planted_fault_is_detected(fault):
    with joined() as ranks:
        with fault():
            result = outcome(ranks, CASES["ar"], ParallelConfig())
        with pytest.raises(AssertionError):
            check([result], exact=False)


def test_micro_batches_of_one_rank_change_nothing():
    with joined() as ranks:
        results = [outcome(ranks, replace(CASES["mdm"], micro_batch=size), ParallelConfig()) for size in (1, 2, 4)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        for name, gradient in results[0].gradients.items():
            np.testing.assert_allclose(result.gradients[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def rounded_moves(ranks: ParallelContext, layout: Layout) -> list[tuple[np.ndarray, ...]]:
    """Return (fp32 weights, gradients, moved bf16 weights as fp32) of the matrices after the move in bf16."""
    case = Case("mdm", micro_batch=2, optimizer={"meta_gradient_norm": 0.01})
    engine, _, data = build(context(ranks, layout), case, layout.parallel, bf16=True)
    weights = {name: parameter.full_tensor().detach().clone() for name, parameter in engine.named_parameters()}
    batches = batches_of_step(data, 0)
    engine.accumulate(batches[: len(batches) // 2], 100.0)
    blocks = list(case.meta_gradient._matrices(engine))
    case.meta_gradient._move(engine)
    names = [name for name, weight in engine.named_parameters() if name.startswith("layers") and weight.dim() == 2]
    matrices = [matrix for block in blocks for matrix in block]
    results = [
        (weights[name].numpy(), matrix.gradient.numpy().copy(), matrix.weight.detach().float().numpy().copy())
        for name, matrix in zip(names, matrices, strict=True)
    ]
    engine.backward(batches[len(batches) // 2 :], 100.0)
    return results


def check_rounded_once(matrices: list[tuple[np.ndarray, ...]]) -> None:
    """Check that bf16 weights are the moved fp32 weights, rounded once: their move has the norm of the flag."""
    norm = np.sqrt(sum((gradient**2).sum() for _, gradient, _ in matrices))
    along = 0.0
    for weights, gradient, moved in matrices:
        exact = torch.from_numpy(weights - gradient * (0.01 / norm))
        np.testing.assert_array_equal(moved, exact.bfloat16().float().numpy())
        unmoved = torch.from_numpy(weights).bfloat16().float().numpy()
        along -= ((moved - unmoved) * gradient).sum() / norm
    assert along == pytest.approx(0.01, rel=0.3)  # most elements round to the same value, the sum survives


def on_two_ranks(ranks: ParallelContext) -> tuple[list[Outcome], list]:
    outcomes = [outcome(context(ranks, layout), CASES["mdm"], layout.parallel) for layout in TWO_RANKS]
    return outcomes, [rounded_moves(ranks, layout) for layout in TWO_RANKS]


def test_two_ranks_move_along_their_own_gradients():
    by_rank = spawn(on_two_ranks, 2)
    for layout in range(len(TWO_RANKS)):
        check([outcomes[layout] for outcomes, _ in by_rank], exact=False)
        for _, moves in by_rank:
            check_rounded_once(moves[layout])
    first, second = (moves[0][0][2] for _, moves in by_rank)
    assert not np.array_equal(first, second)


def test_one_rank_rounds_moved_weights_to_bf16_once():
    with joined() as ranks:
        check_rounded_once(rounded_moves(ranks, Layout()))


def test_nothing_moves_without_a_gradient():
    """Without a scored token in the first half, the step is that of the flag switched off."""
    case = Case("mdm", micro_batch=1, optimizer=SETTINGS)
    with joined() as ranks:
        engine, _, data = build(ranks, case, ParallelConfig())
        batches = batches_of_step(data, 0)
        unscored = replace(batches[0], weights=torch.zeros_like(batches[0].weights), scored_positions=None)
        pair = [unscored, batches[1]]
        with_move = float(case.meta_gradient.backward(engine, pair, 18.0))
        assert np.isfinite(with_move) and with_move == float(engine.backward(pair, 18.0))


def test_the_norm_follows_the_learning_rate_and_off_is_off():
    config = OptimizerConfig(lr=0.02, meta_gradient_norm=0.5, meta_gradient_style="lr")
    assert [MetaGradient.at(config, rate).norm for rate in (0.02, 0.005)] == pytest.approx([0.5, 0.125])
    assert MetaGradient.at(replace(config, meta_gradient_style="constant"), 0.005).norm == 0.5
    assert MetaGradient.at(OptimizerConfig(), 0.005) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(optimizer):
    """Ten steps on one batch lower its loss."""
    case = Case("mdm", micro_batch=4, optimizer=SETTINGS | {"optimizer": optimizer})
    with joined() as ranks:
        engine, optimizer, data = build(ranks, case, ParallelConfig())
        rates = {"learning_rate": 1e-2, "weight_decay": 0.0, "clip_grad": 1.0, "meta_gradient": case.meta_gradient}
        losses = [float(train_step(engine, optimizer, batches_of_step(data, 0), **rates).loss) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.3
