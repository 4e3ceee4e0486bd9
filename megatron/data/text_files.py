"""Reads the user's text: .txt and .jsonl, also as .gz or .zst, in UTF-8 with or without a byte order mark."""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.data.compressed import SUFFIXES, Readable, open_decompressed
from megatron.data.corpus import Document
from megatron.errors import ConfigurationError

LONGEST_DOCUMENT = 64 << 20  # bytes; tokenisation takes a multiple of that in memory


def read_documents(paths: Iterable[str], key: str = "text", separator: str | None = None) -> Iterator[Document]:
    """Yield the documents that are not blank.

    Each line of a .jsonl file is a document, its field `key`. A .txt file is one document, or with a `separator`
    several, each ended by a line equal to it ("" is an empty line).

    Raises: ConfigurationError for a file or a line that cannot be read.
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
            for name, text in _json_texts(path, file, key) if kind == ".jsonl" else _txt_texts(path, file, separator):
                if text.strip():
                    yield Document(name, "", text)


def text_kind(path: Path) -> str:
    """Return the suffix of a text file without that of a compression, in lower case: ".jsonl" for "A.JSONL.gz"."""
    return Path(path.stem if path.suffix.lower() in SUFFIXES else path.name).suffix.lower()


def read_text(path: Path, named: str) -> str:
    """Return the text of a file, with its line ends unchanged.

    Raises: ConfigurationError if it cannot be read or is not UTF-8.
    """
    with open_text(path, named) as file:
        return decode_text(file.read(), named)


@contextmanager
def open_text(path: Path, named: str) -> Iterator[Readable]:
    """Yield the decompressed bytes of a text file.

    Raises: ConfigurationError if it cannot be read or is UTF-16.
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
    """Return UTF-8 bytes as text, without a byte order mark.

    Raises: ConfigurationError if they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{named}: is not UTF-8 ({error}); convert it with iconv -t UTF-8") from None


def json_lines(file: Readable, named: str) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) of each line that is not blank.

    Raises: ConfigurationError for a line that is not JSON.
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
    """Return `text`, which may contain lone surrogates from JSON escapes or from the bytes of a command line.

    Raises: ConfigurationError if it cannot be encoded as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{where} is not text ({error}); fix or remove it") from None
    return text


def _txt_texts(path: Path, file: Readable, separator: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document of a .txt file."""
    if separator is None:
        yield str(path), _decoded(str(path), file.read(LONGEST_DOCUMENT + 1))
        return
    lines, size, first = [], 0, 1
    for number, line in enumerate(file, 1):
        if line.rstrip(b"\r\n") == separator.encode():
            yield f"{path}:{first}", _decoded(f"{path}:{first}", b"".join(lines))
            lines, size, first = [], 0, number + 1
            continue
        lines.append(line)
        size += len(line)
        if size > LONGEST_DOCUMENT:
            break
    yield f"{path}:{first}", _decoded(f"{path}:{first}", b"".join(lines))


def _decoded(name: str, data: bytes) -> str:
    if len(data) > LONGEST_DOCUMENT:
        raise ConfigurationError(
            f"--input {name}: is one document of more than {LONGEST_DOCUMENT} bytes; "
            "name the line that ends a document with --txt-separator, '' for an empty one"
        )
    return decode_text(data, f"--input {name}")


def _json_texts(path: Path, file: Readable, key: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each line of a .jsonl file."""
    for number, record in json_lines(file, f"--input {path}"):
        yield f"{path}:{number}", _field(f"--input {path}: line {number}", record, key)


def _field(where: str, record: object, key: str) -> str:
    if not isinstance(record, dict) or key not in record:
        raise ConfigurationError(f'{where} has no field "{key}"; name the field that holds the text with --json-key')
    text = record[key]
    if not isinstance(text, str):
        raise ConfigurationError(
            f'{where} has a value of type {type(text).__name__} in "{key}", not a string; name another field with '
            "--json-key"
        )
    return check_encodable(text, where)
