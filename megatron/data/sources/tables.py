"""Tables: Parquet files, Arrow files, and data sets of Hugging Face's `datasets`; a row is a document."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from megatron.data.compressed import damaged, is_damage, unchanged, unreadable
from megatron.data.sources import base
from megatron.data.sources.base import BadRecord, Record
from megatron.errors import ConfigurationError

BATCH_ROWS = 64  # decoded at a time; a chunk takes as many batches as fill it
STRINGS = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
KEYS_FLAG = "name the columns that hold the text with --json-keys"


@dataclass(frozen=True)
class Rows:
    """A chunk: rows of a table, of which the first has the number `first`, from 1."""

    named: str
    first: int
    table: pyarrow.Table
    size: int

    def records(self, keys: tuple[str, ...]) -> Iterator[Record | BadRecord]:
        """Yield a document for each row."""
        columns = [_values(self.table.column(key)) for key in keys]
        for number, texts in enumerate(zip(*columns), self.first):
            where = f"{self.named}: row {number}"
            if any(isinstance(text, str) and _is_too_long(text) for text in texts):
                yield base.too_long(where, "remove it")
            elif all(isinstance(text, str) for text in texts):
                yield Record(where.removeprefix("--input ").replace(": row ", ":"), texts)
            else:
                fault = next(text for text in texts if not isinstance(text, str))
                if isinstance(fault, bytes):
                    yield BadRecord(f"{where} is not UTF-8; fix or remove it", "not UTF-8")
                else:
                    kind = type(fault).__name__
                    yield BadRecord(f"{where} has a value of type {kind}, not a string; remove it", "not a string")


class ParquetFile:
    """A Parquet file; a row group is decoded at a time."""

    def __init__(self, path: str, size: int, identity: tuple):
        self.path = self._path = path
        self.size, self.identity = size, identity

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Rows]:
        """Yield chunks of rows."""
        named = f"--input {self._path}"
        with _reading(self._path, named), parquet.ParquetFile(self._path, pre_buffer=False) as file:
            check_columns(file.schema_arrow, keys, named)
            batches = file.iter_batches(batch_size=BATCH_ROWS, columns=list(keys))
            yield from _chunks(named, map(_as_table, batches), self.size / max(1, file.metadata.num_rows))


class ArrowFile:
    """An Arrow file, as a stream (as `datasets` writes them) or with an index."""

    def __init__(self, path: str, size: int, identity: tuple):
        self.path = self._path = path
        self.size, self.identity = size, identity

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Rows]:
        """Yield chunks of rows."""
        named = f"--input {self._path}"
        # read, not memory-mapped: a file that is truncated meanwhile would kill the process
        with _reading(self._path, named), pyarrow.OSFile(self._path) as file:
            try:
                reader: Any = ipc.open_stream(file)
                batches: Iterable = reader
            except pyarrow.ArrowInvalid:
                file.seek(0)
                reader = ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            check_columns(reader.schema, keys, named)
            tables = (_as_table(batch).select(list(keys)) for batch in batches)
            position = 0
            for chunk in _chunks(named, tables, 0):
                size, position = file.tell() - position, file.tell()
                yield replace(chunk, size=max(0, size))


class HuggingFaceDataset:
    """A data set of Hugging Face's hub, streamed, or a local folder of one."""

    size = path = None

    def __init__(self, name: str, split: str, config: str | None):
        self._name, self._split, self._config = name, split, config
        self._named = f"--hf-dataset {name}"
        revision = _files(name) if Path(name).is_dir() else _revision(name)
        self.identity = (name, split, config, revision) if revision else None

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Rows]:
        """Yield chunks of rows."""
        rows = self._open(_library(self._named))
        if rows.features is not None:
            check_columns(rows.features.arrow_schema, keys, self._named)
        try:
            tables = rows.select_columns(list(keys)).with_format("arrow").iter(batch_size=BATCH_ROWS)
            yield from _chunks(self._named, tables, 0)
        except ConfigurationError:
            raise
        except Exception as error:  # of many kinds, such as a lost connection, which --on-error must not skip
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(
                f"{self._named}: cannot be read further ({reason}); check the data set and the connection, and run the "
                "same command again"
            ) from None

    def _open(self, library: ModuleType):
        library.disable_progress_bars()
        library.logging.set_verbosity(library.logging.CRITICAL)  # its errors are ours, in one line
        saved = [Path(self._name, name).is_file() for name in ("state.json", "dataset_dict.json")]
        try:
            if not any(saved):
                return library.load_dataset(self._name, self._config, split=self._split, streaming=True)
            rows = library.load_from_disk(self._name)
        except Exception as error:  # of many kinds: no such data set, configuration, split or connection
            lines = str(error).splitlines() or [type(error).__name__]
            raise ConfigurationError(
                f"{self._named}: cannot be loaded ({lines[0]}); check --hf-dataset, --hf-config and --hf-split"
            ) from None
        if saved[0]:
            return rows
        if self._split not in rows:
            raise ConfigurationError(f"--hf-split {self._split}: {self._name} has {', '.join(rows)}; give one of them")
        return rows[self._split]


