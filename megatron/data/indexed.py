"""Megatron's memory-mapped token files, byte for byte.

PREFIX.bin   token ids of all documents, one after another (little endian)
PREFIX.idx   where each document lies in it, see `index_file`
PREFIX.json  what wrote them: tokenizer, corpus hash (ours; optional)
"""

import hashlib
import json
import os
from array import array
from copy import copy
from pathlib import Path

import numpy as np

from megatron.data.index_file import Index, rebuild_command, uncounted_end, write_index
from megatron.errors import ConfigurationError


class IndexedDataset:
    """Documents of token ids, read through a memory map.

    With a `vocabulary_size`, `read` and `stream` raise ConfigurationError for an id outside it: data made with
    another tokenizer must not pass for text. An index that does not fit its tokens is refused on opening.
    """

    def __init__(self, prefix: str, vocabulary_size: int | None = None):
        index_path, data = data_files(prefix)
        index = Index.open(index_path)
        self.dtype, self.sizes = index.dtype, index.sizes
        self.total_tokens = index.check()
        if not self.total_tokens:
            raise ConfigurationError(f"{index_path}: holds no tokens; give other text to tools/preprocess_data.py")
        _check_data_size(data, index, self.total_tokens)
        self.prefix, self._vocabulary_size = str(prefix), vocabulary_size
        self._offsets = index.offsets
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


def data_files(prefix: str) -> tuple[Path, Path]:
    """Return PREFIX.idx and PREFIX.bin.

    Raises: ConfigurationError where one is missing.
    """
    paths = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in paths:
        if not path.is_file():
            raise ConfigurationError(
                f"{path}: no such file; tools/preprocess_data.py writes it, and the prefix has no suffix"
            )
    return paths


def _check_data_size(data: Path, index: Index, tokens: int) -> None:
    """Refuse a .bin file that does not end where its index does."""
    size, end = data.stat().st_size, tokens * index.dtype.itemsize
    if size < end:
        raise ConfigurationError(
            f"{data}: has {size} bytes and its index points to {end}; it was cut, or made with another dtype or "
            "tokenizer, write both again"
        )
    end_id = uncounted_end(index, data) if size > end else None
    if end_id is not None:
        raise ConfigurationError(
            f"{data}: has {size} bytes and its index covers {end}, one token less for each document: --append-eod of "
            f"Megatron-DeepSpeed does not count the token that it appends, here {end_id}, and every document but the "
            f"first is shifted; {rebuild_command(index.path)}"
        )
    if size > end:
        raise ConfigurationError(
            f"{data}: has {size} bytes and its index covers {end}; the two do not belong together (another dtype or "
            "tokenizer, or a merge that was interrupted), write both again"
        )


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
                boundaries = np.arange(len(self._sizes) + 1)
                write_index(Path(f"{self._prefix}.idx.partial"), self._dtype, self._sizes, boundaries)
                self._publish()
        finally:
            for suffix in (".bin", ".idx"):
                Path(f"{self._prefix}{suffix}.partial").unlink(missing_ok=True)

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
