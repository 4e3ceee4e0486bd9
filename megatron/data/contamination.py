"""Contamination: the share of held-out text that also occurs in the training text, by 13-grams, in bounded memory."""

import heapq
import zlib

import numpy as np

from megatron.randomness import stream

NGRAM_WORDS = 13  # words are separated by ASCII white space
DOCUMENT_OVERHEAD = 16  # memory of a document in addition to its n-grams, in n-grams
MULTIPLIERS = stream(0, "word runs").integers(1 << 63, size=NGRAM_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def ngram_hashes(text: str) -> np.ndarray:
    """Return a 64-bit hash of each 13-gram of words, uint64 [words - 12]; the same on every machine."""
    words = np.fromiter(map(zlib.crc32, text.encode().split()), np.uint64)
    # multilinear hashing, modulo 2^64
    return np.convolve(words, MULTIPLIERS, "valid") if len(words) >= NGRAM_WORDS else np.empty(0, np.uint64)


class HeldOut:
    """The 13-grams of a held-out split, and which of them occur in training text.

    First `add` every held-out document, then `compare` all training text, then read `shared`. At most `limit` n-grams
    are stored: of a larger split only the documents whose hash is below a threshold, a sample that depends on the text
    alone.
    """

    def __init__(self, limit: int = 1 << 22):
        self._limit, self._threshold = limit, 1 << 32
        self._documents = 0
        self._sampled = []  # a heap of (-hash, number, n-gram hashes)
        self._size = 0  # of the heap, in n-grams
        self._unique = None  # sorted n-gram hashes, set by the first `compare`

    def add(self, text: str) -> None:
        """Add one held-out document."""
        text_hash = zlib.crc32(text.encode())
        self._documents += 1
        if text_hash >= self._threshold:
            return
        hashes = ngram_hashes(text)
        heapq.heappush(self._sampled, (-text_hash, self._documents, hashes))
        self._size += len(hashes) + DOCUMENT_OVERHEAD
        while self._size > self._limit and len(self._sampled) > 1:
            negative_hash, _, dropped = heapq.heappop(self._sampled)
            self._threshold = -negative_hash
            self._size -= len(dropped) + DOCUMENT_OVERHEAD

    def compare(self, texts: list[np.ndarray]) -> None:
        """Mark the n-grams that occur in training texts, given as the n-gram hashes of each text."""
        if self._unique is None:
            documents = [hashes for _, _, hashes in self._sampled]
            self._unique, self._unique_indices = np.unique(_joined(documents), return_inverse=True)
            self._shared = np.zeros(len(self._unique), bool)
        if len(self._unique):
            hashes = np.unique(_joined(texts))
            indices = np.searchsorted(self._unique, hashes) % len(self._unique)
            self._shared[indices[self._unique[indices] == hashes]] = True

    def shared(self) -> dict[str, float]:
        """Return the share of the n-grams, and of the documents, that training text shares.

        `sampled` is the share of documents that were sampled, 1 if the figures are exact.
        """
        self.compare([])
        ends = np.cumsum([len(hashes) for _, _, hashes in self._sampled], dtype=np.int64)
        counts = np.concatenate([[0], np.cumsum(self._shared[self._unique_indices])])
        contaminated = np.diff(counts[np.concatenate([[0], ends])]) > 0
        return {
            "ngrams": float(counts[-1] / max(1, len(self._unique_indices))),
            "documents": float(contaminated.sum() / max(1, len(contaminated))),
            "sampled": len(self._sampled) / max(1, self._documents),
        }


def _joined(texts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *texts])
