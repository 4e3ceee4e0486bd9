"""Reads a sweep file: the flags that all runs share, variants, axes, seeds, tuning, stages and resources.

The file is YAML in the habits of W&B sweeps and Hydra; docs/sweeps.md describes every key. It is data only: whatever
needs the training parser or the data sets happens in `plan`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.config.compatibility_table import TABLE
from megatron.config.sections import SECTIONS
from megatron.sweeps.points import same_value, text
from megatron.sweeps.yaml_file import YamlFile, unknown_name

STAGE_KEYS = ("flags", "parameters", "variants", "seeds", "tuning", "resources", "best_of", "by")
STAGE_KEYS += ("teachers_of", "teacher_seeds")
SWEEP_KEYS = ("name", "description", "data", "exclude", "wsd_branches", "stages", *STAGE_KEYS)
VARIANT_KEYS = ("flags", "parameters", "tuning")
DISTRIBUTIONS = {
    "uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "int_uniform": ("min", "max"),
    "categorical": ("values",),
}
MANAGED = {
    "save": "the sweep names the folder of each run",
    "load": "the sweep resumes each run from its own folder",
    "exact-branch": "WSD branches are exact; `wsd_branches: false` trains all runs in full",
    "seed": "give `seeds`",
    "dry-run": "tools/sweep.py plan checks every run",
    "skip-train": "a sweep trains; evaluate its runs afterwards",
    "exit-code-when-stopped": "the sweep needs it to tell stopped runs from finished ones",
    "wait-for-lock": "the sweep decides how long a run waits for another process",
}

Flags = dict[str, Any]  # value by flag name without dashes in front; None leaves the flag out


@dataclass(frozen=True)
class Distribution:
    """The values that the trials of a tuned flag take; names and bounds are those of W&B sweeps."""

    kind: str
    low: float = 0.0
    high: float = 0.0
    values: tuple = ()


@dataclass(frozen=True)
class Tuning:
    """Quasi-random trials of some flags; the best one has the lowest loss on the validation set `set`."""

    trials: int
    parameters: dict[str, Distribution]
    set: str = "tuning"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run needs. An entry of `rules` gives other values to the points that match all its `where` values."""

    nodes: int = 1
    world_size: int = 1  # ranks, over all nodes
    minutes: float | None = None  # time limit of one job; a longer run is requeued
    flops_per_second: float | None = None  # model FLOPs of one rank, for estimates of time
    rules: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Variant:
    """One curve of a plot: a set of flags, and axes and tuned flags of its own."""

    name: str
    flags: Flags = field(default_factory=dict)
    parameters: dict[str, tuple] = field(default_factory=dict)
    tuned: dict[str, Distribution] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A grid of runs. With `best_of`, the tuned flags of each variant are those of the best trial of that stage.

    The best trial is chosen for each combination of the axes in `by`, from the mean over seeds and all other axes.
    With `teachers_of`, runs of that stage are the teachers of this stage's runs.
    """

    name: str
    flags: Flags
    parameters: dict[str, tuple]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None
    resources: Resources
    best_of: str | None
    by: tuple[str, ...]
    teachers_of: str | None
    teacher_seeds: tuple[int, ...]  # of the teachers; () for all seeds of that stage

    def tuned(self, variant: Variant) -> dict[str, Distribution]:
        """Return the flags that the trials of a variant tune, the shared ones first; none without tuning."""
        return {} if self.tuning is None else {**self.tuning.parameters, **variant.tuned}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of a sweep file."""

    path: Path
    name: str
    description: str
    stages: tuple[Stage, ...]
    exclude: tuple[dict[str, Any], ...]
    wsd_branches: bool  # whether runs that differ only in budget share their constant part
    data: dict[str, int]  # unique_tokens and vocabulary_size to plan with where the data are not on this machine
    content: str  # of the file, as it was read


def read_sweep(path: Path) -> Sweep:
    """Return the sweep of a file.

    Raises: ConfigurationError with the file, the key, the rule and the remedy.
    """
    return _Reader(path).sweep()


