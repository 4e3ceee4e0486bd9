"""Megatron's indexed dataset, byte for byte: the memory-mapped token files of a data prefix.

PREFIX.bin   token ids of all documents, concatenated (little endian)
PREFIX.idx   size and offset of each document, see `index_file`
PREFIX.json  metadata: tokenizer, corpus hash (ours; optional)
"""

import hashlib
import json
import mmap
import os
from array import array
from bisect import bisect_left
from copy import copy
from pathlib import Path

import numpy as np

from megatron.data.index_file import Index, map_file, rebuild_command, uncounted_end, without_readahead, write_index
from megatron.errors import ConfigurationError


class IndexedDataset:
    """Documents of token ids, memory-mapped.

    With a `vocabulary_size`, `read` and `stream` raise ConfigurationError for an id outside it, which data of another
    tokenizer may have. The constructor refuses an index that does not match its .bin file. It takes constant time for
    more than `index_file.WHOLE` documents: `Index.check` reads samples of their entries, and the others are checked
    before they are used, by `check_documents` or document by document.
    """

    def __init__(self, prefix: str, vocabulary_size: int | None = None):
        index_path, data = data_files(prefix)
        self._index = index = Index.open(index_path)
        self.dtype, self.sizes = index.dtype, index.sizes
        self.total_tokens = index.check()
        if not self.total_tokens:
            raise ConfigurationError(f"{index_path}: holds no tokens; give other text to tools/preprocess_data.py")
        _check_data_size(data, index, self.total_tokens)
        self.prefix, self._vocabulary_size = str(prefix), vocabulary_size
        self._first_document, self._first_byte = 0, 0  # in the files
        self._offsets = index.offsets  # in the file
        self._checked_documents = (
            len(self) if index.is_checked_whole else 0
        )  # the first ones, whose entries were checked
        mapped = map_file(data)
        if not index.is_checked_whole:
            mapped.madvise(mmap.MADV_RANDOM)  # samples are read at random, and readahead of each costs milliseconds
        self._tokens = np.frombuffer(mapped, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        """Return a view of the token ids of one document."""
        if document >= self._checked_documents:
            self._check(document, document + 1)
        start = (int(self._offsets[document]) - self._first_byte) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sizes[document])]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return a view of tokens start .. stop-1 of one document."""
        return self._checked(self[document][start:stop])

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Return a view of tokens start .. stop-1 of the concatenated documents."""
        return self._checked(self._tokens[start:stop])

    def documents_with(self, tokens: int) -> int:
        """Return how many documents the first `tokens` tokens are in, in [1, total_tokens]; the last may be in part.

        Raises: ConfigurationError if their entries of the index contradict one another.
        """
        end = self._first_byte + tokens * self.dtype.itemsize
        documents = bisect_left(self._offsets, end)  # the offsets ascend; np.searchsorted copies unaligned ones
        if self.check_documents(documents):
            last = int(self._offsets[documents - 1])
            if not last < end <= last + int(self.sizes[documents - 1]) * self.dtype.itemsize:
                self.check_documents(len(self))  # finds the entry that misled the search
        return documents

    def check_documents(self, count: int) -> bool:
        """Check the index entries of the first `count` documents; return whether they had not been checked before.

        Raises: ConfigurationError if they contradict one another.
        """
        if count <= self._checked_documents:
            return False
        self._check(self._checked_documents, count)
        self._checked_documents = count
        return True

    def document_range(self, first: int, last: int) -> "IndexedDataset":
        """Return documents first .. last-1, which have at least one token, as a data set.

        Raises: ConfigurationError if the index contradicts itself there.
        """
        subset = copy(self)
        subset.sizes, subset._offsets = self.sizes[first:last], self._offsets[first:last]
        subset.total_tokens = self.tokens_between(first, last)
        subset._first_document, subset._first_byte = self._first_document + first, int(self._offsets[first])
        subset._checked_documents = max(0, min(self._checked_documents, last) - first)
        start = (subset._first_byte - self._first_byte) // self.dtype.itemsize
        subset._tokens = self._tokens[start : start + subset.total_tokens]
        return subset

    @property
    def is_whole(self) -> bool:
        """Whether these are all documents of the files, and no `document_range` of them."""
        return len(self) == len(self._index.sizes)

    def tokens_between(self, first: int, last: int) -> int:
        """Return the number of tokens of documents first .. last-1, in constant time.

        Raises: ConfigurationError if the index contradicts itself there.
        """
        if first >= last:
            return 0
        for document in (first, last - 1):
            self._check(document, document + 1)
        size = int(self._offsets[last - 1]) - int(self._offsets[first])
        return size // self.dtype.itemsize + int(self.sizes[last - 1])

    def _check(self, first: int, last: int) -> None:
        """Check the index entries of documents first .. last-1, and where the last one ends.

        Raises: ConfigurationError if they contradict one another.
        """
        first, last = self._first_document + first, self._first_document + last
        self._index.check_entries(first, min(last + 1, len(self._index.sizes)))

    def fingerprint(self) -> str:
        """Return a hash of blocks of the sizes and of the tokens, in constant time."""
        digest = hashlib.sha256(f"{self.dtype} {len(self)} {self.total_tokens}".encode())
        with without_readahead(self._index.mapped):
            for values, count in ((self.sizes, 64), (self._tokens, 256)):
                for start in np.linspace(0, max(0, len(values) - 512), count).astype(np.int64):
                    digest.update(values[start : start + 512].tobytes())
        return digest.hexdigest()

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """Return `ids`, which must be in the vocabulary."""
        if self._vocabulary_size is not None and len(ids):
            worst = int(ids.max() if ids.min() >= 0 else ids.min())
            if not 0 <= worst < self._vocabulary_size:
                raise ConfigurationError(
                    f"{self.prefix}.bin: contains the token id {worst}, and the tokenizer has ids 0 to "
                    f"{self._vocabulary_size - 1}; give the tokenizer that made the data "
                    "(--tokenizer-type, --tokenizer-model, --vocab-size)"
                )
        return ids


