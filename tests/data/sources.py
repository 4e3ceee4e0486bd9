"""Documents of sources, as preprocessing reads them."""

from collections.abc import Iterator

from megatron.data.sources.base import BadRecord, Record, read_chunks
from megatron.data.sources.registry import list_sources


def read_records(paths, keys=("text",), **options) -> Iterator[Record | BadRecord]:
    """Yield all records, bad ones too."""
    for _, chunk in read_chunks(list_sources([str(path) for path in paths], **options), keys):
        yield from chunk.records(keys)


def read_documents(paths, key="text", **options) -> Iterator[Record]:
    """Yield the documents that are not blank; raise the first bad record."""
    for record in read_records(paths, (key,), **options):
        if isinstance(record, BadRecord):
            raise record
        if record.text.strip():
            yield record
