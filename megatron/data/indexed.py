"""Megatron's memory-mapped token files, byte for byte (little endian).

PREFIX.bin   token ids of all documents, one after another
PREFIX.idx   "MMIDIDX\\0\\0" | u64 1 | u8 dtype code | u64 N | u64 M
             | i32[N] tokens of each document | i64[N] byte offset in .bin | i64[M] document boundaries
PREFIX.json  what wrote them: tokenizer, corpus hash (ours; optional)
"""

import hashlib
import json
import os
import struct
from array import array
from copy import copy
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes 6 and 7 are floats, which are no token ids
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


class IndexedDataset:
    """Documents of token ids, read through a memory map.

    With a `vocabulary_size`, `read` and `stream` raise ConfigurationError for an id outside it: data made with
    another tokenizer must not pass for text.
    """

    def __init__(self, prefix: str, vocabulary_size: int | None = None):
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise ConfigurationError(
                    f"{path}: no such file; tools/preprocess_data.py writes it, and the prefix has no suffix"
                )
        with open(index, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise ConfigurationError(f"{index}: is not a Megatron index (it is empty or foreign); write it anew")
        _, version, code, count, boundaries = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise ConfigurationError(
                f"{index}: has version {version} and dtype code {code}; only version 1 and integers (1 to 5 and 8) "
                "are read; write it anew"
            )
        expected = HEADER.size + 12 * count + 8 * boundaries
        size = index.stat().st_size
        if size != expected:
            raise ConfigurationError(f"{index}: has {size} bytes and needs {expected}; it was cut, write it anew")
        self.dtype = np.dtype(DTYPES[code])
        mapped = np.memmap(index, mode="r", dtype=np.uint8)
        self.sizes = np.frombuffer(mapped, np.int32, count, HEADER.size)
        # documents follow one another without gaps, so the last one ends the file: opening costs the same at any size
        offsets = np.frombuffer(mapped, np.int64, count, HEADER.size + 4 * count)
        end = int(offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if count else 0
        if end <= 0:
            raise ConfigurationError(f"{index}: holds no tokens; give other text to tools/preprocess_data.py")
        if data.stat().st_size < end:
            raise ConfigurationError(
                f"{data}: has {data.stat().st_size} bytes and its index points to {end}; it was cut, write it anew"
            )
        self.prefix, self._vocabulary_size = str(prefix), vocabulary_size
        self._offsets, self.total_tokens = offsets, end // self.dtype.itemsize
        self._tokens = np.memmap(data, mode="r", dtype=self.dtype, shape=(self.total_tokens,))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        """Return a view of the ids of one document."""
        start = int(self._offsets[document]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sizes[document])]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return a view of tokens start .. stop-1 of one document."""
        return self._checked(self[document][start:stop])

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Return a view of tokens start .. stop-1 of all documents, one after another."""
        return self._checked(self._tokens[start:stop])

    def part(self, first: int, last: int) -> "IndexedDataset":
        """Return documents first .. last-1 as a data set of their own; they hold at least one token."""
        part = copy(self)
        part.sizes, part._offsets = self.sizes[first:last], self._offsets[first:last] - self._offsets[first]
        start = int(self._offsets[first]) // self.dtype.itemsize
        part.total_tokens = int(part._offsets[-1]) // self.dtype.itemsize + int(part.sizes[-1])
        part._tokens = self._tokens[start : start + part.total_tokens]
        return part

    def fingerprint(self) -> str:
        """Return a hash of the sizes and of blocks spread over the tokens, in the same time at any size."""
        digest = hashlib.sha256(f"{self.dtype} {len(self)} {self.total_tokens}".encode())
        for values, count in ((self.sizes, 64), (self._tokens, 256)):
            for start in np.linspace(0, max(0, len(values) - 512), count).astype(np.int64):
                digest.update(values[start : start + 512].tobytes())
        return digest.hexdigest()

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if self._vocabulary_size is not None and len(ids):
            worst = int(ids.max() if ids.min() >= 0 else ids.min())
            if not 0 <= worst < self._vocabulary_size:
                raise ConfigurationError(
                    f"{self.prefix}.bin: holds the token id {worst}, and the tokenizer has ids 0 to "
                    f"{self._vocabulary_size - 1}; give the tokenizer that made the data "
                    "(--tokenizer-type, --tokenizer-model, --vocab-size)"
                )
        return ids


class IndexedDatasetWriter:
    """Writes a data set aside and renames it when it is complete. Use as a context manager."""

    def __init__(self, prefix: str, vocabulary_size: int):
        self._prefix, self._vocabulary_size = Path(prefix), vocabulary_size
        self._dtype = np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)
        self._sizes = array("i")

    def __enter__(self):
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._data = open(f"{self._prefix}.bin.partial", "wb")
        return self

    def add_document(self, ids) -> None:
        ids = np.asarray(ids, np.int64)
        # a cast would wrap them round in silence
        assert not len(ids) or 0 <= ids.min() and ids.max() < self._vocabulary_size, "ids outside the vocabulary"
        self._data.write(ids.astype(self._dtype).tobytes())
        self._sizes.append(len(ids))

    def __exit__(self, kind, error, trace):
        try:
            self._data.close()
            if kind is None:
                self._write_index()
                self._publish()
        finally:
            for suffix in (".bin", ".idx"):
                Path(f"{self._prefix}{suffix}.partial").unlink(missing_ok=True)

    def _write_index(self) -> None:
        sizes = np.array(self._sizes, np.int32)
        offsets = np.zeros(len(sizes), np.int64)
        np.cumsum(sizes[:-1].astype(np.int64) * self._dtype.itemsize, out=offsets[1:])
        with open(f"{self._prefix}.idx.partial", "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, CODES[self._dtype], len(sizes), len(sizes) + 1))
            for part in (sizes, offsets, np.arange(len(sizes) + 1, dtype=np.int64)):
                index.write(part.tobytes())

    def _publish(self) -> None:
        # an index beside other tokens than its own would be read without complaint, so the old one goes first
        Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._prefix}{suffix}.partial", f"{self._prefix}{suffix}")


def read_metadata(prefix: str) -> dict:
    """Return what PREFIX.json says of the data, {} for data that another system wrote."""
    path = Path(f"{prefix}.json")
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: is not JSON ({error}); write the data anew, or remove it to give the tokenizer by flags"
        ) from None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"{path}: is not a JSON object; write the data anew, or remove it to give the tokenizer by flags"
        )
    return found
