"""JSON lines: each line of a .jsonl file is a document, its text a field."""

import codecs
import io
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron.data.compressed import Readable, disk_position, is_damage
from megatron.data.sources import base
from megatron.data.sources.base import BadRecord, Record
from megatron.data.text_files import open_text

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Lines:
    """A chunk: whole lines, of which the first has the number `first`."""

    path: str
    first: int
    data: bytes
    size: int

    def records(self, keys: tuple[str, ...]) -> Iterator[Record | BadRecord]:
        """Yield the documents; blank lines are none."""
        data = self.data.removeprefix(codecs.BOM_UTF8) if self.first == 1 else self.data
        for number, line in enumerate(data.split(b"\n"), self.first):
            if len(line) > base.LONGEST_DOCUMENT:
                yield base.too_long(f"--input {self.path}: line {number}", "fix or remove it")
            elif line and not line.isspace():
                try:
                    yield Record(f"{self.path}:{number}", _texts(line, keys, f"--input {self.path}: line {number}"))
                except BadRecord as error:
                    yield error


class JsonLines:
    """A file of JSON lines, or standard input."""

    def __init__(self, path: str, size: int | None, identity: tuple | None):
        self._path, self.size, self.identity = path, size, identity
        self.path = None if path == STANDARD_INPUT else path

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Lines | base.Given]:
        """Yield chunks of whole lines."""
        first, rest, position = 1, b"", 0
        with self._open() as file:
            for block in _blocks(file):
                data, newline, rest = (rest + block).rpartition(b"\n")
                position, size = disk_position(file), disk_position(file) - position
                if newline:
                    yield Lines(self._path, first, data, size)
                    first += data.count(b"\n") + 1
                elif len(rest) > base.LONGEST_DOCUMENT:
                    where = f"--input {self._path}: line {first}"
                    yield base.Given((base.too_long(where, "fix or remove it"),), size)
                    rest, first = _after_line(file), first + 1
            if rest:
                yield Lines(self._path, first, rest, 0)

    def _open(self) -> AbstractContextManager[Readable]:
        if self._path == STANDARD_INPUT:
            return nullcontext(io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)))
        return open_text(Path(self._path), f"--input {self._path}")


def _blocks(file: Readable) -> Iterator[bytes]:
    """Yield what is in a file, some CHUNK_BYTES at a time; of a damaged file also what comes before the damage.

    An error of the disk ends no block: the same file has the same blocks, which a run that resumes counts.
    """
    while True:
        parts, size = [], 0
        try:
            while size < base.CHUNK_BYTES and (part := file.read1(base.CHUNK_BYTES - size)):
                parts.append(part)
                size += len(part)
        except Exception as error:
            if is_damage(error):
                yield b"".join(parts)
            raise
        if not parts:
            return
        yield b"".join(parts)


def _after_line(file: Readable) -> bytes:
    """Read to the end of a line and return what was read of the next."""
    while block := file.read(base.CHUNK_BYTES):
        _, newline, rest = block.partition(b"\n")
        if newline:
            return rest
    return b""


def _texts(line: bytes, keys: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the texts of a line.

    Raises: BadRecord if it is not JSON or lacks one.
    """
    try:
        value, checked = orjson.loads(line), True
    except orjson.JSONDecodeError:  # stricter than the standard library, whose messages are known, too
        value, checked = _lenient(line, where), False
    texts = []
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            message = f'{where} has no field "{key}"; name the field that holds the text with --json-keys'
            raise BadRecord(message, f'no field "{key}"')
        text = value[key]
        if not isinstance(text, str):
            raise BadRecord(
                f'{where} has a value of type {type(text).__name__} in "{key}", not a string; name another field with '
                "--json-keys",
                "not a string",
            )
        texts.append(text if checked else _encodable(text, where))
    return tuple(texts)


def _lenient(line: bytes, where: str) -> object:
    try:
        return json.loads(line, parse_int=lambda digits: 0)  # only text is used, and int() refuses 4,301 digits
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8 ({error}); fix or remove it", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is not JSON ({error}); fix or remove it", "not JSON") from None


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where} is not text ({error}); fix or remove it", "lone surrogates") from None
    return text
