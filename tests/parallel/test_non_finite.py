"""From a step with a non-finite loss or gradient on, weights, moments, step counts and averages do not change."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from megatron.config.sections import OptimizerConfig
from megatron.parallel import engine as engine_module
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.training.averaging import Average
from megatron.training.step import reseed, train_step
from tests.distributed import joined, spawn
from tests.parallel import test_deepspeed as deepspeed
from tests.parallel.test_layouts import MODEL, Layout, context
from tests.steps import GLOBAL_BATCH, Case, batches_of_step, build, patched

FINITE_STEPS, STEPS = 2, 4  # the third step is not finite, the fourth would be
FAULTS = ("loss", "gradient")
MUON = {"optimizer": "muon"}
META = {"meta_gradient_norm": 0.5}
ONE_RANK = {"adamw": {}, "muon": MUON, "meta": META}
TWO_RANKS = {
    "dp2": (Layout(2, 1, 1), {}),
    "dp2-zero3": (Layout(2, 1, 1, {"zero_stage": 3}), {}),
    "tp2": (Layout(1, 2, 1), {}),
    "dp2-meta": (Layout(2, 1, 1), META),
    "tp2-meta": (Layout(1, 2, 1), META),
    "pp2": (Layout(1, 1, 2), {}),
    "pp2-muon": (Layout(1, 1, 2), MUON),
}
SLOW = ("dp2-meta", "tp2", "pp2", "zero0", "zero2")  # the other names cover them
AVERAGES = {"ema": {"ema_decay": 0.9}, "mean": {"average_from_samples": 0}}
ZERO = {f"zero{stage}": (stage, {}) for stage in deepspeed.STAGES} | {"zero1-offload": (1, deepspeed.OFFLOAD)}
ZERO = ZERO if find_spec("deepspeed") else {}


class NoHostSynchronisation(TorchDispatchMode):
    """Fails where the host reads a float or a bool from a tensor; integers are ranks, of a DeviceMesh on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            assert args[0].dtype == torch.int64, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Job:
    """A training run: its engine, its state by name (this rank's shards), and a function that takes the next step."""

    engine: Engine
    state: Callable[[], dict[str, np.ndarray]]
    step: Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # step index -> this rank's loss, gradient norm


@dataclass(frozen=True)
class Outcome:
    """Results on one rank."""

    losses: list[float]
    norms: list[float]
    states: list[dict[str, np.ndarray]]  # after each step


def fsdp(ranks: ParallelContext, layout: Layout, optimizer_settings: dict) -> Job:
    """Return a job with both kinds of weight averages."""
    case = Case("mdm", micro_batch=2, model=MODEL, optimizer=optimizer_settings)
    engine, optimizer, data = build(context(ranks, layout), case, layout.parallel, STEPS)
    averages = {kind: Average(engine, OptimizerConfig(**settings)) for kind, settings in AVERAGES.items()}

    def state() -> dict[str, np.ndarray]:
        tensors = engine.tensors(optimizer)
        for kind, average in averages.items():
            tensors |= {f"{kind}.{name}": tensor for name, tensor in average.tensors().items()}
        counts = [values["step"] for values in optimizer.state.values() if "step" in values]
        return copies(tensors) | {"steps": np.array([float(count) for count in counts])}

    def step(index: int):
        reseed(7, index, engine.ranks)
        rates = {"learning_rate": 0.1, "weight_decay": 0.5, "clip_grad": 1.0, "meta_gradient": case.meta_gradient}
        batches = batches_of_step(data, index)
        with NoHostSynchronisation() if index else nullcontext():  # a pipeline's first step sets up its connections
            result = train_step(engine, optimizer, batches, **rates)
            for average in averages.values():
                average.update((index + 1) * GLOBAL_BATCH)
        return result.loss, result.grad_norm

    return Job(engine, state, step)


def zero(ranks: ParallelContext, stage: int, section: dict) -> Job:
    case = deepspeed.Case("ar", deepspeed.BIASES, steps=STEPS)
    run = deepspeed.Zero(ranks, case, None, stage, section)
    data = deepspeed.batches_of(case, ranks.rank, ranks.size)
    return Job(run.engine, lambda: copies(run.tensors()), lambda index: run.step(batches_of_step(data, index), 0.1))


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.to_local().numpy().copy() for name, tensor in tensors.items()}


