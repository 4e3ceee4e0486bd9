"""Documents, the split each falls into, and the fingerprint of a whole corpus."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "tuning", "validation")
# tests, generated tables, other people's packages
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
# how this one Python was built: generated, and different on every machine
BUILD_RECORDS = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text; documents of one group stay in one split."""

    name: str
    group: str
    text: str


def standard_library() -> Iterator[Document]:
    """Yield the source files of the running Python's standard library; a group is a top-level package.

    They come in the order of their names' hashes, so that the first N tokens are a fair sample of the library.
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
            yield Document("/".join(parts), parts[0].removesuffix(".py"), text)


def split_of(document: Document, shares: tuple[float, float, float]) -> str:
    """Return the split that the hash of a document's group (of its text, where it has none) points to.

    Nothing else is looked at, so adding text moves no other text, and equal texts never face each other.
    """
    point = int.from_bytes(_digest(document.group or document.text)[:6], "big") / 2**48 * sum(shares)
    return SPLITS[(point >= shares[0]) + (point >= shares[0] + shares[1])]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Fingerprint:
    """Size of each split and one hash over its text: runs on different text are never compared in one table."""

    def __init__(self):
        self.sizes = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
        self._digests = {name: hashlib.sha256() for name in SPLITS}

    def add(self, split: str, text: str) -> int:
        """Count one document and return its bytes."""
        data = text.encode()
        self._digests[split].update(len(data).to_bytes(8, "big"))
        self._digests[split].update(data)
        self.sizes[split]["documents"] += 1
        self.sizes[split]["bytes"] += len(data)
        return len(data)

    @property
    def hash(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values())).hexdigest()