def check_columns(schema: pyarrow.Schema, keys: tuple[str, ...], named: str) -> None:
    """Check that a table has a column of strings for each key.

    Raises: ConfigurationError if it has not.
    """
    for key in keys:
        if schema.names.count(key) > 1:
            raise ConfigurationError(f'{named}: has {schema.names.count(key)} columns "{key}"; rename all but one')
        if key not in schema.names:
            raise ConfigurationError(f'{named}: has no column "{key}", but {", ".join(schema.names)}; {KEYS_FLAG}')
        kind = schema.field(key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in STRINGS:
            raise ConfigurationError(f'{named}: its column "{key}" has the type {kind}, not string; {KEYS_FLAG}')


def _chunks(named: str, tables: Iterable[pyarrow.Table], bytes_per_row: float) -> Iterator[Rows]:
    """Yield chunks of some CHUNK_BYTES, whatever the sizes of `tables`."""
    first, parts, size = 1, [], 0
    for table in tables:
        for start in range(0, len(table), BATCH_ROWS):
            part = table
            if len(table) > BATCH_ROWS:  # copied, since pickling a slice of a table would send all of it
                part = table.take(pyarrow.array(range(start, min(len(table), start + BATCH_ROWS))))
            parts.append(part)
            size += part.nbytes
            if size >= base.CHUNK_BYTES:
                whole = pyarrow.concat_tables(parts)
                yield Rows(named, first, whole, round(bytes_per_row * len(whole)))
                first, parts, size = first + len(whole), [], 0
    if parts:
        whole = pyarrow.concat_tables(parts)
        yield Rows(named, first, whole, round(bytes_per_row * len(whole)))


def _is_too_long(text: str) -> bool:
    return 4 * len(text) > base.LONGEST_DOCUMENT and len(text.encode()) > base.LONGEST_DOCUMENT


def _files(folder: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files of a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _revision(name: str) -> str | None:
    """Return the commit of a data set on the hub, None where that cannot be known."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # of many kinds; opening the data set then reports it, or reads it from a cache
        return None


def _as_table(batch: pyarrow.RecordBatch) -> pyarrow.Table:
    return pyarrow.Table.from_batches([batch])


def _values(column: pyarrow.ChunkedArray) -> list:
    """Return the values of a column; as bytes those that are not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


@contextmanager
def _reading(path: str, named: str) -> Iterator[None]:
    try:
        with unchanged(path, named):
            yield
    except ConfigurationError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        if is_damage(error):
            raise damaged(named, str(error).splitlines()[0]) from None
        raise unreadable(named, error) from None


def _library(named: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ConfigurationError(
            f"{named}: needs the package datasets, the extra datasets; pip install datasets"
        ) from None
    return datasets
