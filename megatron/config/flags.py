"""Command-line flags generated from dataclass fields: name, type, default and help are written once.

A section is a frozen dataclass whose fields are made by `flag`. `num_layers: int` becomes `--num-layers`,
`bool` becomes `--x / --no-x`, a tuple takes several values, `choices` are checked, and a field without a
default is required. Two sections with the same field name are a programming error: flags share one namespace.
"""

import argparse
import dataclasses
import difflib
import types
import typing

from megatron.errors import ConfigurationError

REQUIRED = dataclasses.MISSING


def flag(default=REQUIRED, help: str = "", *, choices=None, aliases=(), metavar=None):
    """Declare one field of a section together with its command-line flag."""
    metadata = {"help": help, "choices": choices, "aliases": aliases, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def spelling(name: str) -> str:
    """Return the flag of a field: `num_layers` is `--num-layers`."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `ConfigurationError`s with a suggestion."""

    def error(self, message):
        raise ConfigurationError(message)

    def parse_known(self, arguments):
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            asked = unknown[0].split("=")[0]
            close = difflib.get_close_matches(asked, self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists every flag"
            raise ConfigurationError(f"unknown flag {asked}{hint}")
        return namespace


class HelpFormatter(argparse.HelpFormatter):
    """Show the default of every flag that has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=110)

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS, REQUIRED, ()):
            return action.help
        return f"{action.help} (default: {action.default})"


def add_section(parser: argparse.ArgumentParser, section: type, defaults: dict) -> None:
    """Add the flags of one dataclass as a group; `defaults` (a recipe's) win over the fields' own."""
    title, _, description = (section.__doc__ or section.__name__).strip().partition("\n")
    group = parser.add_argument_group(title.rstrip("."), description.strip() or None)
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if not field.metadata:
            continue
        names = [spelling(field.name), *field.metadata["aliases"]]
        default = defaults.get(field.name, field.default)
        # argparse formats help with %, so a literal percent sign is doubled
        options = {"dest": field.name, "help": field.metadata["help"].replace("%", "%%")}
        options |= {"required": True} if default is REQUIRED else {"default": default}
        kind = _plain(hints[field.name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": field.metadata["metavar"]}
        else:
            options |= {"type": _number(kind), "choices": field.metadata["choices"]}
            options["metavar"] = field.metadata["metavar"] or (
                None if field.metadata["choices"] else kind.__name__.upper()
            )
        group.add_argument(*names, **options)


def _plain(kind):
    """`X | None` is X: None only says that there is no value yet."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _number(kind):
    """Integers may be written 100000, 100_000 or 1e5."""
    if kind is not int:
        return kind

    def integer(text: str) -> int:
        value = float(text)
        if value != int(value):
            raise ValueError
        return int(text) if text.lstrip("-").replace("_", "").isdigit() else int(value)

    integer.__name__ = "int"
    return integer


def build(section: type, namespace: argparse.Namespace):
    """Construct one section from parsed flags; the section checks its own fields."""
    values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(section) if f.metadata}
    return section(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def require(condition: bool, name: str, value, rule: str) -> None:
    """Raise the one-line error of a field: `--name value` and the rule it must satisfy."""
    if not condition:
        raise ConfigurationError(f"{spelling(name)} {value}: {rule}")