def data_files(prefix: str) -> tuple[Path, Path]:
    """Return the paths PREFIX.idx and PREFIX.bin.

    Raises: ConfigurationError if one is missing.
    """
    paths = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in paths:
        if not path.is_file():
            raise ConfigurationError(
                f"{path}: no such file; tools/preprocess_data.py writes it, and the prefix has no suffix"
            )
    return paths


def _check_data_size(data: Path, index: Index, tokens: int) -> None:
    """Check that a .bin file ends where its index does."""
    size, end = data.stat().st_size, tokens * index.dtype.itemsize
    if size < end:
        raise ConfigurationError(
            f"{data}: has {size} bytes and its index points to {end}; it is truncated, or was written with another "
            "dtype or tokenizer, write both again"
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
    """Writes a data set to temporary files and renames them when they are complete. Use as a context manager."""

    def __init__(self, prefix: str | Path, vocabulary_size: int):
        self._prefix, self._vocabulary_size = Path(prefix), vocabulary_size
        self._dtype = token_dtype(vocabulary_size)
        self._sizes = array("i")

    def __enter__(self):
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._data = open(f"{self._prefix}.bin.partial", "wb")
        return self

    def add_document(self, ids) -> None:
        """Append one document."""
        ids = np.asarray(ids, np.int64)
        # the cast below would wrap around silently
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocabulary_size), "ids outside the vocabulary"
        self._data.write(ids.astype(self._dtype).tobytes())
        self._sizes.append(len(ids))

    def __exit__(self, kind, error, trace):
        try:
            self._data.close()
            if kind is None:
                write_index(Path(f"{self._prefix}.idx.partial"), self._dtype, self._sizes)
                self._publish()
        finally:
            for suffix in (".bin", ".idx"):
                Path(f"{self._prefix}{suffix}.partial").unlink(missing_ok=True)

    def _publish(self) -> None:
        # an index next to the tokens of another one could be read without an error, so the old index is removed first
        Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._prefix}{suffix}.partial", f"{self._prefix}{suffix}")


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the dtype of the token ids in a file, Megatron's choice."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def read_metadata(prefix: str | Path) -> dict:
    """Return the content of PREFIX.json, {} if there is none, as for data of other systems.

    Raises: ConfigurationError if it is not a JSON object.
    """
    path = Path(f"{prefix}.json")
    try:
        metadata = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: is not JSON ({error}); write the data again, or remove it to give the tokenizer by flags"
        ) from None
    if not isinstance(metadata, dict):
        raise ConfigurationError(
            f"{path}: is not a JSON object; write the data again, or remove it to give the tokenizer by flags"
        )
    return metadata
