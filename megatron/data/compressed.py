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

Readable = gzip.GzipFile | io.BufferedReader  # both have peek and read1
SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# suffix -> name of the format, and the bytes with which such a file begins
FORMATS = {".gz": ("gzip", b"\x1f\x8b"), ".bz2": ("bzip2", b"BZh"), ".xz": ("xz", b"\xfd7zXZ\0")}
STREAM_BYTES = 1 << 20  # of text, decompressed at a time
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
            stack.enter_context(unchanged(path, named))
            form, magic = FORMATS.get(suffix, ("", b""))
            if not magic.startswith(file.peek(len(magic))[: len(magic)]):
                raise _not_as_named(named, form)
            if suffix == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif suffix in (".bz2", ".xz"):
                file = stack.enter_context(_buffered(_Streams(file, suffix)))
            elif suffix == ".zst":
                file = stack.enter_context(_buffered(_ZstdFrames(file, named)))
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise damaged(named, str(error)) from None
    except OSError as error:
        if is_damage(error):
            raise damaged(named, str(error)) from None
        raise unreadable(named, error) from None


def _buffered(raw: io.RawIOBase) -> io.BufferedReader:
    return io.BufferedReader(raw)


def disk_position(file: Readable) -> int:
    """Return how many bytes of the file on disk have been read, 0 where that is unknown (a pipe)."""
    raw = getattr(file, "raw", file)
    for name in ("fileobj", "_file"):  # of gzip's reader, and of ours
        raw = getattr(raw, name, raw)
    try:
        return raw.tell()
    except OSError:
        return 0


def is_damage(error: Exception) -> bool:
    """Return whether an error while reading is due to the content of the file, so that it recurs at the same place."""
    return getattr(error, "strerror", None) is None  # an OSError of the bz2 library has none


def damaged(named: str, fault: str) -> DamagedFile:
    """Return the error of a damaged file."""
    return DamagedFile(f"{named}: is damaged or truncated ({fault}); download or compress it again")


def unreadable(named: str, error: Exception) -> ConfigurationError:
    """Return the error of a file that the system does not let us read."""
    reason = getattr(error, "strerror", None)
    return ConfigurationError(f"{named}: cannot be read ({reason}); check the path, its permissions and the disk")


@contextmanager
def unchanged(path: str | Path, named: str) -> Iterator[None]:
    """Check that nobody writes to a file while it is read.

    Raises: ConfigurationError if somebody did, OSError if it is gone.
    """
    before = os.stat(path)
    yield
    after = os.stat(path)
    if any(getattr(before, name) != getattr(after, name) for name in ("st_ino", "st_size", "st_mtime_ns")):
        raise ConfigurationError(f"{named}: changed while it was read; start again when nothing writes to it")


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


class _Streams(io.RawIOBase):
    """All streams of a .bz2 or .xz file; the libraries' own readers take a damaged stream for the end of the file."""

    def __init__(self, file: io.BufferedReader, suffix: str):
        self._file, self._suffix = file, suffix
        self._stream: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = None
        self._input = b""  # not yet decompressed
        self._output = memoryview(b"")  # not yet read by the caller

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            if self._stream is None and not self._next_stream():
                return 0
            self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _next_stream(self) -> bool:
        """Begin the next stream; return whether there is one."""
        while True:
            if self._suffix == ".xz":
                self._input = self._input.lstrip(b"\0")  # padding between streams
            if self._input:
                break
            self._input = self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not self._input:
                return False
        self._stream = bz2.BZ2Decompressor() if self._suffix == ".bz2" else lzma.LZMADecompressor()
        return True

    def _decompress(self) -> None:
        assert self._stream is not None
        if self._stream.needs_input and not self._input:
            self._input = self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not self._input:
                raise EOFError("the file ends inside a stream")
        self._output = memoryview(self._stream.decompress(self._input, STREAM_BYTES))
        self._input = b""
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None


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
