"""Megatron's memory-mapped token files, byte for byte (little endian).

    PREFIX.bin   token ids of all documents, one after another
    PREFIX.idx   "MMIDIDX\\0\\0" | u64 1 | u8 dtype code | u64 N | u64 M
                 | i32[N] tokens of each document | i64[N] byte offset in .bin | i64[M] document boundaries
    PREFIX.json  what wrote them: tokenizer, corpus hash (ours; optional)
"""

import json
import os
import struct
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


class IndexedDataset:
    """Documents of token ids, read through a memory map."""

    def __init__(self, prefix: str):
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise ConfigurationError(f"{path}: no such file; tools/preprocess_data.py writes it, and the prefix has no suffix")
        raw = index.read_bytes()
        if len(raw) < HEADER.size or raw[:9] != MAGIC:
            raise ConfigurationError(f"{index}: is not a Megatron index (it is empty or foreign); write it anew")
        _, version, code, count, boundaries = HEADER.unpack_from(raw)
        if version != 1 or code not in DTYPES:
            raise ConfigurationError(f"{index}: has version {version} and dtype code {code}; this reads version 1, codes 1 to 8")
        expected = HEADER.size + 12 * count + 8 * boundaries
        if len(raw) != expected:
            raise ConfigurationError(f"{index}: has {len(raw)} bytes and needs {expected}; it was cut, write it anew")
        self.dtype = np.dtype(DTYPES[code])
        self.sizes = np.frombuffer(raw, np.int32, count, HEADER.size)
        self._offsets = np.frombuffer(raw, np.int64, count, HEADER.size + 4 * count)
        end = int((self._offsets + self.sizes * np.int64(self.dtype.itemsize)).max(initial=0))
        if data.stat().st_size < end:
            raise ConfigurationError(f"{data}: has {data.stat().st_size} bytes and its index points to {end}; it was cut, write it anew")
        if count == 0 or end == 0:
            raise ConfigurationError(f"{index}: holds no tokens; give other text to tools/preprocess_data.py")
        self._tokens = np.memmap(data, mode="r", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total_tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    def __getitem__(self, document: int) -> np.ndarray:
        """Return a view of the ids of one document."""
        return np.frombuffer(self._tokens, self.dtype, self.sizes[document], self._offsets[document])


class IndexedDatasetWriter:
    """Writes a data set aside and renames it when it is complete. Use as a context manager."""

    def __init__(self, prefix: str, vocabulary_size: int):
        self._prefix = Path(prefix)
        self._dtype = np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)
        self._sizes: list[int] = []

    def __enter__(self):
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._data = open(f"{self._prefix}.bin.partial", "wb")
        return self

    def add_document(self, ids) -> None:
        ids = np.asarray(ids, dtype=self._dtype)
        self._data.write(ids.tobytes())
        self._sizes.append(len(ids))

    def __exit__(self, kind, error, trace):
        self._data.close()
        if kind is not None:
            os.unlink(self._data.name)
            return
        sizes = np.array(self._sizes, np.int32)
        offsets = np.zeros(len(sizes), np.int64)
        np.cumsum(sizes[:-1].astype(np.int64) * self._dtype.itemsize, out=offsets[1:])
        with open(f"{self._prefix}.idx.partial", "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, CODES[self._dtype], len(sizes), len(sizes) + 1))
            for part in (sizes, offsets, np.arange(len(sizes) + 1, dtype=np.int64)):
                index.write(part.tobytes())
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._prefix}{suffix}.partial", f"{self._prefix}{suffix}")


def read_metadata(prefix: str) -> dict:
    """Return what PREFIX.json says of the data, {} for data that another system wrote."""
    path = Path(f"{prefix}.json")
    return json.loads(path.read_text()) if path.exists() else {}
