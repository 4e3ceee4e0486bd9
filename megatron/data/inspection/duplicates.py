"""Exact and near-duplicate documents of a data set, within it and of another one.

Memory per document of either data set: about 120 bytes, and with near-duplicates 4 bytes more for each band (84 at
the default threshold).
"""

from dataclasses import dataclass

import numpy as np

from megatron.config.flags import Section, flag, require
from megatron.data.inspection.near_duplicates import Bands, Comparison, band_keys
from megatron.data.inspection.ngrams import LONGEST_NGRAM, DocumentTokens

DEFAULT_THRESHOLD = 0.8
EXACT_WITHIN, NEAR_WITHIN, EXACT_OTHER, NEAR_OTHER = 1, 2, 3, 4
REASONS = {
    EXACT_WITHIN: "equals an earlier document",
    NEAR_WITHIN: "nearly equals an earlier document",
    EXACT_OTHER: "equals a document of the other data set",
    NEAR_OTHER: "nearly equals a document of the other data set",
}


@dataclass(frozen=True, kw_only=True)
class DuplicateFlags(Section):
    """Duplicates, within the data set and of another one."""

    exact_duplicates: bool = flag(
        False,
        "find documents of equal token ids (the end-of-document token does not count); --near-duplicates implies it",
    )
    against: str | None = flag(
        None, "also find the documents that the data set PREFIX contains, such as validation data", metavar="PREFIX"
    )
    within: bool = flag(True, "find duplicates within the data set; --no-within leaves only those of --against")
    ngram: int = flag(
        5,
        "tokens of an n-gram; near-duplicates share most n-grams, and documents of fewer tokens are compared exactly",
        metavar="N",
        within=f"[1, {LONGEST_NGRAM}]",
    )
    remove: bool = flag(
        False,
        "write the data set to --output-prefix without its duplicates: documents of --against, and all but the first "
        "of each cluster",
        needs="output_prefix",
    )
    output_prefix: str | None = flag(None, "data prefix of the cleaned data set", metavar="OUT", needs="remove")


@dataclass(frozen=True, kw_only=True)
class DuplicateOptions(DuplicateFlags):
    """Duplicates, with the threshold of --near-duplicates, whose value is optional."""

    near_duplicates: float | None = flag(None, within="(0, 1]")

    def __post_init__(self):
        super().__post_init__()
        for name in ("against", "remove"):
            value = getattr(self, name)
            message = "needs --exact-duplicates or --near-duplicates; give one of them"
            require(not value or self.searches, name, value, message)
        require(self.within or self.against is not None, "within", False, "does nothing without --against; give both")
        alone = self.near_duplicates is None and self.ngram != type(self).ngram
        require(not alone, "ngram", self.ngram, "does nothing without --near-duplicates; give both or neither")

    @property
    def searches(self) -> bool:
        """Whether to search for duplicates."""
        return self.exact_duplicates or self.near_duplicates is not None


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of D documents.

    `clusters`: the smallest document of each one's cluster, int64 [D]; documents of a cluster are equal, or connected
    by pairs that reach the threshold.
    `first_equal`: the first document with the same tokens, int64 [D].
    `other`: the document of the other data set that equals or nearly equals each one, else -1, int64 [D].
    `similarity`: the Jaccard similarity to it, 1 if equal, else 0, float64 [D].
    `other_equal`: whether it is equal, bool [D].
    `compared_pairs`: candidate pairs whose sets were compared.
    """

    clusters: np.ndarray
    first_equal: np.ndarray
    other: np.ndarray
    similarity: np.ndarray
    other_equal: np.ndarray
    compared_pairs: int
    verified_pairs: int

    def reasons(self) -> np.ndarray:
        """Return why each document would be removed, a key of REASONS or 0, uint8 [D].

        Documents of the other data set go first; of what is left of a cluster, the first document stays.
        """
        shared = self.other >= 0
        reasons = np.where(shared, np.where(self.other_equal, EXACT_OTHER, NEAR_OTHER), 0).astype(np.uint8)
        left = np.flatnonzero(~shared)
        stays = left[np.unique(self.clusters[left], return_index=True)[1]]
        removed = np.ones(len(reasons), bool)
        removed[stays] = False
        removed &= ~shared
        equals_earlier = self.first_equal < np.arange(len(reasons))
        reasons[removed] = np.where(equals_earlier, EXACT_WITHIN, NEAR_WITHIN)[removed]
        return reasons


def find_duplicates(own: DocumentTokens, other: DocumentTokens | None, options: DuplicateOptions) -> Duplicates:
    """Return the exact duplicates, and with --near-duplicates the near ones.

    Raises: ConfigurationError without the library of near-duplicates.
    """
    count = len(own)
    num_other = 0 if other is None else len(other)
    digests = own.digests() if other is None else np.concatenate([other.digests(), own.digests()])
    first_of_all = _first_equal(digests)
    matches = first_of_all[num_other:]
    in_other = np.where(matches < num_other, matches, -1)
    first_equal = _first_equal(digests[num_other:])
    duplicates = Duplicates(
        clusters=first_equal.copy() if options.within else np.arange(count),
        first_equal=first_equal if options.within else np.arange(count),
        other=in_other,
        similarity=(in_other >= 0).astype(float),
        other_equal=in_other >= 0,
        compared_pairs=0,
        verified_pairs=0,
    )
    if options.near_duplicates is None:
        return duplicates
    # one document of each set of equal ones is enough; shorter documents have no n-gram
    chosen = np.flatnonzero((first_equal == np.arange(count)) & (own.lengths >= options.ngram))
    sets: tuple = ((own, chosen),)
    if other is not None:
        firsts = first_of_all[:num_other] == np.arange(num_other)
        sets = ((other, np.flatnonzero(firsts & (other.lengths >= options.ngram))), *sets)
    return _with_near(duplicates, first_equal, sets, options)


def _with_near(duplicates: Duplicates, first_equal: np.ndarray, sets: tuple, options: DuplicateOptions) -> Duplicates:
    """Return exact duplicates with the near ones of `sets`, ((tokens, documents) of (the other data set and) this)."""
    threshold = options.near_duplicates
    assert threshold is not None
    tokens, documents = zip(*sets)
    bands = Bands.of(threshold)
    keys = [band_keys(some_tokens, chosen, options.ngram, bands) for some_tokens, chosen in sets]
    comparison = Comparison(threshold, options.ngram, within=options.within)
    comparison.run(tokens, documents, np.concatenate(keys))
    chosen, num_other = documents[-1], len(documents[0]) if len(sets) == 2 else 0
    clusters, other = duplicates.clusters.copy(), duplicates.other.copy()
    similarity = duplicates.similarity.copy()
    if options.within:
        clusters[chosen] = chosen[comparison.labels[num_other:] - num_other]
        clusters = clusters[first_equal]
    for item, match in comparison.matches.items():
        document = chosen[item - num_other]
        if other[document] < 0:  # not equal to one
            other[document], similarity[document] = documents[0][match.document], match.similarity
    return Duplicates(
        clusters=clusters,
        first_equal=duplicates.first_equal,
        other=other[first_equal],
        similarity=similarity[first_equal],
        other_equal=duplicates.other_equal,
        compared_pairs=comparison.compared_pairs,
        verified_pairs=comparison.verified_pairs,
    )


def _first_equal(digests: np.ndarray) -> np.ndarray:
    """Return the first index with the same digest for each of `digests`, uint64 [D, 2]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: indices of equal digests ascend
    ordered = digests[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    return first
