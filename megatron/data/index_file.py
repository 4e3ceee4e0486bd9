"""Reads, checks and writes the index of Megatron's token files, PREFIX.idx, little endian:

"MMIDIDX\\0\\0" | u64 1 | u8 dtype code | u64 N | u64 M
| i32[N] tokens of each document | i64[N] byte offset in .bin | i64[M] document boundaries
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes 6 and 7 are floats, which cannot be token ids
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # entries checked or written at a time
WHOLE = 1 << 24  # entries up to which an index is checked as a whole when it is opened: 0.2 s
BLOCKS, BLOCK = 64, 1 << 13  # blocks that are checked in a larger index, and entries of a block


@dataclass(frozen=True)
class Index:
    """The content of an index file, memory-mapped and unchecked; `check` validates it.

    sizes: tokens of each entry, int32 [N]. An entry is a document, or a sentence in some of Megatron's files.
    offsets: start of each entry in the .bin file in bytes, int64 [N].
    boundaries: first entry of each document and the end of the last one, int64 [M].
    """

    path: Path
    mapped: mmap.mmap
    dtype: np.dtype
    sizes: np.ndarray
    offsets: np.ndarray
    boundaries: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Return the index in a file.

        Raises: ConfigurationError if it is not a Megatron index of integers, or is truncated.
        """
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise ConfigurationError(
                f"{path}: is not a Megatron index (it is empty or has another format); write it again"
            )
        _, version, code, count, boundaries = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise ConfigurationError(
                f"{path}: has version {version} and dtype code {code}; only version 1 and integers (1 to 5 and 8) "
                "are supported; write it again"
            )
        expected = HEADER.size + 12 * count + 8 * boundaries
        size = path.stat().st_size
        if size != expected:
            raise ConfigurationError(f"{path}: has {size} bytes and needs {expected}; it is truncated, write it again")
        mapped = map_file(path)
        return cls(
            path=path,
            mapped=mapped,
            dtype=np.dtype(DTYPES[code]),
            sizes=np.frombuffer(mapped, np.int32, count, HEADER.size),
            offsets=np.frombuffer(mapped, np.int64, count, HEADER.size + 4 * count),
            boundaries=np.frombuffer(mapped, np.int64, boundaries, HEADER.size + 12 * count),
        )

    @property
    def is_checked_whole(self) -> bool:
        """Whether `check` reads every entry."""
        return len(self.sizes) <= WHOLE

    def check(self) -> int:
        """Return the number of tokens of the index.

        Of more than WHOLE entries only blocks are checked, spread over the index, and that they lie in file order;
        `check_entries` checks others, before they are read.

        Raises: ConfigurationError if the index is inconsistent.
        """
        count = len(self.sizes)
        before = 0
        with nullcontext() if self.is_checked_whole else without_readahead(self.mapped):
            for first, last in _blocks(count):
                self.check_entries(first, last)
                if self.offsets[first] < self.offsets[before]:
                    raise self._misplaced(first, f"document {before} is at byte {self.offsets[before]}")
                before = first
            self.check_boundaries()
        return int(self._ends(count - 1, count)[0]) // self.dtype.itemsize if count else 0

    def check_entries(self, first: int, last: int) -> None:
        """Check entries first .. last-1: no size is negative, and each starts where the one before it ends.

        Raises: ConfigurationError for the first entry that does not.
        """
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            sizes, offsets = self.sizes[start:stop], self.offsets[start:stop]
            starts = self._ends(start - 1, stop - 1) if start else np.append(0, self._ends(0, stop - 1))
            wrong = np.flatnonzero((sizes < 0) | (starts != offsets))
            if len(wrong):
                entry = int(wrong[0])
                if sizes[entry] < 0:
                    raise ConfigurationError(
                        f"{self.path}: gives document {start + entry} {sizes[entry]} tokens; it is damaged, write it "
                        "again"
                    )
                raise self._misplaced(start + entry, f"its sizes put it at {starts[entry]}")

    def _ends(self, first: int, last: int) -> np.ndarray:
        """Return the ends of entries first .. last-1 in the .bin file in bytes, int64."""
        return self.offsets[first:last] + self.sizes[first:last].astype(np.int64) * self.dtype.itemsize

    def _misplaced(self, entry: int, expected: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.path}: puts document {entry} at byte {self.offsets[entry]}, and {expected}; it is damaged (a merge "
            f"that overflowed 32 bits?), {rebuild_command(self.path)}"
        )

    def check_boundaries(self, *, whole: bool = False) -> None:
        """Check that the document boundaries ascend from 0 to the number of entries N; they may end before N.

        Of more than WHOLE boundaries only blocks are checked, as in `check`, unless `whole`.

        Raises: ConfigurationError if they do not.
        """
        # some writers store only the first boundary, so the last need not be N
        boundaries, limit = self.boundaries, len(self.sizes)
        before = 0
        for first, last in _blocks(len(boundaries), whole):
            block = boundaries[first:last]
            if (block[1:] < block[:-1]).any() or not before <= block[0] <= block[-1] <= limit or boundaries[0]:
                raise ConfigurationError(
                    f"{self.path}: its document boundaries do not ascend from 0 to at most {limit}; it is damaged, "
                    "write it again"
                )
            before = block[-1]

    def document_ends(self) -> np.ndarray:
        """Return the entry after the last of each document that is not empty; without boundaries each entry is one."""
        count = len(self.sizes)
        complete = len(self.boundaries) and self.boundaries[-1] == count
        ends = np.unique(self.boundaries) if complete else np.arange(1, count + 1)
        return ends[ends > 0]


