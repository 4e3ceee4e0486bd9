"""The splits of a corpus, and its fingerprint."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

SPLITS = ("train", "tuning", "validation")


def split_of(group: str, text_digest: bytes, shares: Sequence[float]) -> str:
    """Return the split of a document by the hash of its group, or by `text_digest`, SHA-256, if it has no group.

    Nothing else matters, so adding text moves no other text, and equal texts are never in different splits.
    """
    digest = hashlib.sha256(group.encode()).digest() if group else text_digest
    point = int.from_bytes(digest[:6], "big") / 2**48 * sum(shares)
    return SPLITS[(point >= shares[0]) + (point >= shares[0] + shares[1])]


def split_of_text(group: str, text: bytes, shares: Sequence[float]) -> str:
    """Return the split of a document by its group and its text in UTF-8."""
    return split_of(group, hashlib.sha256(text).digest(), shares)


@dataclass
class Fingerprint:
    """Size of a text and a hash of its documents in order, so that runs on different text are not compared.

    hash: h_n = SHA-256(h_(n-1) | SHA-256(document n)), from h_0 = "" on; hexadecimal.
    """

    documents: int = 0
    text_bytes: int = 0
    hash: str = ""

    def add(self, digests: bytes, size: int) -> None:
        """Add documents: their SHA-256 digests, concatenated, and the bytes of all."""
        state = bytes.fromhex(self.hash)
        for start in range(0, len(digests), 32):
            state = hashlib.sha256(state + digests[start : start + 32]).digest()
        self.hash = state.hex()
        self.documents += len(digests) // 32
        self.text_bytes += size

    def sizes(self) -> dict[str, int]:
        """Return the documents and bytes, for the records."""
        return {"documents": self.documents, "bytes": self.text_bytes}

    def state(self) -> dict:
        """Return the fields, the arguments of an equal fingerprint."""
        return asdict(self)


def corpus_hash(fingerprints: dict[str, Fingerprint]) -> str:
    """Return a hash of the text of all data sets by name; where they are splits, those without documents count."""
    hashes = dict.fromkeys(SPLITS, "") if fingerprints.keys() <= set(SPLITS) else {}
    hashes |= {name: fingerprint.hash for name, fingerprint in fingerprints.items()}
    return hashlib.sha256(" ".join(f"{name}={value}" for name, value in hashes.items()).encode()).hexdigest()
