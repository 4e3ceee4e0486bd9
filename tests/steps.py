"""One training step from the same initial weights in any layout, and the comparison of two such steps."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron.batch import Batch
from megatron.config.parametrization import Parametrization
from megatron.config.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.distillation import Distillation
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.documents import DocumentRules
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.registry import build_objective
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.meta_gradient import MetaGradient
from megatron.parallel.teachers import build_teacher
from megatron.training.microbatches import MicroBatches
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.step import reseed, train_step

VOCABULARY, SEQ_LENGTH, GLOBAL_BATCH = Vocabulary(61), 18, 8
LEARNING_RATE, WEIGHT_DECAY = 0.1, 0.5
LOSS_TOLERANCE = 1e-6  # relative, of a step in fp32 in two layouts; docs/checkpoints.md states it
CURVE_STEPS = 10
DATA_PARALLEL = ParallelConfig()  # alone
MODEL = dict(num_layers=2, hidden_size=16, num_attention_heads=2, add_bias_linear=True, init_method_std=0.2)


@dataclass(frozen=True)
class RandomText:
    """Random samples by sample index, in the form of TrainSamples; they repeat after `period` samples."""

    period: int

    def __getitem__(self, sample_index: int) -> np.ndarray:
        generator = np.random.default_rng(sample_index % self.period)
        return generator.integers(0, VOCABULARY.size, SEQ_LENGTH + 1)


class NothingMasked(MaskedDiffusion):
    """Masked diffusion that masks nothing in the second half of a step, which is all that a second rank reads."""

    def time(self, sample_index: int, seed: int) -> float:
        return 0.0 if sample_index >= GLOBAL_BATCH // 2 else super().time(sample_index, seed)


@dataclass(frozen=True)
class Case:
    """One training step, without the layout."""

    name: str = "mdm"
    options: dict = field(default_factory=dict)  # of the objective
    documents: DocumentRules | None = None
    samples: int = GLOBAL_BATCH  # below GLOBAL_BATCH: a short batch
    nothing_masked: bool = False
    micro_batch: int = 4
    clip: float = 0.0
    period: int = 100
    model: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    teachers: tuple[dict, ...] = ()  # their models, as far as they differ from MODEL

    @property
    def meta_gradient(self) -> MetaGradient | None:
        """The trial move at the peak learning rate."""
        return MetaGradient.at(OptimizerConfig(**self.optimizer), OptimizerConfig.lr)


@dataclass(frozen=True)
class Step:
    """The results of a step on one rank; gradients (as the optimizer got them) and parameters are gathered.

    With pipeline parallelism they are those of the rank's stages only.
    """

    loss: float  # this rank's share
    norm: float
    gradients: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def whole(parameters) -> dict[str, np.ndarray]:
    """Return copies of the gathered DTensors of (name, DTensor) pairs."""
    return {name: tensor.full_tensor().detach().numpy().copy() for name, tensor in parameters}


def build(
    ranks: ParallelContext,
    case: Case,
    parallel: ParallelConfig,
    steps: int = 1,
    bf16: bool = False,
    compile: bool = False,
    fp8_recipe: str | None = None,
):
    """Return the engine with its initial weights, its optimizer and its data for `steps` steps."""
    config = ModelConfig(**MODEL | case.model)
    engine = build_engine(
        config, VOCABULARY, ranks, parallel, seed=5, bf16=bf16, compile=compile, fp8_recipe=fp8_recipe
    )
    settings = OptimizerConfig(lr=1.0, weight_decay=WEIGHT_DECAY, **case.optimizer)
    optimizer = build_optimizer(engine, settings, Parametrization.of(config))
    if case.teachers:
        states = tuple(frozen(ranks, {**MODEL, **own}, parallel, bf16).teacher_states for own in case.teachers)
        engine.models[0].distillation = Distillation(states, weight=0.6, temperature=1.5)
    start_state(optimizer, 0)
    eps = 1e-9 if case.nothing_masked else 1e-3
    settings = ObjectiveConfig(objective=case.name, mask_eps=eps, **case.options)
    objective = build_objective(settings, VOCABULARY, GLOBAL_BATCH, case.documents)
    if case.nothing_masked:
        objective = NothingMasked(VOCABULARY.mask_id, GLOBAL_BATCH, settings.mask_eps)
    data = MicroBatches(
        RandomText(case.period),
        objective,
        build_input_noise(settings, VOCABULARY, config.depth),
        seed=7,
        first_sample=0,
        train_samples=case.samples + (steps - 1) * GLOBAL_BATCH,
        micro_batch_size=case.micro_batch,
        global_batch_size=GLOBAL_BATCH,
        rank=ranks.data_rank,
        size=ranks.data_size,
    )
    return engine, optimizer, data


def frozen(ranks: ParallelContext, model: dict, parallel: ParallelConfig, bf16: bool = False) -> Transformer:
    """Return a teacher with the weights that a new model of seed 9 has."""
    config = ModelConfig(**model)
    whole_model = Transformer(config, VOCABULARY)
    initialise(whole_model, config, 9)
    weights = dict(whole_model.named_parameters())
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = build_teacher(config, VOCABULARY, ranks, parallel, dtype=dtype)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            weight = weights[name].detach().to(dtype)
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(weight)
    return teacher


def batches_of_step(data: MicroBatches, step: int) -> list[Batch]:
    """Return this rank's micro-batches of one step."""
    return [batch for index in range(data.per_step) for batch in data[step * data.per_step + index]]


