"""Plans a sweep: every point of the grid, resolved by the training parser, with a stable id and what it costs.

The plan is SWEEP/plan.jsonl, one line per point. A point's id is a hash of its resolved configuration without what a
resume may change, so adding an axis value or a variant keeps the runs that exist. Points with the same id share a run.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import Plan, resolve
from megatron.config.sections import SECTIONS, Config
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import build_objective, capabilities
from megatron.sweeps.branches import Resolved, assign_trunks
from megatron.sweeps.choices import best_trials
from megatron.sweeps.points import Point, identity, readable_name, same_value, text
from megatron.sweeps.run_costs import RunCosts, disk_bytes
from megatron.sweeps.sweep_file import Flags, Stage, Sweep, Variant
from megatron.sweeps.teachers import TeacherStage, unfinished_teachers
from megatron.sweeps.trials import draw_trials
from megatron.training.command_line import ENTRY_POINTS, parse
from megatron.training.resume_checks import BUDGET_PLAN, FREE_ON_RESUME

# fields that a resume may change and that decide a run's result all the same
DECISIVE = {"train_data_path", "train_data_path_file", "valid_data_path", "valid_data_path_file"}
DECISIVE |= {"objective", "teacher", "tokenizer_model", "vocab_file", "merge_file", "bf16", "fp32"}
NOT_IN_ID = FREE_ON_RESUME - DECISIVE
SECTIONS_NOT_IN_ID = ("checkpoint", "tracking", "parallel")
# defaults by (section, field) of what decides a run's result
DECISIVE_FIELDS = {
    (section, field.name): field.default
    for section, kind in SECTIONS.items()
    if section not in SECTIONS_NOT_IN_ID
    for field in fields(kind)
    if field.name not in NOT_IN_ID
}


@dataclass
class Planned:
    """The points of all stages that can be planned, and why others wait."""

    points: list[Point] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)  # reason by stage
    choices: dict[str, list[dict]] = field(default_factory=dict)  # of the stages with best_of
    notes: list[str] = field(default_factory=list)  # why WSD points are trained in full


def plan_sweep(sweep: Sweep, folder: Path, progress: bool = False) -> Planned:
    """Return the plan of a sweep whose runs lie in `folder`.

    A stage with `best_of` or `teachers_of` is planned when all runs of that stage have finished.

    Raises: ConfigurationError that names every impossible point, up to a screenful.
    """
    planned, errors, costs = Planned(), [], RunCosts(sweep)
    resolved: list[Resolved] = []
    all_drafts: list[_Draft] = []
    for stage in sweep.stages:
        if errors and (stage.best_of is not None or stage.teachers_of is not None):
            continue  # the points that it takes from may be among those
        earlier = {
            other.name: (other, [item.point for item in resolved if item.point.stage == other.name])
            for other in sweep.stages
        }
        inherited = _inherited(stage, earlier, planned, folder)
        if isinstance(inherited, str):
            planned.waiting[stage.name] = inherited
            continue
        drafts = list(_drafts(sweep, stage, inherited))
        all_drafts += drafts
        for draft in tqdm(drafts, desc=f"plan {stage.name}", disable=None if progress else True, leave=False):
            try:
                resolved.append(_resolved(draft, costs, folder))
            except ConfigurationError as error:
                errors.append(f"{draft.label}: {error}")
    if errors:
        more = [f"and {len(errors) - 10} more"] if len(errors) > 10 else []
        raise ConfigurationError(
            f"{sweep.path}: {len(errors)} of {len(errors) + len(resolved)} points cannot run; correct their "
            "flags, or leave them out with `exclude`:",
            [*errors[:10], *more],
        )
    if not resolved:
        raise ConfigurationError(f"{sweep.path}: has no point; every combination is excluded")
    if not planned.waiting:
        _check_rules(sweep, all_drafts)
    planned.points = [item.point for item in resolved]
    if sweep.wsd_branches:
        planned.points, planned.notes = assign_trunks(resolved, folder)
    return planned


@dataclass(frozen=True)
class _Inherited:
    """What a stage takes from earlier ones: tuned flags by group, and teachers."""

    tuned: dict[tuple, Flags]
    teachers: TeacherStage


def _inherited(
    stage: Stage, earlier: dict[str, tuple[Stage, list[Point]]], planned: Planned, folder: Path
) -> _Inherited | str:
    """Return what a stage takes from earlier ones, or what it waits for; record how trials were chosen in `planned`."""
    for name in (stage.best_of, stage.teachers_of):
        if name in planned.waiting:
            return f"waits for stage {name}"
    tuned: dict[tuple, Flags] = {}
    if stage.best_of is not None:
        source, points = earlier[stage.best_of]
        assert source.tuning is not None
        chosen = best_trials(points, folder, set_name=source.tuning.set, by=stage.by)
        if isinstance(chosen, str):
            return chosen
        tuned, planned.choices[stage.name] = chosen.flags, chosen.records
    if stage.teachers_of is None:
        return _Inherited(tuned, TeacherStage())
    teachers = TeacherStage(*earlier[stage.teachers_of])
    return unfinished_teachers(teachers.points, folder) or _Inherited(tuned, teachers)


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A point before its flags are parsed."""

    stage: Stage
    variant: Variant
    axes: Flags
    tuned: Flags
    seed: int
    trial: int | None
    teachers: list[str]  # ids of runs

    @property
    def label(self) -> str:
        return readable_name(self.stage.name, self.variant.name, self.axes, trial=self.trial, seed=self.seed)

    @property
    def flags(self) -> Flags:
        """All flags but the teachers, the more specific ones winning."""
        return {**self.stage.flags, **self.variant.flags, **self.axes, **self.tuned, "seed": self.seed}

    def config(self, folder: Path | None = None) -> Config:
        """Return the configuration: with the teachers' run folders, or by default with the ids of their runs.

        The id of a point depends on those, so that a sweep folder can be moved.

        Raises: ConfigurationError where the training command would refuse it.
        """
        teachers = [str(folder / "runs" / teacher) if folder else teacher for teacher in self.teachers]
        return parse("ar", words(self.flags | ({"teacher": teachers} if teachers else {})))

    @property
    def named(self) -> Flags:
        """The flags and the variant, which conditions compare."""
        return {"variant": self.variant.name, **self.flags}


