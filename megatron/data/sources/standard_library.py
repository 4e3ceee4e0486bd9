"""The source code of the running Python's standard library: text that every machine has."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron.data.sources.base import CHUNK_BYTES, Given, Record

# tests, generated tables, third-party packages
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "lib-dynload",
    "__pycache__",
}
# build configuration of this Python: generated, and different on every machine
BUILD_RECORDS = ("config-", "_sysconfigdata")


class StandardLibrary:
    """The standard library's source as a source of documents."""

    size = path = None
    identity = ("python-stdlib", platform.python_version())

    def chunks(self, keys: tuple[str, ...]) -> Iterator[Given]:
        """Yield chunks of files; `keys` has one entry."""
        records, size = [], 0
        for record in standard_library():
            records.append(record)
            size += len(record.text)
            if size >= CHUNK_BYTES:
                yield Given(tuple(records), size)
                records, size = [], 0
        yield Given(tuple(records), size)


def standard_library() -> Iterator[Record]:
    """Yield the source files of the running Python's standard library; a group is a top-level package.

    They are ordered by the hashes of their names, so that the first N tokens are a fair sample of the library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: _digest(path.relative_to(root).as_posix())):
        parts = path.relative_to(root).parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith(BUILD_RECORDS):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield Record("/".join(parts), (text,), parts[0].removesuffix(".py"))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