def plant(engine: Engine, fault: str) -> RemovableHandle:
    """Make the loss infinite but the gradients finite, or some gradients NaN but the loss finite, on this rank."""
    model = engine.models[-1]
    if fault == "loss":
        return model.register_forward_hook(lambda module, inputs, loss: loss + torch.inf)
    return model.norm.register_forward_hook(
        lambda module, inputs, hidden: hidden.register_hook(lambda gradient: gradient * torch.nan) and None
    )


def outcome(job: Job, fault: str) -> Outcome:
    losses, norms, states = [], [], []
    for index in range(STEPS):
        is_faulty = index == FINITE_STEPS and job.engine.ranks.rank == job.engine.ranks.size - 1
        handle = plant(job.engine, fault) if is_faulty else None
        loss, norm = job.step(index)
        losses.append(float(loss))
        norms.append(float(norm))
        states.append(job.state())
        if handle:
            handle.remove()
    return Outcome(losses, norms, states)


def check_later_steps_are_skipped(result: Outcome) -> None:
    good, *bad = result.states[FINITE_STEPS - 1 :]
    assert any(not np.array_equal(good[name], value) for name, value in result.states[0].items())
    for state in bad:
        for name, value in good.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert np.isfinite(result.norms).tolist() == [True, True, False, True]


def never_skipped():
    """Every step is applied, whatever its norm."""
    return patched(Engine, "skip_if_diverged", lambda *_: None)


def loss_not_in_norm():
    """The gradients of an infinite loss are those of a finite one."""
    return patched(engine_module, "loss_scale", torch.full_like)


def on_two_ranks(ranks: ParallelContext, slow: bool) -> dict[tuple[str, str], Outcome]:
    results = {}
    for fault in FAULTS:
        for name in [name for name in (*TWO_RANKS, *ZERO) if (name in SLOW) == slow]:
            job = fsdp(ranks, *TWO_RANKS[name]) if name in TWO_RANKS else zero(ranks, *ZERO[name])
            results[name, fault] = outcome(job, fault)
    return results


@cache
def outcomes_on_two_ranks(slow: bool) -> dict[tuple[str, str], list[Outcome]]:
    """Return the outcomes of slow or fast tests: (name, fault) -> [outcome of rank 0, outcome of rank 1]."""
    by_rank = spawn(on_two_ranks, 2, slow)
    return {key: [results[key] for results in by_rank] for key in by_rank[0]}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_remains_at_the_last_good_step(name, fault):
    with joined() as ranks:
        result = outcome(fsdp(ranks, Layout(), ONE_RANK[name]), fault)
    check_later_steps_are_skipped(result)
    is_finite = fault == "gradient" and name != "meta"  # after a trial move along NaN gradients the loss is NaN
    assert np.isfinite(result.losses).tolist() == [True, True, is_finite, True]
    assert result.states[-1]["steps"].tolist() == [FINITE_STEPS] * len(result.states[-1]["steps"])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in (*TWO_RANKS, *ZERO)]
)
def test_two_ranks_remain_at_the_last_good_step(name, fault):
    """The fault is on the last rank only; at stages 1 to 3 DeepSpeed reports an infinite norm."""
    first, second = outcomes_on_two_ranks(name in SLOW)[name, fault]
    check_later_steps_are_skipped(first)
    check_later_steps_are_skipped(second)
    np.testing.assert_equal(first.norms, second.norms)


@pytest.mark.parametrize(
    "planted, fault", [(never_skipped, "loss"), (never_skipped, "gradient"), (loss_not_in_norm, "loss")]
)
def test_a_planted_fault_is_detected(planted, fault):
    with joined() as ranks, planted():
        result = outcome(fsdp(ranks, Layout(), {}), fault)
    with pytest.raises(AssertionError):
        check_later_steps_are_skipped(result)


def test_a_planted_synchronisation_is_detected():
    with pytest.raises(AssertionError, match="the host reads a tensor"), NoHostSynchronisation():
        float(torch.ones(()))
