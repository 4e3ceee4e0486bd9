"""A step is the same however it is cut: loss, gradient norm and every gradient, for one process and for two."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives import build_objective, build_token_dropout
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.parallel.apply import parallelise
from megatron.parallel.mesh import Processes
from megatron.training.feed import MicroBatches
from megatron.training.optimizer import build_optimizer
from megatron.training.step import reseed, train_step
from tests.distributed import joined, spawn

VOCABULARY, SEQ_LENGTH, GLOBAL_BATCH = Vocabulary(61), 16, 8
LEARNING_RATE, WEIGHT_DECAY = 0.1, 0.5
MODEL = dict(num_layers=2, hidden_size=16, num_attention_heads=2, add_bias_linear=True, init_method_std=0.2)


@dataclass(frozen=True)
class RandomText:
    """Samples by run position, as TrainSamples gives them; the same ones come again after `period`."""

    period: int

    def __getitem__(self, position: int) -> np.ndarray:
        draw = np.random.default_rng(position % self.period)
        return draw.integers(0, VOCABULARY.size, SEQ_LENGTH + 1)


class NothingMasked(MaskedDiffusion):
    """Masked diffusion that hides nothing in the second half of a step, so in all that a second process reads."""

    def time(self, position: int, seed: int) -> float:
        return 0.0 if position >= GLOBAL_BATCH // 2 else super().time(position, seed)


@dataclass(frozen=True)
class Case:
    """One step to take."""

    name: str = "mdm"
    token_dropout: float = 0.0
    samples: int = GLOBAL_BATCH  # fewer make the batch short
    nothing_masked: bool = False
    micro_batch: int = 4
    clip: float = 0.0
    period: int = 100
    model: dict = field(default_factory=dict)


CASES = {
    "ar": Case("ar"),
    "mdm": Case("mdm"),
    "ar-token-dropout": Case("ar", token_dropout=0.4),
    "ar-short": Case("ar", samples=5),
    "mdm-short": Case("mdm", samples=5),
    "mdm-padding-only": Case("mdm", samples=3),  # the second process gets padding and nothing else
    "mdm-nothing-masked": Case("mdm", nothing_masked=True),
    "mdm-untied": Case("mdm", model={"untie_embeddings_and_output_weights": True}),
    "mdm-clipped": Case("mdm", clip=0.05),
}
CUT = ("ar", "mdm", "ar-token-dropout", "mdm-short")  # two processes take these in several micro-batches too
# both processes read the same text, so only dropout can tell them apart
DROPOUT = Case("ar", period=4, model={"hidden_dropout": 0.3, "attention_dropout": 0.2})


@dataclass(frozen=True)
class Step:
    """What one process saw of a step; gradients (as the optimizer got them) and parameters are whole."""

    loss: float  # this process's share
    norm: float
    gradients: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def whole(parameters) -> dict[str, np.ndarray]:
    return {name: tensor.full_tensor().detach().numpy().copy() for name, tensor in parameters}


def take(processes: Processes, case: Case) -> Step:
    """Take one step from the initial weights."""
    config = ModelConfig(**MODEL | case.model)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=5)
    parallelise(model, processes, bf16=False, compile=False)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, weight_decay=WEIGHT_DECAY))
    settings = ObjectiveConfig(token_dropout=case.token_dropout, mask_eps=1e-9 if case.nothing_masked else 1e-3)
    objective = build_objective(case.name, settings, VOCABULARY, GLOBAL_BATCH)
    if case.nothing_masked:
        objective = NothingMasked(VOCABULARY.mask_id, GLOBAL_BATCH, settings.mask_eps)
    data = MicroBatches(
        RandomText(case.period),
        objective,
        build_token_dropout(case.name, settings, VOCABULARY),
        seed=7,
        first_sample=0,
        train_samples=case.samples,
        micro_batch_size=case.micro_batch,
        global_batch_size=GLOBAL_BATCH,
        rank=processes.rank,
        size=processes.size,
    )
    gradients, before = {}, whole(model.named_parameters())
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(whole((name, p.grad) for name, p in model.named_parameters()))
    )
    reseed(7, 0, processes.rank)
    batches = [data[index] for index in range(data.per_step)]
    result = train_step(model, optimizer, batches, processes, learning_rate=LEARNING_RATE, clip_grad=case.clip)
    return Step(float(result.loss), float(result.grad_norm), gradients, before, whole(model.named_parameters()))


@contextmanager
def patched(owner, name: str, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def noise_of_the_local_index():
    """All processes hide the same places: noise is keyed by the index inside the local batch."""
    prepare = MaskedDiffusion.prepare
    return patched(MaskedDiffusion, "prepare", lambda self, ids, at, seed: prepare(self, ids, np.arange(len(at)), seed))


def mean_of_local_means():
    """Each process divides by its own count, and the results are averaged."""
    return patched(Processes, "sum", lambda self, *values: [value * self.size for value in values])


def local_count():
    """The count is not summed over the processes."""
    return patched(Processes, "sum", lambda self, *values: list(values))


def local_norm():
    """The gradient norm is taken over this process's shards and not reduced."""

    def clip(parameters, limit):
        shards = [p.grad.to_local() for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(shard) for shard in shards]))
        for shard in shards:
            shard.mul_(min(1.0, limit / (float(norm) + 1e-6)))
        return norm

    return patched(torch.nn.utils, "clip_grad_norm_", clip)