def _drafts(sweep: Sweep, stage: Stage, inherited: _Inherited) -> Iterator[_Draft]:
    for variant in stage.variants:
        axes = {**stage.parameters, **variant.parameters}
        if stage.tuning is None:
            trials: list[tuple[int | None, Flags]] = [(None, {})]
        else:
            trials = list(enumerate(draw_trials(stage.tuning, stage.tuned(variant))))
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            named = {"variant": variant.name, **point}
            if any(_matches(named, excluded) for excluded in sweep.exclude):
                continue
            best: Flags = {}
            if stage.best_of is not None:
                group = (variant.name, *(text(point[name]) for name in stage.by))
                if group not in inherited.tuned:
                    raise ConfigurationError(
                        f"{sweep.path}: stages.{stage.name}: stage {stage.best_of} has no trial for {', '.join(group)};"
                        " add the values there, or drop the axis from `by`"
                    )
                best = inherited.tuned[group]
            ids = inherited.teachers.ids(stage, variant, point)
            for seed, (trial, tuned) in itertools.product(stage.seeds, trials):
                yield _Draft(
                    stage=stage,
                    variant=variant,
                    axes=point,
                    tuned={**tuned, **best},
                    seed=seed,
                    trial=trial,
                    teachers=ids,
                )


def words(flags: Flags) -> list[str]:
    """Return flags as words of a command line: True is `--x`, False `--no-x`, a list several words."""
    line = []
    for name, value in flags.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def _resolved(draft: _Draft, costs: RunCosts, folder: Path) -> Resolved:
    """Return the point of a draft.

    Raises: ConfigurationError where the training command would refuse it.
    """
    config = draft.config()
    resources = _resources(draft)
    declared = capabilities(config.objective.objective)
    unique_tokens, vocabulary_size = costs.data_sizes(config)
    vocabulary = Vocabulary(vocabulary_size)
    plan = resolve(config, vocabulary, unique_tokens, declared)
    build_objective(config.objective, vocabulary, config.training.global_batch_size)
    check_layout(config, resources["world_size"])
    check_batch(config, resources["world_size"], declared)
    if resources["world_size"] % resources["nodes"]:
        raise ConfigurationError(
            f"resources: {resources['world_size']} ranks do not divide over {resources['nodes']} nodes; change one"
        )
    seq_length = config.data.seq_length
    flops = plan.flops(plan.train_samples, seq_length)
    speed = resources["flops_per_second"]
    point_id = run_id(config, plan)
    point = Point(
        id=point_id,
        stage=draft.stage.name,
        variant=draft.variant.name,
        axes=draft.axes,
        tuned=draft.tuned,
        seed=draft.seed,
        trial=draft.trial,
        script=ENTRY_POINTS.get(config.objective.objective, "pretrain_gpt.py"),
        arguments=words(_tracked(draft, folder.resolve().name, point_id)),
        nodes=resources["nodes"],
        world_size=resources["world_size"],
        minutes=resources["minutes"],
        parameters=plan.parameters,
        unique_tokens=plan.unique_tokens,
        train_samples=plan.train_samples,
        tokens=plan.tokens(plan.train_samples, seq_length),
        epochs=plan.train_samples * seq_length / plan.unique_tokens,
        flops=flops,
        memory_bytes=costs.memory_bytes(
            draft.config(folder) if draft.teachers else config, vocabulary, resources["world_size"]
        ),
        disk_bytes=disk_bytes(config, plan, seq_length),
        seconds=None if speed is None else flops / (speed * resources["world_size"]),
        teachers=draft.teachers,
    )
    return Resolved(point, config, plan, family=identity(_settings(config)))


