"""What every source of text gives: chunks of records, read in order by one process and parsed in any other.

A chunk holds the undecoded records of a stretch of a source. Chunks depend on the source alone, never on the number of
worker processes, so that a run that was killed can skip those that are finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.data.compressed import DamagedFile
from megatron.errors import ConfigurationError

Position = tuple[int, int]  # a source, and the number of its chunks that are finished

CHUNK_BYTES = 1 << 21  # of text
LONGEST_DOCUMENT = 64 << 20  # bytes; tokenisation takes a multiple of that in memory


@dataclass(frozen=True)
class Record:
    """A document under one or more keys; records of a group belong to the same split ("": a group of its own)."""

    name: str
    texts: tuple[str, ...]
    group: str = ""

    @property
    def text(self) -> str:
        """The text under the first key."""
        return self.texts[0]


class BadRecord(ConfigurationError):
    """A record that is no document; `reason` is that of the counts of --on-error skip."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.message, self.reason = message, reason

    def __reduce__(self):
        return type(self), (self.message, self.reason)


class Chunk(Protocol):
    """Consecutive records of a source; sent to a worker process."""

    @property
    def size(self) -> int:
        """The bytes of the source that it takes, for progress."""
        ...

    def records(self, keys: tuple[str, ...]) -> Iterator[Record | BadRecord]:
        """Yield the records, with a text for each key; a bad one is yielded, not raised."""
        ...


class Source(Protocol):
    """A file, a table or a stream."""

    @property
    def identity(self) -> tuple | None:
        """Changes when the content does, as far as can be seen without reading it; None for a stream."""
        ...

    @property
    def size(self) -> int | None:
        """Its bytes on disk, None if unknown."""
        ...

    @property
    def path(self) -> str | None:
        """The path of a file, None for anything else."""
        ...

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Chunk]:
        """Yield the chunks in order.

        Raises: DamagedFile for a file that cannot be read to its end, ConfigurationError for anything else that cannot
            be read.
        """
        ...


@dataclass(frozen=True)
class Given:
    """A chunk of records that need no parsing."""

    given: tuple[Record | BadRecord, ...]
    size: int

    def records(self, keys: tuple[str, ...]) -> Iterator[Record | BadRecord]:
        """Yield the records."""
        yield from self.given


def read_chunks(
    sources: Sequence[Source], keys: tuple[str, ...], start: Position = (0, 0)
) -> Iterator[tuple[Position, Chunk]]:
    """Yield the chunks of all sources from the position `start` on, each with the position after it.

    A file that is damaged ends with a bad record.
    """
    first, skipped = start
    for number, source in enumerate(sources[first:], first):
        count = 0
        try:
            for count, chunk in enumerate(source.chunks(keys), 1):
                if number > first or count > skipped:
                    yield (number, count), chunk
        except DamagedFile as error:
            if number > first or count + 1 > skipped:
                yield (number, count + 1), Given((BadRecord(str(error), "damaged file"),), 0)


def read_records(sources: Sequence[Source], keys: tuple[str, ...]) -> Iterator[Record]:
    """Yield the records of all sources that are not bad."""
    for _, chunk in read_chunks(sources, keys):
        yield from (record for record in chunk.records(keys) if isinstance(record, Record))


def too_long(named: str, remedy: str) -> BadRecord:
    """Return the error of a document that is longer than memory may have room for; it starts with `named`."""
    return BadRecord(f"{named}: is one document of more than {LONGEST_DOCUMENT} bytes; {remedy}", "too long")
