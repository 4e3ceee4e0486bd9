"""Text and its splits: the standard library's source, or the user's own files."""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigurationError

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


@dataclass(frozen=True)
class Document:
    """One text; documents of one group stay in one split."""

    name: str
    group: str
    text: str


def standard_library() -> list[Document]:
    """Return the source files of the running Python's standard library, by name; a group is a top-level package."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            found.append(Document("/".join(parts), parts[0].removesuffix(".py"), text))
    return found


def read_documents(paths: Iterable[str], key: str = "text") -> Iterator[Document]:
    """Yield the user's documents: a .txt file is one, a .jsonl file has one a line; .gz and .zst are opened."""
    for path in map(Path, paths):
        kind = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
        if not path.is_file():
            raise ConfigurationError(f"--input {path}: no such file")
        if kind not in (".txt", ".jsonl"):
            raise ConfigurationError(
                f"--input {path}: is neither .txt nor .jsonl, nor one of them with .gz or .zst; rename it"
            )
        with _open(path) as file:
            if kind == ".txt":
                yield Document(str(path), "", file.read())
                continue
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(f"{path}:{number}", "", _field(path, number, line, key))


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ConfigurationError(f"--input {path}: needs the package zstandard; pip install zstandard") from None
        return zstandard.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _field(path: Path, number: int, line: str, key: str) -> str:
    try:
        return json.loads(line)[key]
    except ValueError as error:
        raise ConfigurationError(f"--input {path}: line {number} is not JSON ({error}); mend or remove it") from None
    except (KeyError, TypeError):
        raise ConfigurationError(
            f'--input {path}: line {number} has no field "{key}"; name it with --json-key'
        ) from None


def split_documents(documents: Iterable[Document], shares: tuple[float, float, float]) -> dict[str, list[Document]]:
    """Return the documents by split, whole groups together, in the order given.

    A group (a document's content where it has none) falls where its hash points, so that adding text moves
    no other text.
    """
    total = sum(shares)
    edges = (shares[0] / total, (shares[0] + shares[1]) / total)
    split = {name: [] for name in SPLITS}
    for document in documents:
        digest = hashlib.sha256((document.group or document.text).encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        split[SPLITS[(point >= edges[0]) + (point >= edges[1])]].append(document)
    return split


def corpus_hash(split: dict[str, list[Document]]) -> str:
    """Return one hash over the text of all splits: runs on different text are never compared in one table."""
    digest = hashlib.sha256()
    for name, documents in split.items():
        for document in documents:
            digest.update(f"{name}\0{len(document.text)}\0{document.text}".encode())
    return digest.hexdigest()


def near_duplicates(train: list[Document], other: list[Document], n: int = 13) -> dict[str, float]:
    """Return which share of the n-word runs of `other`, and of its documents, occur in `train` too."""
    known = {gram for document in train for gram in _ngrams(document.text, n)}
    grams = [[gram in known for gram in _ngrams(document.text, n)] for document in other]
    total = sum(map(len, grams))
    return {
        "ngrams": sum(map(sum, grams)) / total if total else 0.0,
        "documents": sum(map(any, grams)) / len(grams) if grams else 0.0,
    }


def _ngrams(text: str, n: int) -> Iterator[int]:
    words = text.split()
    return (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))
