"""Command-line flags generated from dataclass fields: name, type, default and help are written once.

A section is a frozen dataclass whose fields are declared with `flag`. `num_layers: int` becomes `--num-layers`,
`bool` becomes `--x / --no-x`, a tuple takes several values, `choices` are checked, and a field without a
default is required. A field declares its range and the flags that it needs or excludes; a `Section` checks them and
--help shows them. All flags share one namespace, so the same field name in two sections is a programming error.
"""

import argparse
import dataclasses
import difflib
import math
import textwrap
import types
import typing
from typing import Any

from megatron.config.ranges import Range
from megatron.errors import ConfigurationError

REQUIRED = dataclasses.MISSING


def flag(
    default: Any = REQUIRED,
    help: str = "",
    *,
    choices=None,
    metavar=None,
    within: str | None = None,
    needs: str | None = None,
    excludes: str | tuple[str, ...] = (),
) -> Any:
    """Return the dataclass field of a section, with the metadata of its command-line flag.

    Values other than None lie `within` an interval, such as "[0, 1)". A value other than the default does nothing
    without the field `needs`, and excludes the fields `excludes`: names of fields of the same section, which then
    have other values than their defaults, or a name and a value, such as "optimizer muon".
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "metavar": metavar,
            "within": Range.parse(within) if within else None,
            "needs": (needs,) if needs else (),
            "excludes": (excludes,) if isinstance(excludes, str) else excludes,
        },
    )


class Section:
    """Base class of the sections, which are frozen dataclasses: checks what the fields declare."""

    def __post_init__(self):
        check_fields(self)


def check_fields(section) -> None:
    """Check the fields of a section against the ranges, needs and exclusions that they declare.

    Raises: ConfigurationError for the first field that breaks one.
    """
    fields = {field.name: (field, getattr(section, field.name)) for field in dataclasses.fields(section)}
    for name, (field, value) in fields.items():
        within = field.metadata["within"]
        if within and value is not None:
            remedy = "change it" if field.default is REQUIRED else "change it, or leave it out for the default"
            require(value in within, name, value, f"{within.requirement}; {remedy}")
    given = [(name, field.metadata, value) for name, (field, value) in fields.items() if value != field.default]
    for name, metadata, value in given:
        for other in metadata["excludes"]:
            message = f"excludes {_typed_relation(section, other)}; give one of them"
            require(not _is_given(section, other), name, value, message)
        for other in metadata["needs"]:
            message = f"does nothing without {_spelled_relation(other)}; give both or neither"
            require(_is_given(section, other), name, value, message)


def _is_given(section, relation: str) -> bool:
    """Return whether a section has the value of a relation ("optimizer muon"), or another than the default ("lr")."""
    name, _, wanted = relation.partition(" ")
    value = getattr(section, name)
    return value == wanted if wanted else value not in (getattr(type(section), name), "", ())


def _spelled_relation(relation: str) -> str:
    """Return a relation as it is typed: `--optimizer muon`, `--lr`."""
    name, space, wanted = relation.partition(" ")
    return spelling(name) + space + wanted


def _typed_relation(section, relation: str) -> str:
    """Return the field of a relation and its value as a user types them."""
    name = relation.partition(" ")[0]
    return typed(name, getattr(section, name))


def spelling(name: str) -> str:
    """Return the flag of a field: `num_layers` is `--num-layers`."""
    return "--" + name.replace("_", "-")


def typed(name: str, value) -> str:
    """Return a field and its value as a user types them: `--lr 0.1`, `--fp32`, `--no-fp32`; `no --lr` if unset."""
    if isinstance(value, bool):
        return spelling(name) if value else spelling("no_" + name)
    if value in (None, (), []):
        return f"no {spelling(name)}"
    if value == "":
        return f"{spelling(name)} ''"
    return f"{spelling(name)} {' '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"


def typed_flags(arguments: list[str]) -> set[str]:
    """Return the flags of a command line, `--no-x` as `--x`."""
    return {argument.split("=")[0].replace("--no-", "--") for argument in arguments if argument.startswith("--")}


def one_namespace(sections: dict[str, type]) -> dict[str, type]:
    """Return `sections`.

    Raises: TypeError if two of their fields claim one flag.
    """
    owners = {}
    for section in sections.values():
        for field in dataclasses.fields(section):
            if field.name in owners:
                raise TypeError(
                    f"{spelling(field.name)} is claimed by {owners[field.name]} and by {section.__name__}.{field.name}"
                )
            owners[field.name] = f"{section.__name__}.{field.name}"
    return sections


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigurationError` with a remedy."""

    def __init__(self, **options):
        super().__init__(exit_on_error=False, **options)

    def parse_known(self, arguments):
        """Return the namespace of a command line.

        Raises: ConfigurationError for an unknown or missing flag or an invalid value.
        """
        namespace, unknown = self.parse_some(arguments)
        if unknown:
            raise ConfigurationError(self._suggestion(unknown[0].split("=")[0]))
        missing = [spelling(name) for name, value in vars(namespace).items() if value is REQUIRED]
        if missing:
            raise ConfigurationError(f"{_enumerate(missing)}: required and not given; --help describes them")
        return namespace

    def parse_some(self, arguments):
        """Return the namespace of the known flags, and all other words.

        Raises: ConfigurationError for an invalid value.
        """
        try:
            return self.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            raise ConfigurationError(_in_our_words(error)) from None

    def _suggestion(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word}: belongs to no flag; each flag is followed by its own values"
        close = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"unknown flag {word}; " + (f"did you mean {close[0]}?" if close else "--help lists every flag")


