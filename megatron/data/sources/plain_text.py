"""Plain text: a file is one document, or several that a separating line ends."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.data.compressed import Readable, disk_position, is_damage
from megatron.data.sources import base
from megatron.data.sources.base import BadRecord, Record
from megatron.data.text_files import open_text
from megatron.errors import ConfigurationError

TOO_LONG = "name the line that ends a document with --txt-separator, '' for an empty one"


@dataclass(frozen=True)
class Texts:
    """A chunk: names and encoded texts of documents."""

    documents: tuple[tuple[str, bytes], ...]
    size: int

    def records(self, keys: tuple[str, ...]) -> Iterator[Record | BadRecord]:
        """Yield the documents, decoded; `keys` has one entry."""
        for name, data in self.documents:
            if len(data) > base.LONGEST_DOCUMENT:
                yield base.too_long(f"--input {name}", TOO_LONG)
                continue
            try:
                yield Record(name, (data.decode(),))
            except UnicodeDecodeError as error:
                message = f"--input {name}: is not UTF-8 ({error}); convert it with iconv -t UTF-8"
                yield BadRecord(message, "not UTF-8")


class PlainText:
    """A file of plain text; without a `separator` it is one document, "" is an empty line."""

    def __init__(self, path: str, size: int, identity: tuple, *, separator: str | None = None):
        self.path = self._path = path
        self.size, self.identity, self._separator = size, identity, separator

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Texts]:
        """Yield chunks of whole documents."""
        if len(keys) > 1:
            raise ConfigurationError(
                f"--json-keys {' '.join(keys)}: --input {self._path} is plain text and has one document under one key; "
                "give one"
            )
        with open_text(Path(self._path), f"--input {self._path}") as file:
            if file.peek(3)[:3] == codecs.BOM_UTF8:
                file.read(3)
            position, size, documents = 0, 0, []
            try:
                for name, data in self._whole(file) if self._separator is None else self._separated(file):
                    documents.append((name, data))
                    size += len(data)
                    if size >= base.CHUNK_BYTES:
                        taken, position = disk_position(file) - position, disk_position(file)
                        yield Texts(tuple(documents), taken)
                        size, documents = 0, []
            except Exception as error:
                if is_damage(error):  # what comes before it is read; see `json_lines._blocks`
                    yield Texts(tuple(documents), disk_position(file) - position)
                raise
            yield Texts(tuple(documents), disk_position(file) - position)

    def _whole(self, file: Readable) -> Iterator[tuple[str, bytes]]:
        yield self._path, file.read(base.LONGEST_DOCUMENT + 1)

    def _separated(self, file: Readable) -> Iterator[tuple[str, bytes]]:
        """Yield (name, text) of each document; of one that is too long, only as much as shows it."""
        end = (self._separator or "").encode()
        lines, size, first, number, whole = [], 0, 1, 0, True
        while line := file.readline(base.LONGEST_DOCUMENT + 1):
            is_start, whole = whole, line.endswith(b"\n")  # else it is a part of a longer line
            number += whole
            if is_start and line.rstrip(b"\r\n") == end:
                yield f"{self._path}:{first}", b"".join(lines)
                lines, size, first = [], 0, number + 1
            elif size <= base.LONGEST_DOCUMENT:
                lines.append(line)
                size += len(line)
        yield f"{self._path}:{first}", b"".join(lines)
