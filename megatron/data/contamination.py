"""Contamination: the share of held-out text that also occurs in the training text, by 13-grams, in bounded memory.

Held-out documents are sampled by the hash of their text, and the n-grams of the training split by their own hash, each
only where there are too many. Both samples depend on the text alone, not on the order or the processes in which it is
read, and one pass fills both.
"""

import heapq
import zlib

import numpy as np

from megatron.randomness import stream

NGRAM_WORDS = 13  # words are separated by ASCII white space
DOCUMENT_OVERHEAD = 16  # memory of a document in addition to its n-grams, in n-grams
LIMIT = 1 << 22  # n-grams in memory, of each split
MULTIPLIERS = stream(0, "word runs").integers(1 << 63, size=NGRAM_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def ngram_hashes(text: bytes) -> np.ndarray:
    """Return a 64-bit hash of each 13-gram of words, uint64 [words - 12]; the same on every machine."""
    words = np.fromiter(map(zlib.crc32, text.split()), np.uint64)
    # multilinear hashing, modulo 2^64
    return np.convolve(words, MULTIPLIERS, "valid") if len(words) >= NGRAM_WORDS else np.empty(0, np.uint64)


class TrainNgrams:
    """The distinct n-grams of the training split with the `limit` smallest hashes: all of them, if there are fewer."""

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self.largest = (1 << 64) - 1  # n-grams with a larger hash are left out
        self._hashes = np.empty(0, np.uint64)  # sorted
        self._added: list[np.ndarray] = []
        self._added_size = 0

    def add(self, hashes: np.ndarray) -> None:
        """Add n-gram hashes."""
        self._added.append(below(hashes, self.largest))
        self._added_size += len(self._added[-1])
        if self._added_size > self._limit:
            self.hashes()

    def hashes(self) -> np.ndarray:
        """Return the sample, sorted."""
        if self._added:
            self._hashes = np.unique(np.concatenate([self._hashes, *self._added]))
            self._added, self._added_size = [], 0
        if len(self._hashes) > self._limit:
            self._hashes = self._hashes[: self._limit].copy()
            self.largest = int(self._hashes[-1])
        return self._hashes

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `restored` takes."""
        return {"hashes": self.hashes(), "largest": np.array(self.largest, np.uint64)}

    @classmethod
    def restored(cls, state: dict[str, np.ndarray]) -> "TrainNgrams":
        """Return the sample of a `state`."""
        sample = cls()
        sample._hashes, sample.largest = state["hashes"], int(state["largest"])
        return sample


class HeldOut:
    """The documents of a held-out split, as the hashes of their n-grams; of a large split a sample.

    At most `limit` n-grams are stored: of a larger split only the documents whose hash is below a threshold.
    """

    def __init__(self, limit: int = LIMIT):
        self._limit, self.threshold = limit, 1 << 32
        self._documents = 0
        self._sampled = []  # a heap of (-hash, number, n-gram hashes)
        self._size = 0  # of the heap, in n-grams

    def add(self, text_hash: int, hashes: np.ndarray) -> None:
        """Add one document: the CRC-32 of its text, and the hashes of its n-grams, which only a sampled one needs."""
        self._documents += 1
        if text_hash >= self.threshold:
            return
        heapq.heappush(self._sampled, (-text_hash, self._documents, hashes))
        self._size += len(hashes) + DOCUMENT_OVERHEAD
        while self._size > self._limit and len(self._sampled) > 1:
            negative_hash, _, dropped = heapq.heappop(self._sampled)
            self.threshold = -negative_hash
            self._size -= len(dropped) + DOCUMENT_OVERHEAD

    def shared(self, train: TrainNgrams) -> dict[str, float | None]:
        """Return the share of the n-grams, and of the documents, that the training split shares.

        `sampled` is the share of the documents that were sampled, times that of train's n-grams; 1 if the figures are
        exact. The share of documents is None if train's n-grams are a sample.
        """
        ends = np.cumsum([len(hashes) for _, _, hashes in self._sampled], dtype=np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for _, _, hashes in self._sampled)])
        known = train.hashes()
        shared = np.isin(hashes, known)
        compared = hashes <= np.uint64(train.largest)
        complete = train.largest == (1 << 64) - 1
        counts = np.concatenate([[0], np.cumsum(shared)])
        contaminated = np.diff(counts[np.concatenate([[0], ends])]) > 0
        return {
            "ngrams": float(shared.sum() / max(1, compared.sum())),
            "documents": float(contaminated.sum() / max(1, len(contaminated))) if complete else None,
            "sampled": len(self._sampled) / max(1, self._documents) * (train.largest + 1) / (1 << 64),
        }

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `restored` takes."""
        return {
            "counts": np.array([self._documents, self.threshold], np.int64),
            "keys": np.array([entry[:2] for entry in self._sampled], np.int64).reshape(-1, 2),
            "lengths": np.array([len(hashes) for _, _, hashes in self._sampled], np.int64),
            "hashes": np.concatenate([np.empty(0, np.uint64), *(hashes for _, _, hashes in self._sampled)]),
        }

    @classmethod
    def restored(cls, state: dict[str, np.ndarray]) -> "HeldOut":
        """Return the sample of a `state`."""
        held_out = cls()
        held_out._documents, held_out.threshold = (int(value) for value in state["counts"])
        ends = np.cumsum(state["lengths"])
        parts = np.split(state["hashes"], ends[:-1]) if len(ends) else []
        held_out._sampled = [(int(key), int(number), part) for (key, number), part in zip(state["keys"], parts)]
        held_out._size = int(state["lengths"].sum()) + DOCUMENT_OVERHEAD * len(parts)
        return held_out


def below(hashes: np.ndarray, largest: int) -> np.ndarray:
    """Return the hashes that are at most `largest`."""
    return hashes if largest == (1 << 64) - 1 else hashes[hashes <= np.uint64(largest)]
