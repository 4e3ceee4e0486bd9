"""Reads files, decompressed by suffix (.gz .zst .bz2 .xz); errors tell damaged files from unsupported ones."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from megatron.errors import ConfigurationError

Readable = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | io.BufferedReader  # all have peek
SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# suffix -> name of the format, the bytes with which such a file begins, the library's reader
LIBRARY_READERS = {
    ".gz": ("gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": ("bzip2", b"BZh", bz2.BZ2File),
    ".xz": ("xz", b"\xfd7zXZ\0", lzma.LZMAFile),
}
LARGEST_WINDOW = 1 << 31  # bytes, zstd --long=31: the largest window of zstd
ZSTD_INPUT = 512  # bytes decompressed at a time; 4 bytes can decompress to a block of 128 KiB, so these to 16 MiB
# part of zstd's error message for an undamaged file: our message
ZSTD_LIMITS = {
    "requires too much memory": "needs a window of more than 2 GiB; compress it again with zstd --long=31 at most",
    "not enough memory": "needs a window larger than the free memory; compress it again without zstd's --long",
    "Dictionary mismatch": "was compressed with a dictionary; decompress it with zstd -d -D and give the result",
    "Unsupported frame parameter": "has a frame of a newer zstd; update the package zstandard, or decompress it",
}


class DamagedFile(ConfigurationError):
    """A file whose content cannot be read to the end, whatever the flags."""


@contextmanager
def open_decompressed(path: Path, named: str) -> Iterator[Readable]:
    """Yield the file for sequential reading; it need not fit into memory.

    Messages start with `named`, such as "--input FILE".

    Raises: DamagedFile for a damaged or truncated file, ConfigurationError for one that is unsupported, cannot be read,
        or was written while it was open.
    """
    suffix = path.suffix.lower()
    try:
        with ExitStack() as stack:
            file: Readable = stack.enter_context(open(path, "rb"))
            before = _identity(path)
            if suffix in LIBRARY_READERS:
                form, magic, library_reader = LIBRARY_READERS[suffix]
                if not magic.startswith(file.peek(len(magic))[: len(magic)]):
                    raise _not_as_named(named, form)
                file = stack.enter_context(library_reader(file))
            elif suffix == ".zst":
                frames: io.BufferedReader = io.BufferedReader(_ZstdFrames(file, named))
                file = stack.enter_context(frames)
            yield file
            if _identity(path) != before:
                raise ConfigurationError(f"{named}: changed while it was read; start again when nothing writes to it")
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise damaged(named, str(error)) from None
    except OSError as error:
        if error.strerror is None:  # of the bz2 library, for invalid data
            raise damaged(named, str(error)) from None
        raise ConfigurationError(
            f"{named}: cannot be read ({error.strerror}); check the path, its permissions and the disk"
        ) from None


def disk_position(file: Readable) -> int:
    """Return how many bytes of the file on disk have been read, 0 where that is unknown (a pipe)."""
    raw = getattr(file, "raw", file)
    for name in ("_fp", "fileobj", "_file"):  # of the readers of bz2 and xz, of gzip, and of zstd
        raw = getattr(raw, name, raw)
    try:
        return raw.tell()
    except OSError:
        return 0


def damaged(named: str, fault: str) -> DamagedFile:
    """Return the error of a damaged file."""
    return DamagedFile(f"{named}: is damaged or truncated ({fault}); download or compress it again")


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what differs after a file was written or replaced."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _not_as_named(named: str, form: str) -> ConfigurationError:
    return ConfigurationError(
        f"{named}: is not in {form}'s format; rename it if it is decompressed already, else download it again"
    )


def _zstandard(named: str) -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise ConfigurationError(
            f"{named}: needs the package zstandard, the extra zstd; pip install zstandard"
        ) from None
    return zstandard


class _ZstdFrames(io.RawIOBase):
    """All frames of a .zst file except skippable ones; the library's own reader does not notice a truncated file."""

    def __init__(self, file: io.BufferedReader, named: str):
        self._file, self._named, self._library = file, named, _zstandard(named)
        self._frame = None  # decompressor of the current frame
        self._frames_read = 0
        self._input = b""  # not yet decompressed
        self._output = memoryview(b"")  # not yet read by the caller; a view, since its slices are no copies

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(ZSTD_INPUT)
            if not self._input and self._frame is None:
                return 0
            if not self._input:
                raise EOFError("the file ends inside a frame")
            self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._library.ZstdError as error:
            raise self._fault(str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
            self._frames_read += 1

    def _fault(self, message: str) -> Exception:
        """Return the exception for an error of the library: EOFError if the file is damaged."""
        for text, meaning in ZSTD_LIMITS.items():
            if text in message:
                return ConfigurationError(f"{self._named}: {meaning}")
        if "Unknown frame descriptor" not in message:
            return EOFError(message)
        if self._frames_read:
            return EOFError("bytes after the last frame start no frame")
        return _not_as_named(self._named, "zstd")
