"""The data sets of a run, from --train-data-path, --valid-data-path, their files and --split."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megatron.config.sections import DataConfig
from megatron.config.subsets import TokenCount
from megatron.data.text_files import read_text
from megatron.errors import ConfigurationError

PAIRS = "write PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..."
TRAIN_PAIRS = "write PREFIX, or WEIGHT PREFIX [UNIQUE_TOKENS] WEIGHT PREFIX [UNIQUE_TOKENS] ..."
PUBLISHED_LINE = re.compile(r'\s*"[^"]*"(\s+"[^"]*")*\s*')


@dataclass(frozen=True)
class DataSet:
    """A set: the data prefixes of its members with their weights in the blend, and its share of --split.

    `unique_tokens` has the number of tokens to which each member is cut, None for all; it is empty if none is cut.
    """

    name: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    split_index: int | None = None  # 0, 1, 2: training, validation, test
    unique_tokens: tuple[TokenCount | None, ...] = ()

    def cuts(self) -> tuple[TokenCount | None, ...]:
        """Return `unique_tokens`, None for every member if none is cut."""
        return self.unique_tokens or (None,) * len(self.prefixes)


class _Member(NamedTuple):
    """A member of a set as typed."""

    weight: str
    prefix: str
    unique_tokens: str | None = None

    def words(self) -> list[str]:
        return [word for word in self if word is not None]


def requested_sets(data: DataConfig, with_test: bool) -> tuple[DataSet, list[DataSet]]:
    """Return the training set and the held-out sets; `with_test` includes the test set of --split.

    Raises: ConfigurationError if the flags name no training set or contradict each other.
    """
    train_items, train_source = _items(data, "train")
    if not train_items:
        raise ConfigurationError("--train-data-path is required; tools/preprocess_data.py writes one from text")
    train = _cut(_blend("train", train_items, train_source, 0 if data.split else None), data, train_source)
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
    WEIGHT PREFIX, or NAME=PREFIX, and a prefix may contain spaces; or several pairs in one line. In both, a pair may be
    followed by the unique tokens of the member, "0.3 a 1000". Empty lines and lines that begin with # are ignored.

    Raises: ConfigurationError for a file that cannot be read, a malformed line, or no entry.
    """
    text = read_text(Path(path), named)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    words = []
    for line in lines:
        if '"' not in line:
            entry = _entry(line)
            if (
                len(entry) == 1 and len(words) > 1 and "=" not in line
            ):  # a number before it would be taken for its weight
                raise ConfigurationError(f"{named}: {entry[0]} is not a weight; {TRAIN_PAIRS}")
            words += entry
            continue
        entries = [entry.split() for entry in re.findall(r'"([^"]*)"', line)]
        if not PUBLISHED_LINE.fullmatch(line) or any(not _is_member(entry) for entry in entries):
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
    if len(words) == 1 or _number(words[0]) is None:
        return [line.strip()]
    try:
        return [word for member in _members(words) for word in member.words()]
    except ValueError:  # a prefix with spaces
        weight, prefix = line.split(maxsplit=1)
    if len(words) == 3 or _token_count(words[-1]) is None:
        return [weight, prefix.strip()]
    return [weight, *(word.strip() for word in prefix.rsplit(maxsplit=1))]


def _is_member(words: list[str]) -> bool:
    """Return whether words within quotes are WEIGHT PREFIX or WEIGHT PREFIX UNIQUE_TOKENS."""
    return len(words) == 2 or (len(words) == 3 and _token_count(words[2]) is not None)


def _members(words: Sequence[str]) -> list[_Member]:
    """Return the members of a set of one prefix, or of WEIGHT PREFIX [UNIQUE_TOKENS] repeated.

    Every member of a blend has a weight, so of two numbers between prefixes the first belongs to the member before
    them, and a single one is a weight; after the last prefix there are unique tokens only.

    Raises: ValueError with the fault.
    """
    if len(words) == 1:
        return [_Member("1", words[0])]
    members, rest = [], list(words)
    while rest:
        weight = rest.pop(0)
        if _number(weight) is None:
            raise ValueError(f"{weight} is not a weight")
        if not rest:
            raise ValueError("a weight has no prefix")
        prefix, unique_tokens = rest.pop(0), None
        if rest and _token_count(rest[0]) is not None and (len(rest) == 1 or _number(rest[1]) is not None):
            unique_tokens = rest.pop(0)
        members.append(_Member(weight, prefix, unique_tokens))
    return members


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
    """Return a set of one data prefix, or of weight, prefix and perhaps unique tokens of every member."""
    training = name == "train"
    try:
        members = _members(words)
    except ValueError as error:
        form = TRAIN_PAIRS if training else PAIRS + ", or NAME=PREFIX of every set"
        raise ConfigurationError(f"{named}: {error}; {form}") from None
    weights, prefixes, counts = zip(*members)
    cuts = [(prefix, count) for prefix, count in zip(prefixes, counts) if count is not None]
    for prefix, count in cuts:
        if not training:
            raise ConfigurationError(
                f"{named}: {count} after {prefix} would be its unique tokens, which only training data have; "
                "validation reads whole sets, of which --eval-iters is the number of batches; leave it out"
            )
        if TokenCount(count) < 1:
            raise ConfigurationError(f"{named}: the unique tokens {count} of {prefix} must be positive; change them")
    for weight, prefix in zip(weights, prefixes):
        if not 0 < float(weight) < math.inf:
            raise ConfigurationError(
                f"{named}: the weight {weight} of {prefix} is not a positive number; change it or leave the set out"
            )
    if len(set(prefixes)) < len(prefixes):
        duplicate = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise ConfigurationError(f"{named}: names {duplicate} twice; add its weights")
    unique_tokens = tuple(None if count is None else TokenCount(count) for count in counts) if cuts else ()
    values = tuple(float(weight) for weight in weights)
    return DataSet(name, prefixes, values, split_index, unique_tokens=unique_tokens)


def _cut(train: DataSet, data: DataConfig, named: str) -> DataSet:
    """Return the training set, cut to --train-unique-tokens if that is given."""
    count = data.train_unique_tokens
    if count is None:
        return train
    if len(train.prefixes) > 1:
        raise ConfigurationError(
            f"--train-unique-tokens {count}: cuts one data set, and --train-data-path blends {len(train.prefixes)}; "
            "drop it, and give members their own: WEIGHT PREFIX UNIQUE_TOKENS"
        )
    if train.unique_tokens:
        raise ConfigurationError(
            f"--train-unique-tokens {count}: {named} gives the unique tokens {train.unique_tokens[0]}; drop one of them"
        )
    return replace(train, unique_tokens=(TokenCount(count),))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _token_count(word: str) -> TokenCount | None:
    try:
        return TokenCount(word)
    except ArgumentTypeError:
        return None
