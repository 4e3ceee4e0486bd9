"""Reads files of text, compressed or not, in UTF-8 with or without a byte order mark."""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.data.compressed import SUFFIXES, DamagedFile, Readable, open_decompressed
from megatron.errors import ConfigurationError


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
            raise DamagedFile(
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
