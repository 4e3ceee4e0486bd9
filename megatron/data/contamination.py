"""How much of held-out text occurs in the training text too: shared runs of 13 words, in bounded memory."""

import heapq
import zlib

import numpy as np

from megatron.randomness import stream

RUN = 13  # words, between ASCII white space
DOCUMENT_ROOM = 16  # what holding a document costs besides its runs, in runs
MULTIPLIERS = stream(0, "word runs").integers(1 << 63, size=RUN, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def run_hashes(text: str) -> np.ndarray:
    """Return a 64-bit hash of each run of 13 words, uint64 [words - 12]; the same on every machine."""
    words = np.fromiter(map(zlib.crc32, text.encode().split()), np.uint64)
    # multilinear hashing, modulo 2^64
    return np.convolve(words, MULTIPLIERS, "valid") if len(words) >= RUN else np.empty(0, np.uint64)


class HeldOut:
    """The word runs of one held-out split, and which of them training text has shown.

    First `add` every held-out document, then `compare` all training text, then read `shared`. At most `limit` runs
    are held: of a larger split only the documents whose hash falls below a threshold, a sample that depends on
    the text alone.
    """

    def __init__(self, limit: int = 1 << 22):
        self._limit, self._threshold = limit, 1 << 32
        self._documents, self._held, self._room = 0, [], 0  # held: a heap of (-hash, number, runs)
        self._known = None

    def add(self, text: str) -> None:
        point, self._documents = zlib.crc32(text.encode()), self._documents + 1
        if point >= self._threshold:
            return
        runs = run_hashes(text)
        heapq.heappush(self._held, (-point, self._documents, runs))
        self._room += len(runs) + DOCUMENT_ROOM
        while self._room > self._limit and len(self._held) > 1:
            point, _, dropped = heapq.heappop(self._held)
            self._threshold, self._room = -point, self._room - len(dropped) - DOCUMENT_ROOM

    def compare(self, texts: list[np.ndarray]) -> None:
        """Mark the runs that training texts hold, given as the hashes of each."""
        if self._known is None:
            parts = [runs for _, _, runs in self._held]
            self._known, self._places = np.unique(_joined(parts), return_inverse=True)
            self._seen = np.zeros(len(self._known), bool)
        if len(self._known):
            runs = np.unique(_joined(texts))
            places = np.searchsorted(self._known, runs) % len(self._known)
            self._seen[places[self._known[places] == runs]] = True

    def shared(self) -> dict[str, float]:
        """Return which share of the word runs, and of the documents, training text holds too.

        `sampled` is the share of the documents that were looked at, 1 where the figures are exact.
        """
        self.compare([])
        ends = np.cumsum([len(runs) for _, _, runs in self._held], dtype=np.int64)
        found = np.concatenate([[0], np.cumsum(self._seen[self._places])])
        touched = np.diff(found[np.concatenate([[0], ends])]) > 0
        return {
            "ngrams": float(found[-1] / max(1, len(self._places))),
            "documents": float(touched.sum() / max(1, len(touched))),
            "sampled": len(self._held) / max(1, self._documents),
        }


def _joined(texts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *texts])
