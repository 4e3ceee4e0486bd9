"""Near-duplicates by MinHash and locality-sensitive hashing, every candidate pair verified.

Documents are sets of token n-grams, and near-duplicates have a Jaccard similarity |A and B| / |A or B| of at least a
threshold (Broder, 1997, "On the resemblance and containment of documents"). The steps:

1. A MinHash signature of NUM_PERM values per document, by the library rensa: each value of two documents is equal with
   their similarity as its probability.
2. Values are cut into b bands of r; documents with an equal band are candidates (Leskovec, Rajaraman and Ullman, Mining
   of Massive Datasets, section 3.4): a pair of similarity s is a candidate with probability 1 - (1 - s^r)^b.
3. Of each candidate pair, the similarity of the sets themselves decides. A pair that is connected already, through
   other near-duplicates, is not compared, since this would change nothing.

So every reported pair is correct, and step 2 alone may miss one.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from types import ModuleType

import numpy as np
from tqdm import tqdm

from megatron.data.inspection.ngrams import DocumentTokens
from megatron.errors import ConfigurationError
from megatron.randomness import stream

NUM_PERM = 128  # values of a signature
SEED = 1  # of the permutations
RECALL = 0.99  # smallest probability that a pair at the threshold is a candidate
CHUNK_TOKENS = 1 << 22  # of candidate documents whose n-grams are in memory
BAND_MULTIPLIERS = stream(0, "bands").integers(1 << 63, size=NUM_PERM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Bands:
    """`count` bands of `rows` values of a signature."""

    count: int
    rows: int

    @classmethod
    def of(cls, threshold: float) -> "Bands":
        """Return the longest bands with which a pair at the threshold is a candidate with probability RECALL.

        Longer bands give fewer candidates to compare. Below a threshold of 0.04 no band is short enough, and the
        probability is smaller.
        """
        shapes = [cls(NUM_PERM // rows, rows) for rows in range(NUM_PERM, 0, -1)]
        return next((bands for bands in shapes if bands.recall(threshold) >= RECALL), shapes[-1])

    def recall(self, similarity: float) -> float:
        """Return the probability that a pair of this Jaccard similarity is a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.count


@dataclass(frozen=True)
class Match:
    """The other data set's document that a document nearly equals, and their Jaccard similarity."""

    document: int
    similarity: float


def band_keys(tokens: DocumentTokens, documents: np.ndarray, length: int, bands: Bands) -> np.ndarray:
    """Return a hash of each band of each document, uint32 [len(documents), bands.count]; equal bands have equal hashes.

    The documents have at least `length` tokens, the length of an n-gram.

    Raises: ConfigurationError without the library.
    """
    library = _rensa()
    keys = np.empty((len(documents), bands.count), np.uint32)
    multipliers = BAND_MULTIPLIERS[: bands.rows]
    filled = 0
    with tqdm(desc="computing signatures", total=len(documents), unit=" documents", disable=None) as bar:
        for hashes, edges in tokens.ngram_batches(documents, length):
            matrix = library.RMinHash.digest_matrix_from_flat_token_hashes(
                hashes, edges.astype(np.uint64), num_perm=NUM_PERM, seed=SEED
            )
            signatures = np.array(matrix.to_rows(), np.uint64)[:, : bands.count * bands.rows]  # [B, count * rows]
            values = signatures.reshape(-1, bands.count, bands.rows)
            keys[filled : filled + len(values)] = (values * multipliers).sum(axis=2) >> np.uint64(32)
            filled += len(values)
            bar.update(len(values))
    return keys


def _rensa() -> ModuleType:
    try:
        import rensa
    except ImportError:
        raise ConfigurationError(
            "--near-duplicates: needs the package rensa, the extra dedup; pip install rensa"
        ) from None
    return rensa


