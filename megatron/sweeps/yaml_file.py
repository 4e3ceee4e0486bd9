"""Reads the values of a YAML file by key; every mistake is one line with the file, the key, the rule and the remedy."""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigurationError

MERGE = "tag:yaml.org,2002:merge"


class UniqueKeys(yaml.SafeLoader):
    """YAML without objects, which refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        """Return a mapping."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise yaml.MarkedYAMLError(problem=f"{double} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


# numbers as in YAML 1.2 and on the command line: 1e-3 needs no dot
UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+e[-+]?[0-9]+$", re.I), list("-+0123456789")
)


class YamlFile:
    """The values of one file; every error names the file and the key, such as `variants.mdm.flags`."""

    def __init__(self, path: Path):
        self.path = path
        self.content = ""  # the text that `load` has parsed

    def error(self, key: str, message: str) -> ConfigurationError:
        """Return the error of a key."""
        return ConfigurationError(f"{self.path}: {key}: {message}" if key else f"{self.path}: {message}")

    def load(self) -> Any:
        """Return the content of the file.

        Raises: ConfigurationError if it cannot be read as YAML.
        """
        try:
            self.content = self.path.read_text(encoding="utf-8")
            content = yaml.load(self.content, UniqueKeys)  # a SafeLoader
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be read ({error.strerror}); name a YAML file") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, an impossible date
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or str(error)
            raise ConfigurationError(f"{self.path}{place}: is not YAML: {problem}; correct it") from None
        return {} if content is None else content

    def mapping(self, key: str, given: Any, known: Iterable[str] | None) -> dict:
        """Return a mapping whose keys are `known`; None allows any. Without a value, it is empty."""
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise self.error(key, f"{given}: is not a mapping; write `key: value` lines")
        for name in given if known is not None else ():
            if name not in (known or ()):
                raise self.error(f"{key}.{name}".lstrip("."), unknown_name(str(name), known or (), "key"))
        return given

    def named(self, key: str, given: Any) -> dict[str, Any]:
        """Return a mapping with its names as text: YAML reads 1 as a number, and "1" is the same name."""
        named = {str(name): value for name, value in self.mapping(key, given, None).items()}
        if given and len(named) < len(given):
            double = next(str(name) for name in given if not isinstance(name, str) and str(name) in given)
            raise self.error(f"{key}.{double}", "is given twice; drop one")
        return named

    def sequence(self, key: str, given: Any) -> list:
        """Return a list; None is an empty one."""
        if given is not None and not isinstance(given, list):
            raise self.error(key, f"{given}: is not a list; write [{given}]")
        return given or []

    def switch(self, key: str, given: Any) -> bool:
        """Return true or false."""
        if not isinstance(given, bool):
            raise self.error(key, f"{given}: is neither true nor false; correct it")
        return given

    def whole(self, key: str, given: Any, minimum: int) -> int:
        """Return a whole number of at least `minimum`."""
        value = self.number(key, given)
        if value != int(value) or value < minimum:
            raise self.error(key, f"{given}: must be a whole number of at least {minimum}; correct it")
        return int(value)

    def number(self, key: str, given: Any) -> float:
        """Return a number; YAML reads 1e-3, without a dot, as text."""
        try:
            if isinstance(given, bool) or given is None or not math.isfinite(float(given)):
                raise ValueError
            return float(given)
        except (TypeError, ValueError):
            raise self.error(key, f"{given}: is not a number; write it like 3, 0.1 or 1e-3") from None


def unknown_name(name: str, known: Iterable[str], kind: str) -> str:
    """Return what is wrong with an unknown name: the close one, or all where they are few."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else "pretrain_gpt.py --help lists all"
    if kind == "distribution" or (not close and len(names) <= 20):
        remedy = f"the names are {', '.join(names)}"
    return f"{name}: is an unknown {kind}; {remedy}"
