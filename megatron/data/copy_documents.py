"""Writes a data set from documents of others: raw copies in bounded memory, complete or not at all.

OUT.bin is copied to OUT.bin.partial, on which this process has a lock; the other files follow, and the index is renamed
last, since only it makes a data set. A killed process leaves no index, and the next one overwrites what it left.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from megatron.data.index_file import Index, write_index
from megatron.data.indexed import IndexedDataset, data_files, read_metadata
from megatron.errors import ConfigurationError

COPY_BYTES = 1 << 24  # read at a time


@dataclass(frozen=True)
class Source:
    """A data set to copy from.

    `boundaries` are the first entry of each document and the end of the last one, int64 [M]: an entry is a sentence in
    some of Megatron's files, and else the document itself.
    """

    dataset: IndexedDataset
    boundaries: np.ndarray
    metadata: dict

    @classmethod
    def open(cls, prefix: str) -> "Source":
        """Return the data set of a prefix, every entry of its index checked, since it is copied or counted as a whole.

        Raises: ConfigurationError if it is missing, damaged or empty.
        """
        dataset, index = IndexedDataset(prefix), Index.open(data_files(prefix)[0])
        dataset.check_documents(len(dataset))
        index.check_boundaries(whole=True)
        boundaries = index.boundaries
        if not len(boundaries) or boundaries[-1] != len(dataset):  # some writers store only the first
            boundaries = np.arange(len(dataset) + 1)
        return cls(dataset, boundaries, read_metadata(prefix))

    @property
    def prefix(self) -> str:
        """The data prefix."""
        return self.dataset.prefix

    @property
    def corpus_hash(self) -> str:
        """The recorded corpus hash; for data of other systems a hash of their tokens, as in training."""
        return self.metadata.get("corpus_hash") or self.dataset.fingerprint()


class DocumentCopy:
    """A data set that is being written: `copy` from others, then `finish`. Created by `new_data_set`."""

    def __init__(self, prefix: Path, dtype: np.dtype, data: BinaryIO, bar: tqdm):
        self._prefix, self._dtype, self._data, self._bar = prefix, dtype, data, bar
        self._sizes: list[np.ndarray] = []
        self._boundaries = [np.zeros(1, np.int64)]
        self._entries = 0

    def copy(self, source: Source, keep: np.ndarray | None = None) -> None:
        """Append the entries of a data set of the same dtype for which `keep` is true, bool [N]; by default all.

        A document of which no entry is left is dropped.
        """
        count = len(source.dataset)
        keep = np.ones(count, bool) if keep is None else keep
        self._sizes.append(source.dataset.sizes[keep])
        entries_before = np.concatenate([[0], np.cumsum(keep)])  # [N + 1]
        ends = entries_before[source.boundaries]
        nonempty = (np.diff(ends) > 0) | (np.diff(source.boundaries) == 0)
        self._boundaries.append(ends[1:][nonempty] + self._entries)
        self._entries += int(entries_before[-1])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]))).reshape(-1, 2)
        token_ends = np.cumsum(source.dataset.sizes, dtype=np.int64)
        with open(f"{source.prefix}.bin", "rb") as data:
            for first, last in edges.tolist():
                start = int(token_ends[first - 1]) if first else 0
                self._copy_bytes(data, start * self._dtype.itemsize, int(token_ends[last - 1]) * self._dtype.itemsize)

    def _copy_bytes(self, data: BinaryIO, start: int, stop: int) -> None:
        data.seek(start)
        while start < stop:
            block = data.read(min(COPY_BYTES, stop - start))
            if not block:
                raise ConfigurationError(f"{data.name}: became shorter while it was read; start again")
            self._data.write(block)
            start += len(block)
            self._bar.update(len(block))

    def finish(self, metadata: dict, extra_files: dict[str, bytes]) -> None:
        """Write the index, PREFIX.json and `extra_files` (contents by name, next to them), and rename all files."""
        sizes = np.concatenate([np.empty(0, np.int32), *self._sizes])
        boundaries = np.concatenate(self._boundaries)
        assert len(sizes) == self._entries == boundaries[-1]
        index = Path(f"{self._prefix}.idx.partial")
        write_index(index, self._dtype, sizes, boundaries)
        _sync(index)
        self._data.flush()
        os.fsync(self._data.fileno())
        contents = {**extra_files, f"{self._prefix.name}.json": json.dumps(metadata, indent=1).encode()}
        for name, content in contents.items():
            partial = self._prefix.with_name(f"{name}.{self._prefix.name}.partial")
            try:
                partial.write_bytes(content)
                _sync(partial)
                partial.replace(self._prefix.with_name(name))
            finally:
                partial.unlink(missing_ok=True)
        os.replace(f"{self._prefix}.bin.partial", f"{self._prefix}.bin")
        os.replace(index, f"{self._prefix}.idx")


@contextmanager
def new_data_set(prefix: str, dtype: np.dtype, total_bytes: int, description: str) -> Iterator[DocumentCopy]:
    """Yield a data set to copy documents to; without `finish`, or after an error, nothing is left of it.

    `total_bytes` of tokens will be copied, for the progress bar.

    Raises: ConfigurationError if it exists, cannot be created or another process writes it; OSError if the disk is
    full.
    """
    path = Path(prefix)
    check_output(prefix, ())
    with _locked(path) as data:
        check_output(prefix, ())  # another process may have finished since
        try:
            with tqdm(desc=description, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
                yield DocumentCopy(path, np.dtype(dtype), data, bar)
        except OSError as error:
            raise OSError(
                f"--output-prefix {prefix}: cannot be written ({error.strerror}); free space or name another"
            ) from None
        finally:
            for suffix in (".bin", ".idx"):
                Path(f"{prefix}{suffix}.partial").unlink(missing_ok=True)


def check_output(prefix: str, inputs: tuple[str, ...]) -> None:
    """Check that an output prefix is none of the inputs and holds no data set, since nothing is overwritten.

    Raises: ConfigurationError if it is or does.
    """
    index = Path(f"{prefix}.idx")
    for source in inputs:
        if Path(f"{source}.idx").resolve() == index.resolve():
            raise ConfigurationError(f"--output-prefix {prefix}: is the input {source}; name another prefix")
    if not index.name.removesuffix(".idx"):
        raise ConfigurationError(f"--output-prefix {prefix}: names no file; add a name, such as {prefix}data")
    if index.exists():
        raise ConfigurationError(
            f"--output-prefix {prefix}: {index.name} exists already; name another prefix, or move the old data set away"
        )


@contextmanager
def _locked(prefix: Path) -> Iterator[BinaryIO]:
    """Yield PREFIX.bin.partial, empty and locked by this process."""
    path = Path(f"{prefix}.bin.partial")
    while True:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # another process may be writing to it
        except OSError as error:
            raise ConfigurationError(
                f"--output-prefix {prefix}: cannot be created ({error.strerror}); name another"
            ) from None
        with open(descriptor, "wb") as file:  # a descriptor is not truncated
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"--output-prefix {prefix}: another process writes it; wait until it ends, or name another prefix"
                ) from None
            # the process that had the lock may have renamed or removed the file that was opened
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                yield file
                return


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