def map_file(path: Path) -> mmap.mmap:
    """Return a file, which is not empty, memory-mapped for reading."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def without_readahead(mapped: mmap.mmap) -> Iterator[None]:
    """Turn readahead off, which costs milliseconds at each of the few offsets that are read in a large file."""
    mapped.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        mapped.madvise(mmap.MADV_NORMAL)


def _blocks(count: int, whole: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the ranges of `count` entries to check: all of them, or blocks from the first to the last of many."""
    if whole or count <= WHOLE:
        for first in range(0, count, CHUNK):
            yield first, min(first + CHUNK, count)
        return
    for number in range(BLOCKS):
        first = number * (count - BLOCK) // (BLOCKS - 1)
        yield first, first + BLOCK


def uncounted_end(index: Index, data: Path) -> int | None:
    """Return the id at the end of every document if each has one token more than `index` counts, else None.

    --append-eod of Megatron-DeepSpeed, and of Megatron-LM in early 2023, writes such files: it does not count the
    token that it appends to the last sentence of a document. A single document is no evidence: its last id, whatever it
    is, equals that of every document.
    """
    sizes, ends = index.sizes.astype(np.int64), index.document_ends()
    if data.stat().st_size != (int(sizes.sum()) + len(ends)) * index.dtype.itemsize or len(ends) < 2:
        return None
    sizes[ends - 1] += 1
    last_ids = np.memmap(data, index.dtype, "r")[np.cumsum(sizes)[ends - 1] - 1]
    return int(last_ids[0]) if (last_ids == last_ids[0]).all() else None


def rebuild_command(index: Path) -> str:
    """Return the remedy in messages about a damaged index."""
    return f"rebuild it: python tools/rebuild_index.py {index.with_suffix('')}"


def write_index(
    path: Path, dtype: np.dtype, sizes: np.ndarray | Sequence[int], boundaries: np.ndarray | None = None
) -> None:
    """Write an index file; the offsets are computed from `sizes`, int [N].

    Without `boundaries`, int [M], each of the N entries is a document. Needs little memory besides its arguments.
    """
    sizes = np.asarray(sizes, np.int32)
    documents = range(len(sizes) + 1) if boundaries is None else boundaries
    offset = 0
    with open(path, "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(sizes), len(documents)))
        for chunk in _chunks(len(sizes)):
            index.write(sizes[chunk].tobytes())
        for chunk in _chunks(len(sizes)):
            ends = offset + np.cumsum(sizes[chunk].astype(np.int64) * dtype.itemsize)
            index.write(np.concatenate(([offset], ends[:-1])).tobytes())
            offset = int(ends[-1])
        for chunk in _chunks(len(documents)):
            index.write(np.asarray(documents[chunk], np.int64).tobytes())


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))
