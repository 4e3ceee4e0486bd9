"""Reads, checks and writes the index of Megatron's token files, PREFIX.idx, little endian:

"MMIDIDX\\0\\0" | u64 1 | u8 dtype code | u64 N | u64 M
| i32[N] tokens of each document | i64[N] byte offset in .bin | i64[M] document boundaries
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes 6 and 7 are floats, which cannot be token ids
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # pointers checked at a time


@dataclass(frozen=True)
class Index:
    """The content of an index file, memory-mapped and unchecked; `check` validates it.

    sizes: tokens of each entry, int32 [N]. An entry is a document, or a sentence in some of Megatron's files.
    offsets: start of each entry in the .bin file in bytes, int64 [N].
    boundaries: first entry of each document and the end of the last one, int64 [M].
    """

    path: Path
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
        mapped = np.memmap(path, mode="r", dtype=np.uint8)
        return cls(
            path=path,
            dtype=np.dtype(DTYPES[code]),
            sizes=np.frombuffer(mapped, np.int32, count, HEADER.size),
            offsets=np.frombuffer(mapped, np.int64, count, HEADER.size + 4 * count),
            boundaries=np.frombuffer(mapped, np.int64, boundaries, HEADER.size + 12 * count),
        )

    def check(self) -> int:
        """Return the number of tokens of the index.

        Raises: ConfigurationError if the index is inconsistent.
        """
        total = 0
        for first in range(0, len(self.sizes), CHUNK):
            sizes = self.sizes[first : first + CHUNK].astype(np.int64)
            ends = np.cumsum(sizes) + total
            starts, offsets = (ends - sizes) * self.dtype.itemsize, self.offsets[first : first + CHUNK]
            wrong = np.flatnonzero((sizes < 0) | (starts != offsets))
            if len(wrong):
                entry = wrong[0]
                fault = f"gives document {first + entry} {sizes[entry]} tokens; it is damaged, write it again"
                if sizes[entry] >= 0:
                    fault = (
                        f"puts document {first + entry} at byte {offsets[entry]}, and its sizes put it at "
                        f"{starts[entry]}; it is damaged (a merge that overflowed 32 bits?), "
                        f"{rebuild_command(self.path)}"
                    )
                raise ConfigurationError(f"{self.path}: {fault}")
            total = int(ends[-1])
        self.check_boundaries()
        return total

    def check_boundaries(self) -> None:
        """Check that the document boundaries ascend from 0 to the number of entries N; they may end before N.

        Raises: ConfigurationError if they do not.
        """
        boundaries = self.boundaries
        # some writers store only the first boundary, so the last need not be N
        if len(boundaries) and (
            boundaries[0] != 0 or boundaries[-1] > len(self.sizes) or (boundaries[1:] < boundaries[:-1]).any()
        ):
            raise ConfigurationError(
                f"{self.path}: its document boundaries do not ascend from 0 to at most {len(self.sizes)}; it is "
                "damaged, write it again"
            )

    def document_ends(self) -> np.ndarray:
        """Return the entry after the last of each document that is not empty; without boundaries each entry is one."""
        count = len(self.sizes)
        complete = len(self.boundaries) and self.boundaries[-1] == count
        ends = np.unique(self.boundaries) if complete else np.arange(1, count + 1)
        return ends[ends > 0]


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


def write_index(path: Path, dtype: np.dtype, sizes: np.ndarray | Sequence[int], boundaries: np.ndarray) -> None:
    """Write an index file; the offsets are computed from `sizes`, int [N]."""
    sizes = np.asarray(sizes, np.int32)
    offsets = np.zeros(len(sizes), np.int64)
    np.cumsum(sizes[:-1].astype(np.int64) * dtype.itemsize, out=offsets[1:])
    with open(path, "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(sizes), len(boundaries)))
        for array in (sizes, offsets, np.asarray(boundaries, np.int64)):
            index.write(array.tobytes())
