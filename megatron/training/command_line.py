"""Parses a command line into a typed configuration, with the settings that recipes, sizes and recorded runs imply."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from megatron.config.compatibility import is_foreign, translate
from megatron.config.flags import DescribedFormatter, HelpFormatter, Parser, add_section, build, spelling, typed_flags
from megatron.config.recipes import recipe_settings
from megatron.config.resolve import BUDGETS, unpublished_defaults
from megatron.config.sections import SECTIONS, Config
from megatron.config.sizes import ladder_settings
from megatron.config.tokenizer_flags import implied_tokenizer
from megatron.objectives.registry import OBJECTIVES, capabilities, foreign
from megatron.training.run_folder import recorded_config

logger = logging.getLogger(__name__)

ENTRY_POINTS = {"ar": "pretrain_gpt.py", "mdm": "pretrain_mdm.py"}
REGISTERED = {"objective": {name: entry.title for name, entry in OBJECTIVES.items()}}
# mutually exclusive flags: a typed one replaces the one that a recipe or a recorded run sets
EXCLUSIVE_FLAGS = (BUDGETS, ("bf16", "fp32"))
EXCLUSIVE_FLAGS += (("token_dropout", "token_dropout_max", "masked_input_weight"),)
EXCLUSIVE_FLAGS += (("weight_decay", "start_weight_decay", "end_weight_decay"),)
EXCLUSIVE_FLAGS += (("train_data_path", "train_data_path_file"), ("valid_data_path", "valid_data_path_file"))


def parser(objective: str, defaults: dict | None = None) -> Parser:
    """Return the parser of an entry point, generated from the sections; `defaults` override those of the flags."""
    result = Parser(
        prog=ENTRY_POINTS.get(objective),
        description=f"Train a transformer with {OBJECTIVES[objective].title}, or another --objective. The same command "
        "resumes a run. "
        "Flags of Megatron and DeepSpeed are understood, or refused with a reason: docs/compatibility.md.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS.values():
        add_section(result, section, {"objective": objective} | (defaults or {}), REGISTERED)
    return result


def parse(objective: str, arguments: list[str]) -> Config:
    """Return the typed configuration of a command line.

    Raises: ConfigurationError for anything wrong in the command line.
    """
    return _configuration(objective, translate(arguments, _batch(objective, arguments)))


def parse_run(objective: str, arguments: list[str]) -> Config:
    """Return what `parse` does; if flags use Megatron's spellings, log which defaults differ from the published ones.

    Raises: ConfigurationError for anything wrong in the command line.
    """
    translated = translate(arguments, _batch(objective, arguments))
    config = _configuration(objective, translated)
    unused = foreign(config.objective.objective)
    line = unpublished_defaults(config, typed_flags(translated), unused) if is_foreign(arguments) else None
    if line:
        logger.info(line)
    return config


def parse_over(config: Config, arguments: list[str]) -> Config:
    """Return `config` with the flags of a command line on top.

    Raises: ConfigurationError for anything wrong in the command line.
    """
    objective = config.objective.objective
    settings = _flat(dataclasses.asdict(config))
    return _configuration(objective, translate(arguments, _batch(objective, arguments, settings)), settings)


def _configuration(objective: str, arguments: list[str], recorded: dict | None = None) -> Config:
    settings = implied(objective, arguments, recorded)
    defaults = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items())
    namespace = _parser(objective, defaults).parse_known(arguments)
    return Config(**{name: build(section, namespace) for name, section in SECTIONS.items()})


@lru_cache(maxsize=128)  # a sweep parses thousands of command lines with the same few defaults
def _parser(objective: str, defaults: tuple[tuple[str, Any], ...]) -> Parser:
    return parser(objective, dict(defaults))


def parse_with(options: type, description: str, arguments: list[str], shown: tuple[str, ...]) -> tuple:
    """Return the `options` of a tool and the training configuration that it works on.

    --help lists the tool's own flags and those of the `shown` sections; flags of all other sections are accepted too.

    Raises: ConfigurationError for anything wrong in the command line.
    """
    objective = _early_flags(arguments).get("objective") or "ar"
    arguments = translate(arguments, _batch(objective, arguments))
    result = Parser(description=description, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(result, options, {})
    defaults = {"objective": objective} | implied(objective, arguments)
    for name, section in SECTIONS.items():
        add_section(result, section, defaults, REGISTERED)
        if name not in shown:
            for action in result._action_groups[-1]._group_actions:
                action.help = action.help if action.dest in ("seq_length", "objective") else argparse.SUPPRESS
    namespace = result.parse_known(arguments)
    return build(options, namespace), Config(**{name: build(kind, namespace) for name, kind in SECTIONS.items()})


def implied(objective: str, arguments: list[str], recorded: dict | None = None) -> dict:
    """Return what --recipe, --model-size, --skip-train and tokenizer files imply: defaults that flags override.

    `recorded` are the settings of a run, by flag; without them, --skip-train reads those of its run.
    """
    early = _early_flags(arguments)
    # unknown recipes and objectives are rejected later, by the full parser
    chosen_objective = early.get("objective") or objective
    recipe = recipe_settings(early.get("recipe") or "", chosen_objective)
    unused = foreign(chosen_objective) if chosen_objective in OBJECTIVES else ()
    settings = {name: value for name, value in recipe.items() if name not in unused}
    if recorded is None and early.get("skip_train"):
        recorded = recorded_settings(early.get("load") or early.get("save"))
    settings |= recorded or {}
    if early.get("model_size"):
        settings |= ladder_settings(early["model_size"])
    typed = typed_flags(arguments)
    for group in EXCLUSIVE_FLAGS:
        if typed & set(map(spelling, group)):
            settings |= {name: _own_defaults()[name] for name in group}
    return settings | implied_tokenizer(typed)


def recorded_settings(source: str | None) -> dict:
    """Return the settings, by flag, of the run that --skip-train evaluates; {} if there is no run."""
    recorded = source and recorded_config(Path(source))
    return _flat(evaluation_sections(recorded)) if recorded else {}


def evaluation_sections(recorded: dict) -> dict[str, dict]:
    """Return the sections of a run's config.json with which it is evaluated, on any device and in any layout.

    The precision is that of the run, not the default of this device. Teachers and trial moves, which do not fit every
    layout, act in training only.
    """
    unused = ("parallel", "checkpoint", "tracking", "distillation")
    sections = {name: recorded.get(name, {}) for name in SECTIONS if name not in unused}
    optimizer = sections["optimizer"].items()
    sections["optimizer"] = {name: value for name, value in optimizer if not name.startswith("meta_gradient_")}
    precision = {"bf16": None, "fp32": None, recorded["precision"]: True}
    kernels = {"fp8_recipe": None, "flash_attention": None}  # this device may not support them
    sections["training"] = sections["training"] | precision | kernels
    # runs older than --objective have only the name
    sections["objective"] = sections["objective"] | {"objective": recorded["objective_name"]}
    return sections


def evaluation_config(recorded: dict, load: str, flags: Sequence[str] = ()) -> Config:
    """Return the configuration with which --skip-train --load `load` evaluates the run of config.json `recorded`.

    `flags` are those of pretrain_gpt.py and override the recorded settings.

    Raises: ConfigurationError for settings that this version does not have, and wrong flags.
    """
    sections = evaluation_sections(recorded)
    sections["validation"] = sections["validation"] | {"skip_train": True}
    config = Config.from_recorded(sections | {"checkpoint": {"load": load}})
    capabilities(config.objective.objective)  # of this version
    return parse_over(config, list(flags)) if flags else config


def _flat(sections: dict[str, dict]) -> dict:
    return {name: value for section in sections.values() for name, value in section.items()}


def _batch(objective: str, arguments: list[str], recorded: dict | None = None) -> int:
    """Return --global-batch-size of a command line that is not translated yet; 1 if none of its flags needs it."""
    if not is_foreign(arguments):
        return 1
    text = _early_flags(arguments).get("global_batch_size")
    try:
        default = implied(objective, arguments, recorded).get("global_batch_size", _own_defaults()["global_batch_size"])
        return int(float(text or default))
    except (ValueError, OverflowError):
        return 1  # the full parser reports the error


def _early_flags(arguments: list[str]) -> dict:
    """Return the flags that imply others, before the full parse; {} if they are malformed."""
    try:
        return vars(_early_parser().parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}  # the full parser reports the error


@cache
def _early_parser() -> Parser:
    partial = Parser(add_help=False, allow_abbrev=False)
    for name in ("--objective", "--recipe", "--save", "--load", "--model-size", "--global-batch-size"):
        partial.add_argument(name)
    partial.add_argument("--skip-train", action=argparse.BooleanOptionalAction)
    return partial


@cache
def _own_defaults() -> dict[str, Any]:
    """Return the default of every flag without any recipe."""
    return {field.name: field.default for section in SECTIONS.values() for field in dataclasses.fields(section)}
