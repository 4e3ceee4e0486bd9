"""The teachers of a distillation: opened and checked on rank 0, recorded, loaded on every rank.

A teacher is known by the checksums of its checkpoint, not by its folder: a resume with other teachers is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron.config.flags import require, spelling, typed
from megatron.config.layout_checks import check_layout
from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.model.distillation import Distillation
from megatron.parallel.engine import Engine
from megatron.parallel.teachers import build_teacher
from megatron.training.checkpoint_store import load_checkpoint
from megatron.training.datasets import check_tokenizer
from megatron.training.load_run import Trained, open_trained, shared_settings
from megatron.training.resume import Origin


def open_teachers(
    config: Config, vocabulary: Vocabulary, world_size: int, *, tokenizer: Tokenizer | None = None
) -> list[Trained]:
    """Return the teachers of a run, each at its newest checkpoint or at the one that --teacher names.

    An evaluation has none. Without a `tokenizer` the data are random ids.

    Raises: ConfigurationError for a teacher that is missing or damaged, is this run itself or given twice, or does not
    fit the student or its layout.
    """
    teachers: list[Trained] = []
    for name in () if config.validation.skip_train else config.distillation.teacher:
        teacher = open_trained(name)
        saved_here = config.checkpoint.save and _is_in(teacher.checkpoint, Path(config.checkpoint.save))
        require(not saved_here, "teacher", name, "is the run that --save writes; name another run")
        is_new = teacher.checkpoint.resolve() not in [other.checkpoint.resolve() for other in teachers]
        require(is_new, "teacher", name, "is the same checkpoint as another teacher; name each teacher once")
        _check_student(teacher, config, vocabulary)
        if tokenizer is not None:
            check_tokenizer(teacher.recorded, tokenizer, typed("teacher", name))
        try:
            check_layout(replace(config, model=teacher.config.model), world_size)
        except ConfigurationError as error:
            raise ConfigurationError(f"{typed('teacher', name)}: does not fit the layout: {error}") from None
        teachers.append(teacher)
    return teachers


def _is_in(checkpoint: Path, run: Path) -> bool:
    return run.resolve() in checkpoint.resolve().parents


def _check_student(teacher: Trained, config: Config, vocabulary: Vocabulary) -> None:
    """Refuse a teacher whose distributions are over other ids or of other targets than the student's."""
    padding = "softmax_over_padding"
    settings = [
        shared_settings(side, size) | {spelling(padding): getattr(side.model, padding)}
        for side, size in ((config, vocabulary.size), (teacher.config, teacher.recorded["vocabulary_size"]))
    ]
    for setting, value in settings[0].items():
        expected = settings[1][setting]
        message = f"has {setting} {expected}, and this run has {value}; teacher and student must share it"
        require(value == expected, "teacher", teacher.name, message)


def describe_teachers(teachers: Sequence[Trained], config: Config, plan: Plan) -> list[dict]:
    """Return what config.json records of every teacher.

    `weights` is a hash of the checksums of the checkpoint; `flops` are those of the teacher's forward passes over the
    whole run, 2 FLOPs per token and parameter (a block in a loop counts for each use), which the 6ND of the student do
    not include.
    """
    tokens = plan.tokens(plan.train_samples, config.data.seq_length) * plan.passes
    return [
        {
            "checkpoint": str(teacher.checkpoint.resolve()),
            "iteration": teacher.meta["iteration"],
            "consumed_samples": teacher.meta["consumed_samples"],
            "parameters": teacher.recorded["parameters"],
            "weights": hashlib.sha256(json.dumps(teacher.meta["files"]).encode()).hexdigest()[:16],
            "flops": 2.0 * teacher.computed_parameters * tokens,
        }
        for teacher in teachers
    ]


def check_same_teachers(origin: Origin | None, described: Sequence[dict], config: Config) -> None:
    """Check that a run resumes with the teachers that it was started with; a branch may have others.

    Raises: ConfigurationError otherwise.
    """
    save = config.checkpoint.save
    if origin is None or config.validation.skip_train or not save or origin.run.resolve() != Path(save).resolve():
        return
    before = origin.meta["config"].get("teachers", [])
    if [teacher["weights"] for teacher in before] != [teacher["weights"] for teacher in described]:
        started = typed("teacher", [teacher["checkpoint"] for teacher in before])
        raise ConfigurationError(
            f"{typed('teacher', config.distillation.teacher)}: these are other weights than those that the run in "
            f"{save} was started with, {started}; give these checkpoints, or branch: --load {save} --save ANOTHER_DIR"
        )


def attach_teachers(engine: Engine, teachers: Sequence[Trained], config: Config, *, bf16: bool) -> None:
    """Load the teachers and make the engine's model learn from them. A collective call."""
    if not teachers:
        return
    (student,) = engine.models
    states = []
    for teacher in teachers:
        model = build_teacher(
            teacher.config.model,
            student.vocabulary,
            engine.ranks,
            config.parallel,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        load_checkpoint(
            teacher.checkpoint, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        )
        states.append(model.teacher_states)
    settings = config.distillation
    student.distillation = Distillation(tuple(states), settings.distill_weight, settings.distill_temperature)
