"""From a command line to a typed configuration: flags, and what some of them stand for."""

import argparse
import dataclasses
import logging
from pathlib import Path

from megatron.config.compatibility import is_foreign, translate
from megatron.config.flags import DescribedFormatter, HelpFormatter, Parser, add_section, build, spelling, typed_flags
from megatron.config.recipes import RECIPES
from megatron.config.resolve import BUDGETS, unpublished_defaults
from megatron.config.sections import SECTIONS, Config, implied_tokenizer
from megatron.config.sizes import ladder_settings
from megatron.objectives import OBJECTIVES, foreign
from megatron.training.resume import recorded_config

logger = logging.getLogger(__name__)

# of each group one is given; one that is typed replaces whichever a recipe or a recorded run gives
RIVALS = (BUDGETS, ("bf16", "fp32"))
RIVALS += (("train_data_path", "train_data_path_file"), ("valid_data_path", "valid_data_path_file"))


def parser(objective: str, defaults: dict | None = None) -> Parser:
    """Return the parser of one entry point, its flags generated from the sections; `defaults` win over their own."""
    what = {"ar": "autoregressive", "mdm": "masked-diffusion"}[objective]
    result = Parser(
        prog=f"pretrain_{'gpt' if objective == 'ar' else 'mdm'}.py",
        description=f"Train a transformer with the {what} objective, or another --objective. The same command resumes "
        "a run. "
        "Flags of Megatron and DeepSpeed are understood, or refused with a reason: docs/compatibility.md.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS.values():
        add_section(result, section, {"objective": objective} | (defaults or {}))
    return result


def parse(objective: str, arguments: list[str]) -> Config:
    """Return the typed configuration of a command line; raise ConfigurationError for anything wrong in it."""
    return _configuration(objective, translate(arguments, _batch(objective, arguments)))


def parse_run(objective: str, arguments: list[str]) -> Config:
    """Return what `parse` does, and log where the defaults of a command line in Megatron's spellings are not published.

    Raises: ConfigurationError for anything wrong in the command line.
    """
    translated = translate(arguments, _batch(objective, arguments))
    config = _configuration(objective, translated)
    unused = foreign(config.objective.objective)
    line = unpublished_defaults(config, typed_flags(translated), unused) if is_foreign(arguments) else None
    if line:
        logger.info(line)
    return config


def _configuration(objective: str, arguments: list[str]) -> Config:
    namespace = parser(objective, implied(objective, arguments)).parse_known(arguments)
    return Config(**{name: build(section, namespace) for name, section in SECTIONS.items()})


def parse_with(options: type, description: str, arguments: list[str], shown: tuple[str, ...]) -> tuple:
    """Return the `options` of a tool and the configuration of the training that it is asked about.

    The help has the tool's own flags and those of the `shown` sections; the flags of the others are taken too.
    """
    objective = _glance(arguments, "--objective").get("objective") or "ar"
    arguments = translate(arguments, _batch(objective, arguments))
    result = Parser(description=description, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(result, options, {})
    defaults = {"objective": objective} | implied(objective, arguments)
    for name, section in SECTIONS.items():
        add_section(result, section, defaults)
        if name not in shown:
            for action in result._action_groups[-1]._group_actions:
                action.help = action.help if action.dest in ("seq_length", "objective") else argparse.SUPPRESS
    namespace = result.parse_known(arguments)
    return build(options, namespace), Config(**{name: build(kind, namespace) for name, kind in SECTIONS.items()})


def implied(objective: str, arguments: list[str]) -> dict:
    """Return what --recipe, --model-size, --skip-train and tokenizer files imply: defaults that flags override."""
    asked = _glance(arguments, "--objective", "--recipe", "--save", "--load", "--model-size", skip_train=True)
    # a name that is none, the parser of all flags refuses
    recipe, asked_objective = RECIPES.get(asked.get("recipe"), {}), asked.get("objective") or objective
    idle = foreign(asked_objective) if asked_objective in OBJECTIVES else ()
    settings = {name: value for name, value in recipe.items() if name not in idle}
    if asked.get("skip_train"):
        settings |= recorded_settings(asked.get("load") or asked.get("save"))
    if asked.get("model_size"):
        settings |= ladder_settings(asked["model_size"])
    typed = typed_flags(arguments)
    for rivals in RIVALS:
        if typed & set(map(spelling, rivals)):
            settings |= {name: _own_default(name) for name in rivals}
    return settings | implied_tokenizer(typed)


def recorded_settings(source: str | None) -> dict:
    """Return the settings of the run that --skip-train evaluates, so that they need not be given again.

    The layout is not one of them: any may evaluate.
    """
    recorded = source and recorded_config(Path(source))
    if not recorded:
        return {}
    sections = [
        recorded.get(section, {}) for section in SECTIONS if section not in ("parallel", "checkpoint", "tracking")
    ]
    settings = {name: value for section in sections for name, value in section.items()}
    # what it was, whatever the device prefers
    settings |= {"bf16": None, "fp32": None, recorded["precision"]: True}
    settings |= {"fp8_recipe": None, "flash_attention": None}  # this device need not have them
    return settings | {"objective": recorded["objective_name"]}  # a run may be older than the flag


def _batch(objective: str, arguments: list[str]) -> int:
    """Return --global-batch-size of a command line that is not translated yet."""
    asked = _glance(arguments, "--global-batch-size").get("global_batch_size")
    try:
        usual = implied(objective, arguments).get("global_batch_size", _own_default("global_batch_size"))
        return int(float(asked or usual))
    except (ValueError, OverflowError):
        return 1  # the parser of all flags says what is wrong


def _glance(arguments: list[str], *names: str, skip_train: bool = False) -> dict:
    """Return a few flags of a command line, before all flags are parsed; {} where these are wrong."""
    few = Parser(add_help=False, allow_abbrev=False)
    for name in names:
        few.add_argument(name)
    if skip_train:
        few.add_argument("--skip-train", action=argparse.BooleanOptionalAction)
    try:
        return vars(few.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}  # the parser of all flags says what is wrong


def _own_default(name: str):
    """Return the default of a flag whatever the recipe."""
    fields = [field for section in SECTIONS.values() for field in dataclasses.fields(section)]
    return next(field.default for field in fields if field.name == name)
