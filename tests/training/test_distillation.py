"""Training runs with teachers: the plain formula for every objective, what is recorded, resumed and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.config.sections import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.distillation import Distillation
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.registry import OBJECTIVES, build_objective
from megatron.parallel.apply import build_engine
from megatron.parallel.teachers import build_teacher
from megatron.training.checkpoint_store import CheckpointStore
from tests.conftest import records, run
from tests.distributed import joined

VOCABULARY, SEQ_LENGTH = Vocabulary(50), 16
SIZES = [dict(num_layers=2, hidden_size=16), dict(num_layers=1, hidden_size=24), dict(num_layers=3, hidden_size=8)]
CONFIGS = [ModelConfig(**size, num_attention_heads=2, init_method_std=0.3) for size in SIZES]
WEIGHT, TEMPERATURE = 0.7, 2.0


def plain_model(index: int, seed: int) -> Transformer:
    model = Transformer(CONFIGS[index], VOCABULARY)
    initialise(model, CONFIGS[index], seed)
    return model


def log_probabilities(model: Transformer, batch, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-softmax of all positions, [B, T, V]."""
    logits = F.linear(model.hidden_states(batch), model.lm_weight())[..., : VOCABULARY.size]
    return (logits / temperature).log_softmax(-1)


def plain_loss(student: Transformer, teachers: list[Transformer], batch) -> torch.Tensor:
    """Return the formula of the page over full logits, without chunks, positions or shards."""
    with torch.no_grad():
        mean = sum(log_probabilities(teacher, batch, TEMPERATURE).exp() for teacher in teachers) / len(teachers)
    nll = -log_probabilities(student, batch).gather(-1, batch.targets.clamp(max=VOCABULARY.size - 1)[..., None])[..., 0]
    divergence = (mean * (mean.log() - log_probabilities(student, batch, TEMPERATURE))).sum(-1)
    losses = (1 - WEIGHT) * nll + WEIGHT * TEMPERATURE**2 * divergence
    return (batch.weights * losses).sum()


