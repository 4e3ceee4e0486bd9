"""The data sets of a run, from --train-data-path, --valid-data-path, their files and --split."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections import DataConfig
from megatron.data.text_files import read_text
from megatron.errors import ConfigurationError

PAIRS = "write PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..."
PUBLISHED_LINE = re.compile(r'\s*"[^"]*"(\s+"[^"]*")*\s*')


@dataclass(frozen=True)
class DataSet:
    """A set: the data prefixes of its members with their weights in the blend, and its share of --split."""

    name: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    split_index: int | None = None  # 0, 1, 2: training, validation, test


def requested_sets(data: DataConfig, with_test: bool) -> tuple[DataSet, list[DataSet]]:
    """Return the training set and the held-out sets; `with_test` includes the test set of --split.

    Raises: ConfigurationError if the flags name no training set or contradict each other.
    """
    train_items, train_source = _items(data, "train")
    if not train_items:
        raise ConfigurationError("--train-data-path is required; tools/preprocess_data.py writes one from text")
    train = _blend("train", train_items, train_source, 0 if data.split else None)
    valid_items, valid_source = _items(data, "valid")
    if valid_items or not data.split:
        return train, _held_out(valid_items, valid_source)
    shares = [*data.split_shares, 0.0, 0.0]
    names = {1: "validation", 2: "test"} if with_test else {1: "validation"}
    return train, [
        DataSet(name, train.prefixes, train.weights, index) for index, name in names.items() if shares[index] > 0
    ]


def split_edges(shares: Sequence[float], documents: int) -> list[int]:
    """Return the document numbers at which training, validation and test begin and end, [4].

    Rounded as in Megatron's get_train_valid_test_split_: the rounding error of the sum is subtracted from every edge.
    """
    shares, edges = [*shares, 0.0, 0.0][:3], [0]
    for share in shares:
        edges.append(edges[-1] + round(share / sum(shares) * documents))
    excess = edges[-1] - documents
    return [0] + [edge - excess for edge in edges[1:]]


def _items(data: DataConfig, kind: str) -> tuple[list[str], str]:
    """Return the words of a path flag or of its file, and their name in messages."""
    path, words = getattr(data, f"{kind}_data_path_file"), getattr(data, f"{kind}_data_path")
    if path is None:
        return list(words), f"--{kind}-data-path {' '.join(words)}"
    return read_path_file(path, f"--{kind}-data-path-file {path}"), f"--{kind}-data-path-file {path}"


def read_path_file(path: str, named: str) -> list[str]:
    """Return the words of a path file, in the form of the values of the flag.

    The published form is one line of quoted pairs, "0.3 a" "0.7 b". The plain form has one entry a line: PREFIX,
    WEIGHT PREFIX, or NAME=PREFIX, and a prefix may contain spaces; or several pairs in one line. Empty lines and
    lines that begin with # are ignored.

    Raises: ConfigurationError for a file that cannot be read, a malformed line, or no entry.
    """
    text = read_text(Path(path), named)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    words = []
    for line in lines:
        if '"' not in line:
            words += _entry(line)
            continue
        entries = [entry.split() for entry in re.findall(r'"([^"]*)"', line)]
        if not PUBLISHED_LINE.fullmatch(line) or any(len(entry) != 2 for entry in entries):
            raise ConfigurationError(
                f'{named}: the line {line.strip()[:60]!r} is not of the form "WEIGHT PREFIX" "WEIGHT PREFIX" ...; '
                "fix it, or write one WEIGHT PREFIX a line without quotes"
            )
        words += [word for entry in entries for word in entry]
    if not words:
        raise ConfigurationError(f"{named}: names no data set; write one WEIGHT PREFIX a line")
    return words


def _entry(line: str) -> list[str]:
    """Return the words of a line without quotes."""
    words = line.split()
    if len(words) % 2 == 0 and all(_number(word) is not None for word in words[::2]):
        return words
    weight, *prefix = line.split(maxsplit=1)
    return [weight, prefix[0].strip()] if prefix and _number(weight) is not None else [line.strip()]


def _held_out(words: list[str], named: str) -> list[DataSet]:
    """Return the sets of --valid-data-path: named sets, or one data prefix or blend with the name "validation"."""
    if not words:
        return []
    if not all(re.fullmatch(r"[\w-]+=.+", word) for word in words):
        return [_blend("validation", words, named, None)]
    pairs = [word.split("=", 1) for word in words]
    if len(dict(pairs)) < len(pairs):
        raise ConfigurationError(f"{named}: two sets share a name; give each its own")
    return [DataSet(name, (prefix,), (1.0,)) for name, prefix in pairs]


def _blend(name: str, words: list[str], named: str, split_index: int | None) -> DataSet:
    """Return a set of one data prefix, or of pairs of weight and prefix."""
    if len(words) == 1:
        words = ["1", *words]
    weights, prefixes = words[::2], words[1::2]
    form = PAIRS + (", or NAME=PREFIX of every set" if name == "validation" else "")
    invalid = [word for word in weights if _number(word) is None]
    if invalid or len(weights) != len(prefixes):
        fault = f"{invalid[0]} is not a weight" if invalid else "a weight has no prefix"
        raise ConfigurationError(f"{named}: {fault}; {form}")
    for weight, prefix in zip(weights, prefixes):
        if not 0 < float(weight) < math.inf:
            raise ConfigurationError(
                f"{named}: the weight {weight} of {prefix} is not a positive number; change it or leave the set out"
            )
    if len(set(prefixes)) < len(prefixes):
        duplicate = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise ConfigurationError(f"{named}: names {duplicate} twice; add its weights")
    return DataSet(name, tuple(prefixes), tuple(float(weight) for weight in weights), split_index)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
