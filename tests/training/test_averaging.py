"""Averaged weights against a few lines of arithmetic: after steps, in evaluations, over a resume."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.config.sections import OptimizerConfig, ParallelConfig
from megatron.training.averaging import Average, start_average
from megatron.training.checkpoint_store import load_checkpoint
from megatron.training.optimizer import start_state
from megatron.training.saver import Saver, folder_name
from megatron.training.step import train_step
from tests.distributed import joined
from tests.steps import GLOBAL_BATCH, Case, batches_of_step, build, patched, whole

STEPS, BEGIN = 6, 3 * GLOBAL_BATCH  # the mean starts with the third step
KINDS = {"ema": {"ema_decay": 0.8}, "mean": {"average_from_samples": BEGIN}}


class Training:
    """A training run with averaged weights; `weights` are the model weights at the start and after each step."""

    def __init__(self, ranks, kind: str, origin=None):
        self.engine, self.optimizer, self.data = build(ranks, Case("ar"), ParallelConfig(), STEPS)
        self.config, self.ranks = OptimizerConfig(**KINDS[kind]), ranks
        if origin:
            start_state(self.optimizer, origin.meta["iteration"])
            load_checkpoint(origin.checkpoint, self.engine.tensors(self.optimizer))
        self.average = start_average(self.engine, self.config, origin)
        self.weights = [self._weights()]

    def _weights(self) -> dict[str, np.ndarray]:
        return {name: weights.astype(np.float64) for name, weights in whole(self.engine.named_parameters()).items()}

    def run(self, steps: range, *, average_first: bool = False) -> "Training":
        for step in steps:
            batches = batches_of_step(self.data, step)
            if average_first:
                self.average.update((step + 1) * GLOBAL_BATCH)
            train_step(self.engine, self.optimizer, batches, learning_rate=0.05, weight_decay=0.1, clip_grad=1.0)
            if not average_first:
                self.average.update((step + 1) * GLOBAL_BATCH)
            self.weights.append(self._weights())
        return self

    def save(self, folder: Path, steps: int) -> SimpleNamespace:
        """Write a checkpoint, and return it as `find_origin` would."""
        settings = {"ema_decay": self.config.ema_decay, "average_from_samples": self.config.average_from_samples}
        meta = {"iteration": steps, "averaged_steps": self.average.steps, "config": {"optimizer": settings}}
        with Saver(folder, self.ranks) as saver:
            saver.save(self.engine.tensors(self.optimizer) | self.average.tensors(), meta, then=lambda: None)
        return SimpleNamespace(checkpoint=folder / folder_name(steps), meta=meta)


def expected(weights: list[dict], kind: str) -> dict[str, np.ndarray]:
    if kind == "mean":
        return {name: np.mean([step_weights[name] for step_weights in weights[3:]], axis=0) for name in weights[0]}
    average = weights[0]
    for step_weights in weights[1:]:
        average = {name: 0.8 * average[name] + 0.2 * step_weights[name] for name in average}
    return average


def check(training: Training, kind: str) -> None:
    for name, average in expected(training.weights, kind).items():
        tensor = training.average.tensors()[f"average.{name}"].full_tensor().numpy()
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, average, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def ranks():
    with joined() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def uninterrupted(ranks):
    return {kind: Training(ranks, kind).run(range(STEPS)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_a_few_lines(uninterrupted, kind):
    check(uninterrupted[kind], kind)
    assert uninterrupted[kind].average.steps == {"ema": 6, "mean": 4}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_taken_before_the_step_is_found(ranks, kind):
    early = Training(ranks, kind).run(range(STEPS), average_first=True)
    with pytest.raises(AssertionError):
        check(early, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_weights_are_the_average_and_come_back_to_the_bit(ranks, kind):
    training = Training(ranks, kind).run(range(4))
    engine, average = training.engine, training.average
    before, averaged_before = whole(engine.named_parameters()), whole(average.tensors().items())

    def losses():
        with torch.no_grad():
            nll = engine.nll(training.data[0][0]).numpy().copy()
        engine.reshard()
        return nll

    raw = losses()
    with pytest.raises(RuntimeError, match="planted"), average.swapped():
        inside = whole(engine.named_parameters())
        averaged = losses()
        raise RuntimeError("planted")
    for name in before:
        np.testing.assert_array_equal(inside[name], averaged_before[f"average.{name}"])
    assert np.abs(averaged - raw).max() > 1e-3
    np.testing.assert_array_equal(losses(), raw)
    np.testing.assert_equal(whole(engine.named_parameters()), before)
    np.testing.assert_equal(whole(average.tensors().items()), averaged_before)


def resumed(ranks, kind: str, folder: Path, stop: int) -> dict[str, np.ndarray]:
    """Return the average of a training run that was stopped after `stop` steps and resumed."""
    origin = Training(ranks, kind).run(range(stop)).save(folder, stop)
    return whole(Training(ranks, kind, origin).run(range(stop, STEPS)).average.tensors().items())


@pytest.mark.parametrize("kind, stop", [("ema", 3), ("mean", 2), ("mean", 4)])  # before and after the mean starts
def test_a_resumed_average_is_the_same_to_the_bit(ranks, uninterrupted, kind, stop, tmp_path):
    unstopped = whole(uninterrupted[kind].average.tensors().items())
    np.testing.assert_equal(resumed(ranks, kind, tmp_path, stop), unstopped)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_is_not_restored_is_found(ranks, kind, uninterrupted, tmp_path):
    with patched(Average, "resume", lambda self, origin: None), pytest.raises(AssertionError):
        test_a_resumed_average_is_the_same_to_the_bit(ranks, uninterrupted, kind, 4, tmp_path)


def test_a_branch_with_another_average_begins_at_its_weights(ranks, tmp_path):
    origin = Training(ranks, "ema").run(range(3)).save(tmp_path, 3)
    branch = Training(ranks, "mean", origin)
    assert branch.average.steps == 0
    for name, weights in whole(branch.engine.named_parameters()).items():
        np.testing.assert_array_equal(whole(branch.average.tensors().items())[f"average.{name}"], weights)