class _Reader(YamlFile):
    """Reads a sweep file."""

    def sweep(self) -> Sweep:
        """Return the whole file."""
        top = self.mapping("", self.load(), SWEEP_KEYS)
        name = str(top.get("name", self.path.stem))
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise self.error("name", f"{name}: names a folder and jobs; use letters, digits, '-', '_' and '.'")
        assumed = self.mapping("data", top.get("data"), ("unique_tokens", "vocabulary_size"))
        base = {key: top[key] for key in STAGE_KEYS if key in top}
        stages = self._stages(base, top.get("stages"))
        return Sweep(
            path=self.path,
            name=name,
            description=str(top.get("description", "")).strip(),
            stages=stages,
            exclude=tuple(
                self._where("exclude", combination, stages)
                for combination in self.sequence("exclude", top.get("exclude"))
            ),
            wsd_branches=self.switch("wsd_branches", top.get("wsd_branches", True)),
            data={key: self.whole(f"data.{key}", value, 1) for key, value in assumed.items()},
            content=self.content,
        )

    # ------------------------------------------------------------------------------------------------- stages

    def _stages(self, base: dict, named: Any) -> tuple[Stage, ...]:
        if named is None:
            return (self._stage("main", "", base, ()),)
        stages: list[Stage] = []
        for name, own in self.named("stages", named).items():
            key = f"stages.{name}"
            own = self.mapping(key, own, STAGE_KEYS)
            merged = base | own
            for part in ("flags", "parameters"):
                outer = self._named_flags(part, base.get(part))
                merged[part] = outer | self._named_flags(f"{key}.{part}", own.get(part))
            if isinstance(own.get("variants"), list):
                merged["variants"] = self._selected(f"{key}.variants", own["variants"], base.get("variants"))
            if own.get("best_of"):
                merged.pop("tuning", None)
                if "tuning" in own:
                    raise self.error(f"{key}.tuning", "a stage with best_of takes tuned flags; drop one of the two")
            stages.append(self._stage(name, key + ".", merged, tuple(stages)))
        if not stages:
            raise self.error("stages", "is empty; name at least one stage, or leave the key out")
        return tuple(stages)

    def _selected(self, key: str, names: list, given: Any) -> dict:
        variants = self.named("variants", given)
        for name in map(str, names):
            if name not in variants:
                raise self.error(key, unknown_name(name, variants, "variant"))
        return {name: variants[name] for name in map(str, names)}

    def _stage(self, name: str, key: str, given: dict, earlier: tuple[Stage, ...]) -> Stage:
        tuning = given.get("tuning")
        raw_variants = self.named(f"{key}variants", given.get("variants")) or {"default": None}
        variants = tuple(self._variant(f"{key}variants.{item}", item, own) for item, own in raw_variants.items())
        stage = Stage(
            name=name,
            flags=self.flags(f"{key}flags", given.get("flags")),
            parameters=self._axes(f"{key}parameters", given.get("parameters")),
            variants=variants,
            seeds=self._seeds(f"{key}seeds", given.get("seeds")),
            tuning=None if tuning is None else self._tuning(f"{key}tuning", tuning, variants),
            resources=self._resources(f"{key}resources", given.get("resources"), given),
            best_of=None if given.get("best_of") is None else str(given["best_of"]),
            by=tuple(self.flag_name(f"{key}by", axis) for axis in self.sequence(f"{key}by", given.get("by"))),
            teachers_of=None if given.get("teachers_of") is None else str(given["teachers_of"]),
            teacher_seeds=self._teacher_seeds(key, given),
        )
        self._check_axes(key, stage)
        self._check_best(key, stage, earlier)
        self._check_teachers(key, stage, earlier)
        return stage

    def _check_axes(self, key: str, stage: Stage) -> None:
        """Refuse axes of a variant that its own or tuned flags contradict."""
        for variant in stage.variants:
            axes = {**stage.parameters, **variant.parameters}
            for name in variant.flags.keys() & axes.keys():
                raise self.error(
                    f"{key}variants.{variant.name}.flags.{name}", "is an axis of this variant as well; drop one"
                )
            for name in stage.tuned(variant).keys() & axes.keys():
                raise self.error(f"{key}tuning.parameters.{name}", f"is an axis of variant {variant.name}; drop one")

    def _check_best(self, key: str, stage: Stage, earlier: tuple[Stage, ...]) -> None:
        if stage.best_of is None:
            if stage.by:
                raise self.error(f"{key}by", "does nothing without best_of; give both or neither")
            return
        source = {other.name: other for other in earlier}.get(stage.best_of)
        if source is None:
            names = ", ".join(other.name for other in earlier) or "none"
            raise self.error(f"{key}best_of", f"{stage.best_of}: is not an earlier stage ({names}); name one")
        if source.tuning is None:
            raise self.error(
                f"{key}best_of", f"{stage.best_of}: has no tuning, so no trial is its best; add tuning to it"
            )
        twins = {other.name: other for other in source.variants}
        for variant in stage.variants:
            if variant.name not in twins:
                raise self.error(f"{key}best_of", f"{stage.best_of}: has no variant {variant.name}; add it there")
            twin = twins[variant.name]
            for name in source.tuned(twin).keys() & {**stage.parameters, **variant.parameters}.keys():
                raise self.error(
                    f"{key}best_of", f"{stage.best_of}: tunes {name}, which is an axis here; drop the axis"
                )
            for axis in stage.by:
                for owner, axes in ((stage, variant.parameters), (source, twin.parameters)):
                    if axis not in {**owner.parameters, **axes}:
                        raise self.error(
                            f"{key}by", f"{axis}: is no axis of stage {owner.name}; name one of both stages"
                        )

    def _teacher_seeds(self, key: str, given: dict) -> tuple[int, ...]:
        if given.get("teacher_seeds") is None:
            return ()
        if given.get("teachers_of") is None:
            raise self.error(f"{key}teacher_seeds", "does nothing without teachers_of; give both or neither")
        return self._seeds(f"{key}teacher_seeds", given["teacher_seeds"])

    def _check_teachers(self, key: str, stage: Stage, earlier: tuple[Stage, ...]) -> None:
        """Refuse a stage whose runs do not know which runs of an earlier stage are their teachers."""
        if stage.teachers_of is None:
            return
        key, source = f"{key}teachers_of", {other.name: other for other in earlier}.get(stage.teachers_of)
        if source is None:
            names = ", ".join(other.name for other in earlier) or "none"
            raise self.error(key, f"{stage.teachers_of}: is not an earlier stage ({names}); name one")
        if source.tuning is not None:
            raise self.error(key, f"{source.name}: has trials; name a stage that takes its best_of")
        if missing := set(stage.teacher_seeds) - set(source.seeds):
            raise self.error(key, f"{source.name}: has no seed {min(missing)}; correct teacher_seeds")
        twins = {other.name: other for other in source.variants}
        for variant in stage.variants:
            if variant.name not in twins and len(twins) > 1:
                raise self.error(key, f"{source.name}: has several variants, none named {variant.name}; add it there")
            twin = twins.get(variant.name, source.variants[0])
            own = {**stage.parameters, **variant.parameters}
            if "teacher" in {**stage.flags, **variant.flags, **own}:
                raise self.error(key, "sets the flag teacher, which is given as well; drop one of the two")
            for axis, values in {**source.parameters, **twin.parameters}.items():
                lacking = [value for value in own.get(axis, ()) if not any(same_value(value, v) for v in values)]
                if lacking or (axis not in own and len(values) > 1):
                    problem = f"lacks {axis} {text(lacking[0])}" if lacking else f"has several values of {axis}"
                    raise self.error(key, f"{source.name}: {problem}; give both stages the same values of the axis")

    def _variant(self, key: str, name: str, given: Any) -> Variant:
        given = self.mapping(key, given, VARIANT_KEYS)
        tuned = self.mapping(f"{key}.tuning", given.get("tuning"), ("parameters",))
        return Variant(
            name,
            self.flags(f"{key}.flags", given.get("flags")),
            self._axes(f"{key}.parameters", given.get("parameters")),
            self._distributions(f"{key}.tuning.parameters", tuned.get("parameters")),
        )

    def _axes(self, key: str, given: Any) -> dict[str, tuple]:
        axes = {}
        for name, axis in self._named_flags(key, given).items():
            values = axis if isinstance(axis, list) else self.mapping(f"{key}.{name}", axis, ("values",)).get("values")
            values = self.sequence(f"{key}.{name}", values)
            if not values:
                raise self.error(f"{key}.{name}", "has no values; give at least one, or drop the axis")
            for index, value in enumerate(values):
                if not isinstance(value, VALUE_TYPES):
                    raise self.error(f"{key}.{name}", f"{value}: is neither text nor a number; write it in quotes")
                if any(same_value(value, other) for other in values[:index]):
                    raise self.error(f"{key}.{name}", f"{value}: is given twice; drop one")
            axes[name] = tuple(values)
        return axes

    def _seeds(self, key: str, given: Any) -> tuple[int, ...]:
        seeds = [1234] if given is None else [self.whole(key, seed, 0) for seed in self.sequence(key, given)]
        if not seeds:
            raise self.error(key, "is empty; give at least one, or leave the key out")
        if len(set(seeds)) < len(seeds):
            raise self.error(key, f"{seeds}: names a seed twice; drop one")
        return tuple(seeds)

    # ---------------------------------------------------------------------------------------- tuning, resources

    def _tuning(self, key: str, given: Any, variants: Iterable[Variant]) -> Tuning:
        given = self.mapping(key, given, ("trials", "set", "seed", "parameters"))
        parameters = self._distributions(f"{key}.parameters", given.get("parameters"))
        if not parameters and not any(variant.tuned for variant in variants):
            raise self.error(f"{key}.parameters", "is empty, so all trials would be equal; name a flag to tune")
        trials = self.whole(f"{key}.trials", given.get("trials"), 1)
        seed = self.whole(f"{key}.seed", given.get("seed", 0), 0)
        return Tuning(trials, parameters, str(given.get("set", "tuning")), seed)

    def _distributions(self, key: str, given: Any) -> dict[str, Distribution]:
        return {name: self._distribution(f"{key}.{name}", own) for name, own in self._named_flags(key, given).items()}

    def _distribution(self, key: str, given: Any) -> Distribution:
        given = self.mapping(key, given, ("distribution", "min", "max", "values"))
        kind = str(given.get("distribution", "categorical" if "values" in given else "uniform"))
        if kind not in DISTRIBUTIONS:
            raise self.error(f"{key}.distribution", unknown_name(kind, DISTRIBUTIONS, "distribution"))
        wanted = DISTRIBUTIONS[kind]
        if set(given) - {"distribution"} != set(wanted):
            raise self.error(key, f"distribution {kind} takes {' and '.join(wanted)}; give exactly these")
        if kind == "categorical":
            if not self.sequence(f"{key}.values", given["values"]):
                raise self.error(f"{key}.values", "is empty; give at least one value")
            return Distribution(kind, values=tuple(self.sequence(f"{key}.values", given["values"])))
        low, high = (self.number(f"{key}.{bound}", given[bound]) for bound in wanted)
        if not low < high or (kind == "log_uniform_values" and low <= 0):
            condition = "0 < min < max" if kind == "log_uniform_values" else "min < max"
            raise self.error(key, f"min {low:g} and max {high:g}: {kind} needs {condition}; correct them")
        if kind == "int_uniform" and not (low.is_integer() and high.is_integer()):
            raise self.error(key, f"min {low:g} and max {high:g}: {kind} needs whole numbers; correct them")
        return Distribution(kind, low, high)

    def _resources(self, key: str, given: Any, stage: dict) -> Resources:
        names = [field.name for field in fields(Resources)]
        given = self.mapping(key, given, names)
        rules = []
        for index, entry in enumerate(self.sequence(f"{key}.rules", given.get("rules"))):
            entry = self.mapping(f"{key}.rules[{index}]", entry, ("where", *names[:-1]))
            where = self._conditions(f"{key}.rules[{index}].where", entry.get("where"))
            if not where:
                raise self.error(
                    f"{key}.rules[{index}]", "has no `where`, so it holds for all points; give one, or drop the rule"
                )
            rules.append((where, self._amounts(f"{key}.rules[{index}]", entry)))
        return Resources(**self._amounts(key, given), rules=tuple(rules))

    def _amounts(self, key: str, given: dict) -> dict[str, Any]:
        amounts: dict[str, Any] = {}
        for name in ("nodes", "world_size"):
            if name in given:
                amounts[name] = self.whole(f"{key}.{name}", given[name], 1)
        for name in ("minutes", "flops_per_second"):
            if given.get(name) is not None:
                amounts[name] = self.number(f"{key}.{name}", given[name])
                if amounts[name] <= 0:
                    raise self.error(f"{key}.{name}", f"{amounts[name]:g}: must be positive; correct it")
        return amounts

    def _where(self, key: str, given: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
        where = self._conditions(key, given)
        axes: dict[str, list] = {"variant": [variant.name for stage in stages for variant in stage.variants]}
        for stage in stages:
            for parameters in (stage.parameters, *(variant.parameters for variant in stage.variants)):
                for name, values in parameters.items():
                    axes.setdefault(name, []).extend(values)
        for name, value in where.items():
            if name not in axes:
                raise self.error(key, unknown_name(name, axes, "axis"))
            if not any(same_value(value, other) for other in axes[name]):
                known = ", ".join(dict.fromkeys(map(text, axes[name])))
                raise self.error(f"{key}.{name}", f"{value}: is no value of it ({known}); correct it")
        return where

    def _conditions(self, key: str, given: Any) -> dict[str, Any]:
        """Return the values that a point must have: of its variant and its flags."""
        given = self.mapping(key, given, None)
        return {"variant" if name == "variant" else self.flag_name(key, name): value for name, value in given.items()}

    # ------------------------------------------------------------------------------------------------- values

    def flags(self, key: str, given: Any) -> Flags:
        """Return flags by name; a value of None leaves a flag out that an outer level gives."""
        flags = self._named_flags(key, given)
        for name, value in flags.items():
            if value is not None and not isinstance(value, VALUE_TYPES):
                raise self.error(f"{key}.{name}", f"{value}: is no value of a flag; axes are under `parameters`")
        return flags

    def _named_flags(self, key: str, given: Any) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        for name, value in self.mapping(key, given, None).items():
            flag = self.flag_name(key, name)
            if flag in flags:
                raise self.error(f"{key}.{name}", "is given twice; drop one")
            flags[flag] = value
        return flags

    def flag_name(self, key: str, name: Any) -> str:
        """Return the name of a flag as on the command line, without dashes in front.

        Raises: ConfigurationError for an unknown flag or one that the sweep sets.
        """
        flag = str(name).lstrip("-").replace("_", "-")
        if flag in MANAGED:
            raise self.error(f"{key}.{name}", f"is not set in a sweep file: {MANAGED[flag]}")
        if flag.startswith("no-") and flag.removeprefix("no-") in FLAG_NAMES:
            raise self.error(f"{key}.{name}", f"is a negation; write `{flag.removeprefix('no-')}: false`")
        if flag not in FLAG_NAMES:
            raise self.error(f"{key}.{name}", unknown_name(flag, FLAG_NAMES, "flag"))
        return flag


VALUE_TYPES = (str, int, float, bool, list)
FLAG_NAMES = sorted(
    {field.name.replace("_", "-") for section in SECTIONS.values() for field in fields(section)}
    | {spelled.lstrip("-") for spelled in TABLE}
)
