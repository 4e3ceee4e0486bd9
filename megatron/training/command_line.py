"""From a command line to a typed configuration: flags, and what some of them stand for."""

import argparse
from pathlib import Path

from megatron.config.flags import HelpFormatter, Parser, add_section, build, spelling
from megatron.config.resolve import BUDGETS
from megatron.config.sections import SECTIONS, Config
from megatron.config.sizes import ladder_settings
from megatron.training.resume import recorded_config


def parser(objective: str, defaults: dict | None = None) -> Parser:
    """Return the parser of one entry point, its flags generated from the sections; `defaults` win over their own."""
    what = {"ar": "autoregressive", "mdm": "masked-diffusion"}[objective]
    result = Parser(
        prog=f"pretrain_{'gpt' if objective == 'ar' else 'mdm'}.py",
        description=f"Train a transformer with the {what} objective. The same command resumes a run.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS.values():
        add_section(result, section, defaults or {})
    return result


def parse(objective: str, arguments: list[str]) -> Config:
    """Return the typed configuration of a command line; raise ConfigurationError for anything wrong in it."""
    namespace = parser(objective, implied(arguments)).parse_known(arguments)
    return Config(**{name: build(section, namespace) for name, section in SECTIONS.items()})


def implied(arguments: list[str]) -> dict:
    """Return what --model-size and --skip-train stand for, as defaults that every flag beside them wins over."""
    few = Parser(add_help=False, allow_abbrev=False)
    few.add_argument("--skip-train", action=argparse.BooleanOptionalAction)
    for name in ("--save", "--load", "--model-size"):
        few.add_argument(name)
    try:
        asked, _ = few.parse_known_args(arguments)
    except argparse.ArgumentError:
        return {}  # the parser of all flags says what is wrong
    recorded = recorded_settings(asked.load or asked.save, arguments) if asked.skip_train else {}
    return recorded | (ladder_settings(asked.model_size) if asked.model_size else {})


def recorded_settings(source: str | None, arguments: list[str]) -> dict:
    """Return the settings of the run that --skip-train evaluates, so that they need not be given again."""
    recorded = source and recorded_config(Path(source))
    if not recorded:
        return {}
    sections = [recorded[section] for section in SECTIONS if section != "checkpoint"]
    settings = {name: value for section in sections for name, value in section.items()}
    settings |= {"bf16": None, "fp32": None, recorded["precision"]: True}  # what it was, whatever the device prefers
    typed = {argument.split("=")[0] for argument in arguments}
    for rivals in (BUDGETS, ("bf16", "fp32")):  # one that is typed replaces whichever was recorded
        if typed & set(map(spelling, rivals)):
            settings |= dict.fromkeys(rivals)
    return settings
