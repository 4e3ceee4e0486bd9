"""DeepSpeed against FSDP2: the same losses, norms, parameters and moments, and checkpoints that both engines read."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective
from megatron.parallel.apply import build_engine
from megatron.parallel.deepspeed import DeepSpeedEngine, import_deepspeed
from megatron.parallel.deepspeed_config import deepspeed_config
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.recompute import recompute
from megatron.training.checkpoint_store import CheckpointStore, load_checkpoint
from megatron.training.microbatches import MicroBatches
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.saver import Saver
from megatron.training.step import train_step
from tests.conftest import ROOT, environment
from tests.distributed import joined, spawn
from tests.steps import GLOBAL_BATCH, VOCABULARY, RandomText, batches_of_step

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# an MLP width of 63 is not divisible by the world size; some biases have zero gradients, and with Adam's usual epsilon
# rounding errors alone would move them
MODEL = dict(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=63, init_method_std=0.2)
BIASES, UNTIED = {"add_bias_linear": True}, {"untie_embeddings_and_output_weights": True}
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.5, clip_grad=0.05, adam_eps=1e-3)
DECAY = 50  # weight decay / learning rate of the step
SMALL = {"reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0, "sub_group_size": 1500}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Case:
    """A training run, without the engine."""

    objective: str = "mdm"
    model: dict = field(default_factory=dict)
    micro_batch: int = 2
    steps: int = 3
    bf16: bool = False
    clip: float = 0.05
    recompute: str | None = None


CASES = {
    "ar": Case("ar", BIASES),
    "mdm-untied": Case("mdm", BIASES | UNTIED),
    "mdm-one-micro-batch": Case("mdm", micro_batch=4),
    "ar-untied-unclipped": Case("ar", UNTIED, micro_batch=1, clip=0.0),
    "ar-full-recompute": Case("ar", BIASES, recompute="full"),
    "mdm-selective-recompute": Case("mdm", recompute="selective"),
    "mdm-loops": Case("mdm", BIASES | {"num_loops": 3}),
    "curve": Case("mdm", steps=10),
    # a weight that rounds the other way changes all later steps: one step is exact, a curve is close
    "bf16": Case("mdm", steps=1, bf16=True),
    "bf16-curve": Case("ar", UNTIED, steps=10, bf16=True),
}
# case, ZeRO stage, and settings that a DeepSpeed configuration file adds
VARIANTS = {
    "offload-1": ("ar", 1, OFFLOAD),
    "offload-2": ("mdm-untied", 2, OFFLOAD),
    "offload-3": ("mdm-untied", 3, OFFLOAD | {"offload_param": {"device": "cpu"}}),
    "offload-2-bf16": ("bf16", 2, OFFLOAD),
    "small-pieces-1": ("mdm-untied", 1, {"reduce_bucket_size": 500, "allgather_bucket_size": 700}),
    "small-pieces-2": ("mdm-untied", 2, {"reduce_bucket_size": 500, "overlap_comm": True}),
    "all-reduce-2": ("ar", 2, {"reduce_scatter": False, "contiguous_gradients": False}),
    "small-pieces-3": ("ar", 3, SMALL),
}
# the cases of each stage that are fast tests; the others are slow ones
FAST = {
    0: ("ar",),
    1: ("ar", "mdm-untied", "ar-untied-unclipped", "ar-full-recompute", "bf16-curve"),
    2: ("ar", "mdm-untied"),
    3: ("ar", "mdm-untied", "mdm-loops", "bf16", "curve"),
}
FAST_VARIANTS = ("offload-2-bf16", "offload-3", "small-pieces-3")
MOVED = Case("mdm", BIASES, steps=4)  # half of it in one engine, half in the other


@dataclass(frozen=True)
class Trace:
    """The results of a run; tensors are gathered and have the names of a checkpoint."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, np.ndarray]
    nll: np.ndarray  # [B, S] of the first micro-batch, after the last step