class HelpFormatter(argparse.HelpFormatter):
    """Help of 110 columns, whose usage line names only the required flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=110)

    def add_usage(self, usage, actions, groups, prefix=None):
        """Add the usage line."""
        required = [f"{action.option_strings[0]} {action.metavar}" for action in actions if action.default is REQUIRED]
        super().add_usage(usage or " ".join(["%(prog)s", *required, "[FLAG ...]"]), actions, groups, prefix)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)  # flags are not broken at hyphens


class DescribedFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help of a command that keeps the line breaks of its description."""


def add_section(parser: argparse.ArgumentParser, section: type, defaults: dict, registered: dict | None = None) -> None:
    """Add the flags of a section as an argument group; `defaults` (of a recipe) override those of the fields.

    `registered[field]` maps the choices of a field that are registered elsewhere to their descriptions.
    """
    title, _, description = (section.__doc__ or section.__name__).strip().partition("\n")
    group = parser.add_argument_group(title.rstrip("."), description.strip() or None)
    hints = typing.get_type_hints(section)
    registered = registered or {}
    for field in dataclasses.fields(section):
        kind, default = _plain(hints[field.name]), defaults.get(field.name, field.default)
        # `parse_known` checks required flags, all at once and with our message
        options = {"dest": field.name, "default": default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
            choices = field.metadata["choices"] or tuple(registered.get(field.name, ()))
            options |= {"type": _reader(item, choices), "metavar": field.metadata["metavar"] or item.__name__.upper()}
            options |= {"nargs": "+"} if item is not kind else {}
            if choices and not field.metadata["metavar"]:
                options["metavar"] = "{" + ",".join(choices) + "}"
        action = group.add_argument(spelling(field.name), **options)
        described = [f"{name}: {text}" for name, text in registered.get(field.name, {}).items()]
        action.help = _described("; ".join([field.metadata["help"], *described]), field.metadata, default)


def _described(help: str, metadata, default) -> str:
    """Return the help with constraints and default; argparse formats it with %, so percent signs are doubled."""
    notes = [str(metadata["within"])] if metadata["within"] else []
    notes += [f"needs {_spelled_relation(other)}" for other in metadata["needs"]]
    notes += [f"excludes {_spelled_relation(other)}" for other in metadata["excludes"]]
    if default is REQUIRED:
        notes.append("required")
    elif default not in (None, ()):
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, tuple):
            default = " ".join(map(str, default))
        notes.append(f"default: {default}")
    return f"{help} ({'; '.join(notes)})".replace("%", "%%") if notes else help.replace("%", "%%")


def _plain(kind):
    """Return X for `X | None`."""
    if isinstance(kind, types.UnionType):
        return next(member for member in typing.get_args(kind) if member is not type(None))
    return kind


def _reader(kind: type, choices):
    """Return the function that parses one value of a flag; its error message follows the name of the flag."""

    def read(text: str):
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"{text}: is not one of {', '.join(choices)}")
        return parse_number(kind, text) if kind in (int, float) else kind(text)

    return read


def parse_number(kind: type, text: str) -> int | float:
    """Return a finite number; integers may be written as 100000, 100_000 or 1e5.

    Raises: ArgumentTypeError for other text, with a message that follows the name of the flag.
    """
    try:
        value = float(text)
    except ValueError:
        example = "100000, 100_000 or 1e5" if kind is int else "0.1 or 1e-3"
        raise argparse.ArgumentTypeError(f"{text}: is not a number; write it like {example}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: is not a finite number; give one")
    if kind is float:
        return value
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text}: is not a whole number; give one")
    try:
        return int(text)  # exact, where a float would round
    except ValueError:
        return int(value)


def _in_our_words(error: argparse.ArgumentError) -> str:
    """Return an error of argparse as one line: flag, value, requirement, remedy."""
    if "expected" in error.message:
        return f"{error.argument_name}: is not followed by a value; give one"
    if "explicit argument" in error.message:
        return f"{error.argument_name}: takes no value; write the flag alone"
    return f"{error.argument_name} {error.message}"


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def build(section: type, namespace: argparse.Namespace):
    """Return a section built from parsed flags; the section checks its own fields."""
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(section)}
    return section(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def require(condition: bool, name: str, value, message: str) -> None:
    """Check a field of a section.

    Raises: ConfigurationError with the line `--name value: message` unless `condition` holds.
    """
    if not condition:
        raise ConfigurationError(f"{typed(name, value)}: {message}")