def take(ranks: ParallelContext, case: Case, parallel: ParallelConfig = DATA_PARALLEL) -> Step:
    """Return the results of one step from the initial weights."""
    engine, optimizer, data = build(ranks, case, parallel)
    gradients, before = {}, whole(engine.named_parameters())
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(whole((name, p.grad) for name, p in engine.named_parameters()))
    )
    reseed(7, 0, ranks)
    rates = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "meta_gradient": case.meta_gradient}
    result = train_step(engine, optimizer, batches_of_step(data, 0), **rates, clip_grad=case.clip)
    return Step(float(result.loss), float(result.grad_norm), gradients, before, whole(engine.named_parameters()))


def curve(
    ranks: ParallelContext, case: Case, parallel: ParallelConfig = DATA_PARALLEL, bf16: bool = False
) -> np.ndarray:
    """Return this rank's shares of the losses of CURVE_STEPS steps, [steps]."""
    engine, optimizer, data = build(ranks, case, parallel, CURVE_STEPS, bf16)
    assert all(parameter.dtype == torch.float32 for parameter in engine.parameters())  # master weights
    losses, rates = [], {"learning_rate": 1e-2, "weight_decay": WEIGHT_DECAY}
    for step in range(CURVE_STEPS):
        reseed(7, step, ranks)
        batches = batches_of_step(data, step)
        losses.append(float(train_step(engine, optimizer, batches, **rates, clip_grad=1.0).loss))
    return np.array(losses)


@contextmanager
def patched(owner, name: str, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def check_equal(expected: list[Step], steps: list[Step]) -> None:
    """Check that a step has the same loss, norm and gradients in two layouts; the lists are over ranks."""
    loss, norm = (sum(step.loss for step in expected), expected[0].norm)
    assert sum(step.loss for step in steps) == pytest.approx(loss, rel=LOSS_TOLERANCE)
    for step in steps:
        assert step.norm == pytest.approx(norm, rel=1e-5)
        assert step.gradients.keys() == expected[0].gradients.keys()
        for name, gradient in expected[0].gradients.items():
            np.testing.assert_allclose(step.gradients[name], gradient, rtol=1e-5, atol=1e-6 * norm, err_msg=name)


def dropout_shared_by_ranks():
    """Patch `reseed` so that all ranks have the same dropout masks."""
    original = reseed
    return patched(
        sys.modules[__name__], "reseed", lambda seed, iteration, _: original(seed, iteration, SimpleNamespace(rank=0))
    )