def _tracked(draft: _Draft, group: str, point_id: str) -> Flags:
    """Return the flags of a point with the names of its run in Weights & Biases and its own TensorBoard folder."""
    flags = draft.flags
    if flags.get("wandb-project") is not None:
        flags = {"wandb-group": group, "wandb-exp-name": draft.label} | flags
    if flags.get("tensorboard-dir") is not None:
        flags["tensorboard-dir"] = f"{flags['tensorboard-dir']}/{group}/{point_id}"
    return flags


def _resources(draft: _Draft) -> dict[str, Any]:
    resources = dict(vars(draft.stage.resources))
    for where, amounts in draft.stage.resources.rules:
        if _matches(draft.named, where):
            resources |= amounts
    return resources


def _check_rules(sweep: Sweep, drafts: Sequence[_Draft]) -> None:
    """Refuse a rule of `resources` that holds for no point, as after a typing error in a value."""
    matched: dict[str, bool] = {}  # a rule of the whole file may be one of several stages
    for stage in sweep.stages:
        for where, _ in stage.resources.rules:
            key = ", ".join(f"{name}: {text(value)}" for name, value in where.items())
            own = (draft.named for draft in drafts if draft.stage is stage)
            matched[key] = matched.get(key, False) or any(_matches(named, where) for named in own)
    for key, has_point in matched.items():
        if not has_point:
            raise ConfigurationError(
                f"{sweep.path}: resources.rules: no point has {{{key}}}; correct the rule, or drop it"
            )


def _matches(flags: Flags, conditions: dict[str, Any]) -> bool:
    return all(name in flags and same_value(flags[name], value) for name, value in conditions.items())


def run_id(config: Config, plan: Plan) -> str:
    """Return the id of the run of a configuration and its plan."""
    return identity(_settings(config) | {f"plan.{name}": getattr(plan, name) for name in BUDGET_PLAN})


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide the result of a run, but for its budget.

    Defaults are left out, so that a later flag, off by default, keeps the ids of the runs that exist.
    """
    return {
        f"{section}.{name}": value
        for (section, name), default in DECISIVE_FIELDS.items()
        if (value := getattr(getattr(config, section), name)) != default
    }