class Fsdp2:
    """The reference engine."""

    def __init__(self, ranks: ParallelContext, case: Case, source: Path | None):
        optimizer = OptimizerConfig(**vars(OPTIMIZER) | {"clip_grad": case.clip})
        config, parallel = ModelConfig(**MODEL | case.model), ParallelConfig()
        self.ranks, self.clip = ranks, case.clip
        self.engine = build_engine(config, VOCABULARY, ranks, parallel, seed=5, bf16=case.bf16, compile=False)
        self.optimizer = build_optimizer(self.engine, optimizer)
        start_state(self.optimizer, case.steps // 2 if source else 0)
        if source:
            load_checkpoint(source, self.tensors())

    def step(self, batches, rate: float):
        rates = {"learning_rate": rate, "weight_decay": DECAY * rate, "clip_grad": self.clip}
        result = train_step(self.engine, self.optimizer, batches, **rates)
        return result.loss, result.grad_norm

    def tensors(self):
        return self.engine.tensors(self.optimizer)


class Zero:
    """The engine under test, at one ZeRO stage."""

    def __init__(self, ranks: ParallelContext, case: Case, source: Path | None, stage: int, section=None):
        optimizer = OptimizerConfig(**vars(OPTIMIZER) | {"clip_grad": case.clip})
        training = SimpleNamespace(micro_batch_size=case.micro_batch, global_batch_size=GLOBAL_BATCH)
        sizes = {"world_size": ranks.size, "bf16": case.bf16, "zero_stage": stage}
        settings = deepspeed_config(None, training, optimizer, **sizes)
        settings["zero_optimization"] |= section or {}
        model = build(case)
        recompute(model, ParallelConfig(recompute_granularity=case.recompute))
        self.ranks, self.clip, self.optimizer = ranks, case.clip, build_optimizer(model, optimizer)
        self.engine = DeepSpeedEngine(model, self.optimizer, settings, ranks, compile=False)
        if source:
            state = self.tensors()
            load_checkpoint(source, state)
            self.engine.load(state, case.steps // 2)

    def step(self, batches, rate: float):
        (count,) = self.ranks.sum(sum(batch.count for batch in batches))
        loss = self.engine.backward(batches, count)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, DECAY * rate * group["decays"]
        return loss, self.engine.update(self.optimizer, self.clip)

    def tensors(self):
        return self.engine.tensors(self.optimizer)


class Unscaled(Zero):
    """A planted fault: the loss is not scaled for the average over the data-parallel ranks."""

    def step(self, batches, rate: float):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vars(self.ranks), "data_size", 1)  # in place of the cached one
            return super().step(batches, rate)


def build(case: Case) -> Transformer:
    config = ModelConfig(**MODEL | case.model)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=5)
    return model


def batches_of(case: Case, rank: int, size: int) -> MicroBatches:
    settings = ObjectiveConfig(objective=case.objective)
    return MicroBatches(
        RandomText(100),
        build_objective(settings, VOCABULARY, GLOBAL_BATCH),
        build_input_noise(settings, VOCABULARY, num_layers=2),
        seed=7,
        first_sample=0,
        train_samples=case.steps * GLOBAL_BATCH - 3,  # the last batch is short
        micro_batch_size=case.micro_batch,
        global_batch_size=GLOBAL_BATCH,
        rank=rank,
        size=size,
    )


def train(engine, case: Case, steps: range) -> Trace:
    ranks, losses, norms = engine.ranks, [], []
    data = batches_of(case, ranks.rank, ranks.size)
    for step in steps:
        batches = batches_of_step(data, step)
        loss, norm = engine.step(batches, 1e-2 * (1 + step % 3))
        losses.append(ranks.sum(float(loss))[0])
        norms.append(float(norm))
    state = {name: tensor.full_tensor().numpy().copy() for name, tensor in engine.tensors().items()}
    engine.engine.eval()
    with torch.no_grad():
        nll = engine.engine.nll(batches_of(case, 0, 1)[0][0]).numpy().copy()
    engine.engine.train()
    engine.engine.reshard()
    return Trace(losses, norms, state, nll)