def dropout_shared_by_ranks():
    keyed = reseed
    return patched(sys.modules[__name__], "reseed", lambda seed, iteration, rank: keyed(seed, iteration, 0))


PLANTED = [
    (noise_of_the_local_index, "mdm"),
    (mean_of_local_means, "mdm-short"),
    (mean_of_local_means, "ar-short"),
    (local_count, "mdm"),
    (local_count, "ar"),
    (local_count, "ar-short"),
    (local_norm, "mdm"),
    (local_norm, "mdm-clipped"),
]


def two_processes(processes: Processes) -> dict:
    """Return all steps that this module asks of two processes, by what is unusual about them."""
    steps = {name: take(processes, case) for name, case in CASES.items()}
    steps |= {(name, "cut"): take(processes, replace(CASES[name], micro_batch=2)) for name in CUT}
    for fault, name in PLANTED:
        with fault():
            steps[name, fault.__name__] = take(processes, CASES[name])
    steps["dropout"], steps["dropout", "again"] = take(processes, DROPOUT), take(processes, DROPOUT)
    with dropout_shared_by_ranks():
        steps["dropout", "shared"] = take(processes, DROPOUT)
    return steps


@pytest.fixture(scope="module")
def two():
    """The steps of two processes: name -> [step of rank 0, step of rank 1]."""
    ranks = spawn(two_processes, 2)
    return {name: [steps[name] for steps in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def one():
    """The steps of one process: name -> [step]."""
    with joined() as processes:
        steps = {name: [take(processes, case)] for name, case in CASES.items()}
        for micro_batch in (1, 8):
            for name, case in CASES.items():
                steps[name, micro_batch] = [take(processes, replace(case, micro_batch=micro_batch))]
    return steps


def check_equal(expected: list[Step], found: list[Step]) -> None:
    """Check that two ways to cut a step give the same loss, norm and gradients; each is a list over processes."""
    loss, norm = (sum(step.loss for step in expected), expected[0].norm)
    assert sum(step.loss for step in found) == pytest.approx(loss, rel=1e-6)
    for step in found:
        assert step.norm == pytest.approx(norm, rel=1e-5)
        assert step.gradients.keys() == expected[0].gradients.keys()
        for name, gradient in expected[0].gradients.items():
            np.testing.assert_allclose(step.gradients[name], gradient, rtol=1e-5, atol=1e-6 * norm, err_msg=name)


def check_dropout_differs(ranks: list[Step]) -> None:
    assert ranks[0].loss != ranks[1].loss, "two processes dropped the same units"


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(one, name):
    assert one[name][0].norm > 0.1
    check_equal(one[name], one[name, 1])
    check_equal(one[name], one[name, 8])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_step_of_one(one, two, name):
    check_equal(one[name], two[name])
    if name in CUT:
        check_equal(one[name], two[name, "cut"])


@pytest.mark.parametrize("fault, name", PLANTED)
def test_a_planted_fault_is_found(one, two, fault, name):
    with pytest.raises(AssertionError):
        check_equal(one[name], two[name, fault.__name__])


def test_clipping_uses_the_global_norm(one, two):
    free, clip = one["mdm"][0], CASES["mdm-clipped"].clip
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in free.gradients.values()))
    assert norm > 2 * clip
    for step in (*one["mdm-clipped"], *two["mdm-clipped"]):
        assert step.norm == pytest.approx(norm, rel=1e-5)
        for name, gradient in free.gradients.items():
            np.testing.assert_allclose(step.gradients[name], gradient * clip / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ar", "mdm-untied", "mdm-clipped"])
def test_the_update_is_adamw_with_decay_on_matrices_only(one, two, name):
    for step in (*one[name], *two[name]):
        for parameter, before in step.before.items():
            decay = WEIGHT_DECAY if before.ndim == 2 else 0.0
            gradient = step.gradients[parameter]
            # both moments of the first step, corrected for their start, are the gradient and its square
            expected = before * (1 - LEARNING_RATE * decay) - LEARNING_RATE * gradient / (np.abs(gradient) + 1e-8)
            np.testing.assert_allclose(step.after[parameter], expected, rtol=1e-4, atol=1e-5, err_msg=parameter)


def test_dropout_differs_between_processes_and_comes_again(two):
    check_dropout_differs(two["dropout"])
    assert [step.loss for step in two["dropout"]] == [step.loss for step in two["dropout", "again"]]
    with pytest.raises(AssertionError):
        check_dropout_differs(two["dropout", "shared"])


def test_the_ambient_generator_is_keyed_by_seed_iteration_and_rank():
    def draw(*key) -> float:
        reseed(*key)
        return float(torch.rand(()))

    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 1, 1) == draw(1, 1, 1)


def fail_on_the_second(processes: Processes) -> None:
    if processes.rank == 1:
        raise ValueError("as planted")
    torch.distributed.barrier()


def test_a_failing_process_is_named():
    with pytest.raises(RuntimeError, match="(?s)^error of process 1\n.*as planted"):
        spawn(fail_on_the_second, 2)
