"""Documents as duplicate search compares them: token ids without the end-of-document token, and their n-grams."""

import hashlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from megatron.data.indexed import IndexedDataset
from megatron.randomness import stream

BATCH_TOKENS = 1 << 17  # of a batch of documents, so that its n-grams stay in the cache
LONGEST_NGRAM = 64  # tokens
MULTIPLIERS = stream(0, "token n-grams").integers(1 << 63, size=LONGEST_NGRAM, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


class DocumentTokens:
    """The documents of a data set without the end-of-document token `eod` at their end, if they have one.

    `starts`: index of the first token of each document in the data set, int64 [D].
    `lengths`: tokens of each document, int64 [D].
    """

    def __init__(self, dataset: IndexedDataset, eod: int | None):
        self._ids = np.asarray(dataset.stream(0, dataset.total_tokens))  # slices of a plain array are cheaper
        self.lengths = dataset.sizes.astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        if eod is not None:
            self.lengths -= ends_with(dataset, eod)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, document: int) -> np.ndarray:
        """Return a view of the token ids of a document."""
        start = int(self.starts[document])
        return self._ids[start : start + int(self.lengths[document])]

    def digests(self) -> np.ndarray:
        """Return a 128-bit hash of the token ids of each document, uint64 [D, 2]; the same for every dtype."""
        digests = np.empty((len(self), 2), np.uint64)
        for document in tqdm(range(len(self)), "hashing", unit=" documents", disable=None):
            data = self.ids(document).astype(np.int64).tobytes()
            digests[document] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)
        return digests

    def ngrams(self, document: int, length: int) -> np.ndarray:
        """Return the set of n-grams of a document as sorted 64-bit hashes, uint64 [U]."""
        return np.unique(ngram_hashes(self.ids(document), length))

    def ngram_batches(self, documents: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the n-gram hashes of batches of documents, uint64 [N], and the edges of the documents in them, [B + 1].

        Every document has at least `length` tokens.
        """
        ends = np.cumsum(self.lengths[documents])
        first = 0
        while first < len(documents):
            limit = BATCH_TOKENS + (int(ends[first - 1]) if first else 0)
            last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
            lengths = self.lengths[documents[first:last]]
            hashes = ngram_hashes(np.concatenate([self.ids(document) for document in documents[first:last]]), length)
            inside = np.ones(len(hashes), bool)  # n-grams across two documents are left out
            inside[(np.cumsum(lengths)[:-1, None] - np.arange(1, length)).ravel()] = False
            yield hashes[inside], np.concatenate([[0], np.cumsum(lengths - length + 1)])
            first = last


def ends_with(dataset: IndexedDataset, token: int) -> np.ndarray:
    """Return whether the last id of each document is `token`, bool [D]; false for an empty document."""
    ends = np.cumsum(dataset.sizes, dtype=np.int64)
    tokens = dataset.stream(0, dataset.total_tokens)
    nonempty = np.flatnonzero(dataset.sizes)
    result = np.zeros(len(dataset), bool)
    result[nonempty] = tokens[ends[nonempty] - 1] == token
    return result


def ngram_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of each n-gram of `length` ids, uint64 [len(ids) - length + 1]; equal on every machine.

    Multilinear hashing modulo 2^64, and MurmurHash3's finalizer, which spreads its differences over all bits. Two
    different n-grams of ids below 2^31 have equal hashes with a probability of at most 2^-33, typically of 2^-64.
    """
    count = max(0, len(ids) - length + 1)
    hashes = np.zeros(count, np.uint64)
    ids = ids.astype(np.uint64)
    for offset in range(length):
        hashes += ids[offset : offset + count] * MULTIPLIERS[offset]
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(multiplier)
    return hashes ^ (hashes >> np.uint64(33))