def save(engine, folder: Path, case: Case) -> None:
    with Saver(folder, engine.ranks) as saver:
        saver.save(engine.tensors(), {"iteration": case.steps // 2}, then=lambda: None)


def slow_cases(ranks: ParallelContext) -> dict:
    """Return the traces with two ranks that are neither in FAST nor in FAST_VARIANTS."""
    cases = [(name, stage) for stage in STAGES for name in CASES if name not in FAST[stage]]
    traces = {
        (name, stage): train(Zero(ranks, CASES[name], None, stage), CASES[name], range(CASES[name].steps))
        for name, stage in cases
    }
    return traces | {name: variant(ranks, name) for name in VARIANTS if name not in FAST_VARIANTS}


def variant(ranks: ParallelContext, name: str) -> Trace:
    case, stage, section = VARIANTS[name]
    return train(Zero(ranks, CASES[case], None, stage, section), CASES[case], range(CASES[case].steps))


def two_ranks(ranks: ParallelContext, folder: Path) -> dict:
    """Return the traces of all other runs with two ranks."""
    first_half, second_half = range(MOVED.steps // 2), range(MOVED.steps // 2, MOVED.steps)
    runs = {}
    for stage in STAGES:
        for name in FAST[stage]:
            case = CASES[name]
            runs[name, stage] = train(Zero(ranks, case, None, stage), case, range(case.steps))
        engine = Zero(ranks, MOVED, None, stage)
        train(engine, MOVED, first_half)
        save(engine, folder / f"zero-{stage}", MOVED)
        moved = Zero(ranks, MOVED, CheckpointStore(folder / "fsdp2").complete()[0], stage)
        runs["moved", stage] = train(moved, MOVED, second_half)
        broken = Zero(ranks, CASES["ar"], None, stage)
        with torch.no_grad():
            broken.engine._write("norm.weight", torch.full((16,), float("nan")))
        runs["broken", stage] = train(broken, CASES["ar"], range(1))
    runs |= {name: variant(ranks, name) for name in FAST_VARIANTS}
    runs["planted"] = train(Unscaled(ranks, CASES["ar"], None, 1), CASES["ar"], range(3))
    return runs


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The traces of one rank with FSDP2, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with joined() as ranks:
        runs = {name: train(Fsdp2(ranks, case, None), case, range(case.steps)) for name, case in CASES.items()}
        curve = replace(CASES["bf16-curve"], bf16=False)
        # with stage 3 of DeepSpeed the last block computes all positions, and bf16 rounds differently
        unselected = Fsdp2(ranks, CASES["bf16"], None)
        unselected.engine.models[0].selects_scored_positions = False
        runs["bf16", 3] = train(unselected, CASES["bf16"], range(CASES["bf16"].steps))
        runs["fp32-curve"] = train(Fsdp2(ranks, curve, None), curve, range(curve.steps))
        runs["moved"] = train(Fsdp2(ranks, MOVED, None), MOVED, range(MOVED.steps))
        engine = Fsdp2(ranks, MOVED, None)
        train(engine, MOVED, range(MOVED.steps // 2))
        save(engine, folder / "fsdp2", MOVED)
    return runs | {"folder": folder}


@pytest.fixture(scope="module")
def two(single):
    """The traces of two ranks with DeepSpeed in fast tests."""
    return equal_traces(*spawn(two_ranks, 2, single["folder"]))


@pytest.fixture(scope="module")
def two_slow():
    """The traces of two ranks with DeepSpeed in slow tests only."""
    return equal_traces(*spawn(slow_cases, 2))


def equal_traces(first: dict, second: dict) -> dict:
    """Return the traces of two ranks, whose losses and norms must be equal."""
    for name in first:
        np.testing.assert_equal(first[name].losses, second[name].losses)
        np.testing.assert_equal(first[name].norms, second[name].norms)
    return first


def checks(*names: str) -> list:
    """Return (fixture, case, ZeRO stage) of tests of some cases."""
    pairs = [(name, stage) for name in names for stage in STAGES]
    return [parameter_set(name in FAST[stage], name, stage) for name, stage in pairs]


def parameter_set(is_fast: bool, *values):
    """Return the name of the fixture with the traces of a fast or a slow test, and its other parameters."""
    return pytest.param("two" if is_fast else "two_slow", *values, marks=[pytest.mark.slow] * (not is_fast))


def tolerances(case: str) -> dict[str, float]:
    """Return the tolerances of `check_equal` for a case of a few steps.

    DeepSpeed rounds every micro-batch's gradients to the compute dtype. So does FSDP2 before torch 2.15.
    """
    if CASES[case].bf16 and torch.__version__ >= "2.15":
        return {"rel": 1e-4, "moments": 2**-7}  # of bf16, with 8 bits; a second moment is a square
    return {}


def check_equal(trace: Trace, expected: Trace, rel: float = 1e-5, moments: float = 1e-5) -> None:
    assert trace.losses == pytest.approx(expected.losses[-len(trace.losses) :], rel=rel)
    assert trace.norms == pytest.approx(expected.norms[-len(trace.norms) :], rel=10 * rel)
    assert list(trace.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert trace.tensors[name].dtype == np.float32
        atol = (rel if name.startswith("model.") else moments) * np.abs(tensor).max()
        np.testing.assert_allclose(trace.tensors[name], tensor, rtol=0, atol=atol, err_msg=name)
    np.testing.assert_allclose(trace.nll, expected.nll, rtol=10 * rel, atol=10 * rel)


@installed
@pytest.mark.parametrize("traces, name, stage", checks(*(name for name in CASES if "curve" not in name)))
def test_three_steps_are_those_of_fsdp2(request, single, traces, name, stage):
    assert max(single[name].norms) > 2 * 0.05  # above the clipping limit
    expected = single.get((name, stage), single[name])
    check_equal(request.getfixturevalue(traces)[name, stage], expected, **tolerances(name))


@installed
@pytest.mark.parametrize("traces, name", [parameter_set(name in FAST_VARIANTS, name) for name in VARIANTS])
def test_settings_of_a_file_change_no_result(request, single, traces, name):
    case = VARIANTS[name][0]
    check_equal(request.getfixturevalue(traces)[name], single[case], **tolerances(case))


@installed
@pytest.mark.parametrize("traces, name, stage", checks("curve", "bf16-curve"))
def test_a_curve_of_ten_steps_is_that_of_fsdp2(request, single, traces, name, stage):
    losses = request.getfixturevalue(traces)[name, stage].losses
    assert len(losses) == 10
    assert losses == pytest.approx(single[name].losses, rel=5e-3 if name == "bf16-curve" else 1e-4)


@installed
@pytest.mark.parametrize("traces, name, stage", checks("bf16-curve"))
def test_a_curve_in_bf16_stays_near_the_one_in_fp32(request, single, traces, name, stage):
    losses = request.getfixturevalue(traces)[name, stage].losses
    assert losses == pytest.approx(single["fp32-curve"].losses, rel=1e-2)
    assert losses != pytest.approx(single["fp32-curve"].losses, rel=1e-5)  # something was rounded


@installed
def test_a_planted_fault_is_detected(single, two):
    with pytest.raises(AssertionError):
        check_equal(two["planted"], single["ar"])


@installed
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_moves_from_fsdp2_to_deepspeed(single, two, stage):
    check_equal(two["moved", stage], single["moved"])


@installed
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_moves_from_deepspeed_to_fsdp2(single, two, stage):
    source = CheckpointStore(single["folder"] / f"zero-{stage}").complete()[0]
    assert {path.suffix for path in source.iterdir()} == {".json", ".safetensors"}
    with joined() as ranks:
        moved = train(Fsdp2(ranks, MOVED, source), MOVED, range(MOVED.steps // 2, MOVED.steps))
    check_equal(moved, single["moved"])


@installed
@pytest.mark.parametrize("stage", STAGES)
def test_a_norm_that_is_not_finite_is_reported(two, stage):
    assert not np.isfinite(two["broken", stage].norms[0])


@pytest.mark.slow
@installed
def test_a_single_process_without_launcher_or_compiler(single, tmp_path):
    """No RANK, no LOCAL_RANK, no C++ compiler: with offload nothing is compiled, even at first use."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "uname", "env"):  # without c++, g++, clang++, ninja
        (tools / name).symlink_to(shutil.which(name))
    code = """
import json
from tests.distributed import joined
from tests.parallel.test_deepspeed import CASES, OFFLOAD, STAGES, Zero, train
with joined() as ranks:
    for stage in STAGES:
        zero = Zero(ranks, CASES["ar"], None, stage, OFFLOAD if stage else {})
        print(json.dumps(train(zero, CASES["ar"], range(3)).losses))
"""
    env = {name: value for name, value in environment().items() if name not in ("RANK", "LOCAL_RANK", "CXX")}
    env |= {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line) for line in done.stdout.splitlines()]  # nothing else is printed
    assert losses == [pytest.approx(single["ar"].losses, rel=1e-5)] * len(STAGES)
    assert not (tmp_path / "built").exists()


@installed
def test_a_key_that_deepspeed_does_not_know_is_refused():
    with joined() as ranks, pytest.raises(ConfigurationError, match="refuses its configuration.*stge"):
        Zero(ranks, CASES["ar"], None, 1, {"stge": 2})


def test_without_deepspeed_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    with pytest.raises(ConfigurationError, match="^--deepspeed: .*; install it: bash install.sh --with-deepspeed$"):
        import_deepspeed(torch.device("cpu"))


@installed
def test_a_deepspeed_that_does_not_import_is_named_with_its_versions(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text("import torch\ntorch.of_another_version\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(ConfigurationError) as caught:
        import_deepspeed(torch.device("cpu"))
    assert str(caught.value) == (
        f"--deepspeed: DeepSpeed {version('deepspeed')} does not import with torch {torch.__version__} "
        "(module 'torch' has no attribute 'of_another_version'); install the versions in constraints.txt, or leave it "
        "out for FSDP2"
    )
