"""The user's own text, read one document at a time: .txt and .jsonl, each also as .gz or .zst."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron.data.corpus import Document
from megatron.errors import ConfigurationError

LONGEST_DOCUMENT = 64 << 20  # bytes; tokenising takes many times as much memory


def read_documents(paths: Iterable[str], key: str = "text", separator: str | None = None) -> Iterator[Document]:
    """Yield the documents that hold more than white space.

    A line of a .jsonl file is one, its field `key`. A .txt file is one, or several that end at each line equal to
    `separator` ("" is an empty line).
    """
    for path in map(Path, paths):
        kind = _kind(path)
        try:
            with _open(path) as file:
                for name, text in _lines(path, file, key) if kind == ".jsonl" else _parts(path, file, separator):
                    if text.strip():
                        yield Document(name, "", text)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigurationError(
                f"--input {path}: is damaged or cut ({error}); fetch or compress it anew"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"--input {path}: cannot be read ({error.strerror}); check its permissions and disk"
            ) from None


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    kind = path.with_suffix("").suffix.lower() if suffix in (".gz", ".zst") else suffix
    if not path.is_file():
        raise ConfigurationError(f"--input {path}: no such file; give the path of a text file")
    if kind not in (".txt", ".jsonl"):
        raise ConfigurationError(
            f"--input {path}: is neither .txt nor .jsonl, nor one of them with .gz or .zst; rename it"
        )
    return kind


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ConfigurationError(f"--input {path}: needs the package zstandard; pip install zstandard") from None
        return io.BufferedReader(_Zstandard(open(path, "rb"), zstandard))
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """All frames of a .zst file. The library's own reader ends in silence where the file was cut."""

    def __init__(self, file: BinaryIO, library):
        self._file, self._library = file, library
        self._frame, self._unread, self._ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._unread = self._unread or self._file.read(1 << 17)
            if not self._unread and self._frame is None:
                return 0
            if not self._unread:
                raise EOFError("a frame has no end")
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = self._frame.decompress(self._unread)
        except self._library.ZstdError as error:
            raise EOFError(error) from None
        self._unread = b""
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()


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
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--input {name}: is not UTF-8 ({error}); convert it with iconv -t UTF-8") from None


def _lines(path: Path, file: BinaryIO, key: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each line of a .jsonl file."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", _field(f"--input {path}: line {number}", line, key)


def _field(where: str, line: bytes, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where} is not JSON ({error}); mend or remove it") from None
    if not isinstance(record, dict) or key not in record:
        raise ConfigurationError(f'{where} has no field "{key}"; name the field that holds the text with --json-key')
    text = record[key]
    if not isinstance(text, str):
        raise ConfigurationError(
            f'{where} holds in "{key}" a {type(text).__name__}, no text; name another field with --json-key'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{where} is not text ({error}); mend or remove it") from None
    return text