class Comparison:
    """Compares the candidate pairs of a data set, and between it and another one.

    Items 0 .. O-1 are documents of the other data set, if any, and O .. O+D-1 those of this one. After `run`, `labels`
    [O + D] is the smallest item of each one's cluster, a connected component of the pairs within this data set that
    reach the threshold; `matches` has, by item of this data set, an item of the other one that reaches it.
    """

    def __init__(self, threshold: float, length: int, *, within: bool):
        self._threshold, self._length, self._within = threshold, length, within
        self.compared_pairs = 0
        self.verified_pairs = 0

    def run(self, tokens: tuple[DocumentTokens, ...], documents: tuple[np.ndarray, ...], keys: np.ndarray) -> None:
        """Compare the candidates of `keys`, uint32 [items, bands].

        `tokens` and `documents`: of (the other data set and) this one.
        """
        self._tokens, self._documents, self._keys = tokens, documents, keys
        self._num_other = len(documents[0]) if len(documents) == 2 else 0
        self._lengths = np.concatenate([t.lengths[d] for t, d in zip(tokens, documents)])
        self.labels = np.arange(len(keys))
        self.matches: dict[int, Match] = {}
        self._matched = np.zeros(len(keys), bool)
        self._members: dict[int, list[int]] = {}  # of clusters of two or more, by label
        count = keys.shape[1]
        with tqdm(desc="comparing candidates", total=count * len(keys), unit=" bands", disable=None) as bar:
            for band in range(count):
                for bucket in buckets(keys[:, band]):
                    self._compare_bucket(band, bucket)
                bar.update(len(keys))

    def _compare_bucket(self, band: int, items: np.ndarray) -> None:
        """Compare the items with an equal band, ascending [K], in chunks of bounded size."""
        if not self._is_pending(items):
            return
        totals = np.cumsum(self._lengths[items])
        chunks = np.split(items, np.flatnonzero(np.diff(totals // CHUNK_TOKENS)) + 1)
        for first, second in combinations_with_replacement(range(len(chunks)), 2):
            self._compare_chunks(band, chunks[first], chunks[second] if second > first else None)

    def _is_pending(self, items: np.ndarray) -> bool:
        """Return whether a pair of items may change the result."""
        own = items[items >= self._num_other]
        shared = len(own) < len(items) and not self._matched[own].all()
        return shared or (self._within and len(own) > 1 and bool((self.labels[own] != self.labels[own[0]]).any()))

    def _compare_chunks(self, band: int, left: np.ndarray, right: np.ndarray | None) -> None:
        """Compare every item of `left` with all later ones, or with those of another chunk."""
        items = left if right is None else np.concatenate([left, right])
        if not self._is_pending(items):
            return
        sets = [self._ngrams(item) for item in items]
        sizes = np.array([len(ngrams) for ngrams in sets])
        ends = np.cumsum(sizes)
        ids = np.unique(np.concatenate(sets), return_inverse=True)[1]  # n-grams numbered within this chunk
        present = np.zeros(ids.max() + 1, bool)
        for position, item in enumerate(left):
            first = position + 1 if right is None else len(left)
            others = first + np.flatnonzero(self._pending_with(band, item, items[first:]))
            # the similarity is at most the ratio of the sizes
            smaller, larger = np.minimum(sizes[position], sizes[others]), np.maximum(sizes[position], sizes[others])
            others = others[smaller / larger >= self._threshold]
            if not len(others):
                continue
            own = ids[ends[position] - sizes[position] : ends[position]]
            present[own] = True
            shared = np.array([np.count_nonzero(present[ids[ends[n] - sizes[n] : ends[n]]]) for n in others])
            present[own] = False
            similarities = shared / (sizes[position] + sizes[others] - shared)
            self.compared_pairs += len(others)
            for number in np.flatnonzero(similarities >= self._threshold):
                self._connect(int(item), int(items[others[number]]), float(similarities[number]))

    def _pending_with(self, band: int, item: int, others: np.ndarray) -> np.ndarray:
        """Return which later items are to be compared with one, bool [len(others)]."""
        if item < self._num_other:
            pending = (others >= self._num_other) & ~self._matched[others]
        else:
            pending = (self.labels[others] != self.labels[item]) & self._within
        # a pair with an equal earlier band was compared there
        indices = np.flatnonzero(pending)
        earlier = (self._keys[others[indices], :band] == self._keys[item, :band]).any(axis=1)
        pending[indices[earlier]] = False
        return pending

    def _connect(self, first: int, second: int, similarity: float) -> None:
        self.verified_pairs += 1
        if first < self._num_other:
            self._matched[second] = True
            self.matches.setdefault(second, Match(first, similarity))
            return
        label, other = sorted((int(self.labels[first]), int(self.labels[second])))
        if label == other:
            return
        joined = self._members.pop(other, [other])
        self.labels[joined] = label
        self._members.setdefault(label, [label]).extend(joined)

    def _ngrams(self, item: int) -> np.ndarray:
        own = item >= self._num_other
        tokens, documents = (self._tokens[-1], self._documents[-1]) if own else (self._tokens[0], self._documents[0])
        return tokens.ngrams(int(documents[item - self._num_other if own else item]), self._length)


def buckets(values: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each value that occurs more than once, ascending."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    edges = np.concatenate([[0], edges, [len(values)]])
    repeated = np.flatnonzero(np.diff(edges) > 1)
    return [order[edges[number] : edges[number + 1]] for number in repeated]