@pytest.fixture
def ranks():
    with joined() as ranks:
        yield ranks


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_equals_the_plain_formula(ranks, name, num_teachers):
    ids = np.random.default_rng(3).integers(0, VOCABULARY.size, (4, SEQ_LENGTH + 1))
    batch = build_objective(ObjectiveConfig(objective=name), VOCABULARY, 8).prepare(ids, np.arange(4), 1)
    teachers = [plain_model(index, seed=index) for index in range(1, 1 + num_teachers)]
    states = []
    for teacher in teachers:
        built = build_teacher(teacher.config, VOCABULARY, ranks, ParallelConfig(), dtype=torch.float32)
        built.load_state_dict(teacher.state_dict())
        assert not built.training and not any(parameter.requires_grad for parameter in built.parameters())
        states.append(built.teacher_states)
    layout = {"seed": 0, "bf16": False, "compile": False}
    engine = build_engine(CONFIGS[0], VOCABULARY, ranks, ParallelConfig(), **layout)
    engine.models[0].distillation = Distillation(tuple(states), WEIGHT, TEMPERATURE)
    loss = engine.backward([batch], batch.count)
    student = plain_model(0, seed=0)
    expected = plain_loss(student, teachers, batch) / batch.count
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradients = {parameter: plain.grad for (parameter, plain) in student.named_parameters()}
    for parameter_name, parameter in engine.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[parameter_name], rtol=1e-5, atol=1e-6)
    engine.eval()  # validation has no soft targets
    nll = engine.nll(batch)
    assert torch.allclose((nll * batch.weights).sum(), engine.roots[0](batch).sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def teachers(tiny, tmp_path_factory):
    """Two finished runs of different sizes, the second with loops."""
    folder = tmp_path_factory.mktemp("teachers")
    run("mdm", *tiny, "--save", folder / "first")
    run("mdm", *tiny, "--hidden-size", 16, "--num-loops", 2, "--seed", 2, "--save", folder / "second")
    return [folder / "first", folder / "second"]


@pytest.fixture(scope="module")
def student(tiny, teachers, tmp_path_factory):
    """A finished student of both teachers."""
    folder = tmp_path_factory.mktemp("student")
    done = run("mdm", *tiny, "--seed", 3, "--teacher", *teachers, "--save", folder)
    return folder, done.stderr


def test_the_teachers_and_their_cost_are_recorded_and_announced(student, teachers):
    folder, log = student
    recorded = json.loads((folder / "config.json").read_text())
    own = [json.loads((teacher / "config.json").read_text()) for teacher in teachers]
    newest = [CheckpointStore.of_run(teacher).newest() for teacher in teachers]
    assert [Path(teacher["checkpoint"]) for teacher in recorded["teachers"]] == newest
    for teacher, config, path in zip(recorded["teachers"], own, teachers, strict=True):
        assert teacher["parameters"] == config["parameters"]
        assert teacher["flops"] == pytest.approx(records(path)[-1]["flops"] / 3)  # of the same samples
    assert recorded["teachers"][0]["flops"] == 2 * own[0]["parameters"] * 93 * 32
    assert "distillation from" in log and f"{sum(t['flops'] for t in recorded['teachers']):.3g} FLOPs" in log
    assert [record["flops"] for record in records(folder)] == [record["flops"] for record in records(teachers[0])]
    assert own[0]["teachers"] == []


def test_weight_0_equals_a_run_without_teachers(student, tiny, teachers, tmp_path):
    alone, with_teacher = tmp_path / "alone", tmp_path / "student"
    run("mdm", *tiny, "--seed", 3, "--save", alone)
    run("mdm", *tiny, "--seed", 3, "--teacher", teachers[1], "--distill-weight", 0, "--save", with_teacher)
    assert records(alone) == records(with_teacher)
    assert records(alone) != records(student[0])


@pytest.mark.slow
def test_a_student_in_other_layouts_has_the_losses_of_one_rank(student, tiny, teachers, tmp_path):
    flags = [*tiny, "--seed", 3, "--teacher", *teachers, "--micro-batch-size", 2]
    zero3 = ("--zero-stage", 3)
    layouts = {"tensor": ("--tensor-model-parallel-size", 2), "zero3": zero3, "deepspeed": ("--deepspeed", *zero3)}
    layouts["compiled"] = ("--compile",)
    for name, layout in layouts.items():
        run("mdm", *flags, *layout, "--save", tmp_path / name, processes=1 if name == "compiled" else 2)
        for expected, record in zip(records(student[0]), records(tmp_path / name), strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_resume_needs_the_same_weights_wherever_they_lie(student, tiny, teachers, tmp_path):
    copy, moved = tmp_path / "student", tmp_path / "moved"
    shutil.copytree(student[0], copy)
    shutil.copytree(teachers[0], moved)
    command = ["mdm", *tiny, "--seed", 3, "--save", copy, "--dry-run"]
    assert run(*command, "--teacher", moved, teachers[1]).returncode == 0
    for given in ([], ["--teacher", teachers[0]], ["--teacher", *reversed(teachers)]):
        refused = run(*command, *given, check=False)
        assert refused.returncode == 2 and "other weights than those that the run in" in refused.stderr
    refused = run(*command, "--teacher", *teachers, "--distill-weight", 0.4, check=False)
    assert refused.returncode == 2 and "was started with --distill-weight 0.5" in refused.stderr


REFUSED = {
    "--teacher {0} {0}": "is the same checkpoint as another teacher; name each teacher once",
    "--teacher nowhere": "nowhere: holds no run and is no checkpoint",
    "--teacher {0} --save {0}": "is the run that --save writes; name another run",
    "--teacher {0} --objective ar": "has objective mdm, and this run has ar; teacher and student must share it",
    "--teacher {0} --softmax-over-padding": "has --softmax-over-padding False, and this run has True",
    "--distill-weight 0.9": "does nothing without --teacher; give both or neither",
    "--distill-temperature 2": "does nothing without --teacher; give both or neither",
    "--teacher {0} --distill-weight 1.1": "--distill-weight 1.1: must be in [0, 1]",
    "--teacher {0} --distill-temperature 0": "--distill-temperature 0.0: must be",
    "--teacher {0} --pipeline-model-parallel-size 2": "its last stage would run every --teacher as a whole",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tiny, teachers, flags):
    done = run("mdm", *tiny, *flags.format(*teachers).split(), "--dry-run", check=False)
    assert done.returncode == 2
    assert REFUSED[flags] in done.stderr.strip().splitlines()[-1]


def test_a_teacher_that_does_not_fit_the_layout_is_named(tiny, teachers, tmp_path):
    narrow = tmp_path / "narrow"
    run("mdm", *tiny, "--num-attention-heads", 1, "--train-samples", 8, "--save", narrow)
    flags = [*tiny, "--teacher", narrow, "--tensor-model-parallel-size", 2, "--dry-run"]
    done = run("mdm", *flags, check=False)
    assert f"--teacher {narrow}: does not fit the layout: --tensor-model-parallel-size 2" in done.stderr
