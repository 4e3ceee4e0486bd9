"""The user's own text: .txt and .jsonl, each also as .gz or .zst, in UTF-8 with or without a byte order mark."""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron.data.compressed import SUFFIXES, open_decompressed
from megatron.data.corpus import Document
from megatron.errors import ConfigurationError

LONGEST_DOCUMENT = 64 << 20  # bytes; tokenising takes many times as much memory


def read_documents(paths: Iterable[str], key: str = "text", separator: str | None = None) -> Iterator[Document]:
    """Yield the documents that hold more than white space.

    A line of a .jsonl file is one, its field `key`. A .txt file is one, or several that end at each line equal to
    `separator` ("" is an empty line).
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigurationError(f"--input {path}: no such file; give the path of a text file")
        kind = text_kind(path)
        if kind not in (".txt", ".jsonl"):
            raise ConfigurationError(
                f"--input {path}: is neither .txt nor .jsonl, nor one of them with .gz or .zst; rename it"
            )
        with open_text(path, f"--input {path}") as file:
            for name, text in _lines(path, file, key) if kind == ".jsonl" else _parts(path, file, separator):
                if text.strip():
                    yield Document(name, "", text)


def text_kind(path: Path) -> str:
    """Return the ending that says what a file holds, in lower case: ".jsonl" of "A.JSONL.gz"."""
    return Path(path.stem if path.suffix.lower() in SUFFIXES else path.name).suffix.lower()


def read_text(path: Path, named: str) -> str:
    """Return all text of a file, its line ends as they are.

    Raises: ConfigurationError.
    """
    with open_text(path, named) as file:
        return decode_text(file.read(), named)


@contextmanager
def open_text(path: Path, named: str) -> Iterator[BinaryIO]:
    """Yield the decompressed bytes of a text file.

    Raises: ConfigurationError.
    """
    with open_decompressed(path, named) as file:
        start = file.peek(2)[:2]
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start:
            raise ConfigurationError(
                f"{named}: is not UTF-8 (it begins with the bytes {start.hex(' ')}, as UTF-16 does); "
                "convert it with iconv -f UTF-16 -t UTF-8"
            )
        yield file


def decode_text(data: bytes, named: str) -> str:
    """Return the text of UTF-8, without the byte order mark that may precede it.

    Raises: ConfigurationError.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{named}: is not UTF-8 ({error}); convert it with iconv -t UTF-8") from None


def json_lines(file: BinaryIO, named: str) -> Iterator[tuple[int, object]]:
    """Yield the number and the value of each line that is not empty.

    Raises: ConfigurationError.
    """
    for number, line in enumerate(file, 1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{named}: line {number} is not JSON ({error}); fix or remove it") from None
        yield number, value


def check_encodable(text: str, where: str) -> str:
    """Return `text`; it may hold half a character, which has no UTF-8, in JSON's escapes or a command line's bytes.

    Raises: ConfigurationError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{where} is not text ({error}); fix or remove it") from None
    return text


def _parts(path: Path, file: BinaryIO, separator: str | None) -> Iterator[tuple[str, str]]:
    """Yield name and text of each document of a .txt file."""
    if separator is None:
        yield str(path), _decoded(str(path), file.read(LONGEST_DOCUMENT + 1))
        return
    held, size, first = [], 0, 1
    for number, line in enumerate(file, 1):
        if line.rstrip(b"\r\n") == separator.encode():
            yield f"{path}:{first}", _decoded(f"{path}:{first}", b"".join(held))
            held, size, first = [], 0, number + 1
            continue
        held.append(line)
        size += len(line)
        if size > LONGEST_DOCUMENT:
            break
    yield f"{path}:{first}", _decoded(f"{path}:{first}", b"".join(held))


def _decoded(name: str, data: bytes) -> str:
    if len(data) > LONGEST_DOCUMENT:
        raise ConfigurationError(
            f"--input {name}: is one document of more than {LONGEST_DOCUMENT} bytes; "
            "name the line that ends a document with --txt-separator, '' for an empty one"
        )
    return decode_text(data, f"--input {name}")


def _lines(path: Path, file: BinaryIO, key: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each line of a .jsonl file."""
    for number, record in json_lines(file, f"--input {path}"):
        yield f"{path}:{number}", _field(f"--input {path}: line {number}", record, key)


def _field(where: str, record: object, key: str) -> str:
    if not isinstance(record, dict) or key not in record:
        raise ConfigurationError(f'{where} has no field "{key}"; name the field that holds the text with --json-key')
    text = record[key]
    if not isinstance(text, str):
        raise ConfigurationError(
            f'{where} holds in "{key}" a {type(text).__name__}, no text; name another field with --json-key'
        )
    return check_encodable(text, where)
