"""Documents, their assignment to splits, and the fingerprint of a corpus."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "tuning", "validation")
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


@dataclass(frozen=True)
class Document:
    """A text; all documents of a group are in the same split."""

    name: str
    group: str
    text: str


def standard_library() -> Iterator[Document]:
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
            yield Document("/".join(parts), parts[0].removesuffix(".py"), text)


def split_of(document: Document, shares: Sequence[float]) -> str:
    """Return the split of a document by the hash of its group, or of its text if it has no group.

    Nothing else matters, so adding text moves no other text, and equal texts are never in different splits.
    """
    point = int.from_bytes(_digest(document.group or document.text)[:6], "big") / 2**48 * sum(shares)
    return SPLITS[(point >= shares[0]) + (point >= shares[0] + shares[1])]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Fingerprint:
    """Sizes of the splits and a hash of their text, so that runs on different text are not compared in one table."""

    def __init__(self):
        self.sizes = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
        self._digests = {name: hashlib.sha256() for name in SPLITS}

    def add(self, split: str, text: str) -> int:
        """Add one document and return its bytes."""
        data = text.encode()
        self._digests[split].update(len(data).to_bytes(8, "big"))
        self._digests[split].update(data)
        self.sizes[split]["documents"] += 1
        self.sizes[split]["bytes"] += len(data)
        return len(data)

    @property
    def hash(self) -> str:
        """SHA-256 of the text of all splits."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values())).hexdigest()
