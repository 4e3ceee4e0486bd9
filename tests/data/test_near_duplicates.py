"""Near-duplicates against all pairs compared by brute force, and against the S-curve of locality-sensitive hashing.

Documents are compared with sets of tuples of ids, which have no hash of ours in them.
"""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from megatron.data.inspection import near_duplicates
from megatron.data.inspection.duplicates import DuplicateOptions, find_duplicates
from megatron.data.inspection.near_duplicates import NUM_PERM, Bands, band_keys
from megatron.data.inspection.ngrams import MULTIPLIERS, DocumentTokens, ngram_hashes

EOD = 999
pytest.importorskip("rensa", reason="the extra dedup is not installed")


@cache
def ngram_set(ids: tuple, length: int) -> set[tuple]:
    return {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}


def jaccard(first, second, length: int = 5) -> float:
    """Return the similarity of two documents without end-of-document tokens; equal ones have 1."""
    if list(first) == list(second):
        return 1.0
    sets = ngram_set(tuple(first), length), ngram_set(tuple(second), length)
    shared = len(sets[0] & sets[1])
    union = len(sets[0]) + len(sets[1]) - shared
    return shared / union if union else 0.0


def planted(seed: int, count: int = 40) -> list[list[int]]:
    """Return random documents, and for most of them edited copies of all similarities, shuffled."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        original = random.integers(0, 900, random.integers(1, 200)).tolist()
        documents.append(original)
        for edits in (0, 1, 2, 4, 8, 16):
            if random.random() < 0.5:
                copy = list(original)
                for _ in range(edits):
                    copy[random.integers(len(copy))] = int(random.integers(900))
                documents.append(copy)
    return [documents[number] for number in random.permutation(len(documents))]


@pytest.fixture
def tokens(data_set):
    """Return a function that writes documents and opens them as duplicate search does."""

    def write(documents, name="data"):
        return DocumentTokens(data_set([[*ids, EOD] for ids in documents], name=name), EOD)

    return write


def components(documents, threshold: float, length: int) -> list[int]:
    """Return the first document of each one's cluster, by brute force."""
    edges = [
        (a, b)
        for a, b in combinations(range(len(documents)), 2)
        if jaccard(documents[a], documents[b], length) >= threshold
    ]
    rows, columns = zip(*edges)
    matrix = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(len(documents),) * 2)
    labels = connected_components(matrix, directed=False)[1]
    return [int(np.flatnonzero(labels == label)[0]) for label in labels]


@pytest.mark.parametrize("threshold, length", [(0.8, 5), (0.5, 5), (1.0, 3), (0.3, 1)])
def test_clusters_are_those_of_all_pairs(tokens, threshold, length):
    documents = planted(seed=1)
    options = DuplicateOptions(near_duplicates=threshold, ngram=length)
    duplicates = find_duplicates(tokens(documents), None, options)
    expected = components(documents, threshold, length)
    assert duplicates.clusters.tolist() == expected
    assert len(set(expected)) < len(documents)
    assert duplicates.verified_pairs <= duplicates.compared_pairs
    if threshold == 0.8:
        assert duplicates.verified_pairs < duplicates.compared_pairs  # verification had something to reject


def test_chunks_of_large_buckets_change_nothing(tokens, monkeypatch):
    documents = planted(seed=2)
    opened, options = tokens(documents), DuplicateOptions(near_duplicates=0.6)
    whole = find_duplicates(opened, None, options)
    monkeypatch.setattr(near_duplicates, "CHUNK_TOKENS", 150)
    chunked = find_duplicates(opened, None, options)
    assert chunked.clusters.tolist() == whole.clusters.tolist() == components(documents, 0.6, 5)


def test_documents_of_another_data_set_are_those_of_all_pairs(tokens):
    documents = planted(seed=3)
    own, other = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    options = DuplicateOptions(near_duplicates=0.7, against="other", within=False)
    duplicates = find_duplicates(tokens(own), tokens(other, "other"), options)
    best = [max(jaccard(ids, candidate) for candidate in other) for ids in own]
    assert [bool(document >= 0) for document in duplicates.other] == [similarity >= 0.7 for similarity in best]
    for ids, number, similarity in zip(own, duplicates.other, duplicates.similarity):
        if number >= 0:
            assert jaccard(ids, other[number]) == similarity >= 0.7
    assert duplicates.clusters.tolist() == [*range(len(own))]  # not compared with each other
    both = find_duplicates(tokens(own), tokens(other, "other"), DuplicateOptions(near_duplicates=0.7, against="other"))
    assert (both.other >= 0).tolist() == (duplicates.other >= 0).tolist()
    assert both.clusters.tolist() == components(own, 0.7, 5)
    assert both.compared_pairs > duplicates.compared_pairs  # those within the data set


@pytest.mark.parametrize("chunk_tokens", [1 << 22, 250])
def test_a_pair_is_compared_once_and_only_if_it_can_change_the_result(tokens, monkeypatch, chunk_tokens):
    monkeypatch.setattr(near_duplicates, "CHUNK_TOKENS", chunk_tokens)
    base = np.arange(100)
    edited = [np.where(base == number, 500 + number, base).tolist() for number in range(5, 95, 8)]
    options = DuplicateOptions(near_duplicates=0.95)  # of 96 5-grams each edit changes up to 5: none reaches it
    opened = tokens(edited)
    keys = band_keys(opened, np.arange(len(edited)), 5, Bands.of(0.95))
    candidates = sum((keys[a] == keys[b]).any() for a, b in combinations(range(len(edited)), 2))
    duplicates = find_duplicates(opened, None, options)
    assert duplicates.compared_pairs == candidates > 10 and duplicates.verified_pairs == 0
    connected = find_duplicates(opened, None, DuplicateOptions(near_duplicates=0.5))
    assert len(edited) - 1 <= connected.compared_pairs <= 2 * len(edited)  # of 66 pairs
    options = DuplicateOptions(near_duplicates=0.5, against="other", within=False)
    matched = find_duplicates(tokens(edited[:1]), tokens(edited[1:], "other"), options)
    assert matched.compared_pairs == matched.verified_pairs == 1
    options = DuplicateOptions(near_duplicates=0.95, against="other", within=False)
    unmatched = find_duplicates(tokens(edited[3:]), tokens(edited[:3], "other"), options)
    between = sum((keys[a] == keys[b]).any() for a in range(3) for b in range(3, len(edited)))
    assert unmatched.compared_pairs == between > 0


@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.8])
def test_the_share_of_candidates_is_that_of_the_s_curve(tokens, similarity):
    """Pairs of exactly this similarity: of 135 distinct 1-grams, two documents share the ids that give it."""
    pairs, size = 500, 135
    shared = round(2 * size * similarity / (1 + similarity))
    random = np.random.default_rng(4)
    documents = []
    for _ in range(pairs):
        ids = random.permutation(999)[: 2 * size - shared]
        documents += [ids[:size], ids[size - shared :]]
    exact = jaccard(documents[0], documents[1], 1)
    bands = Bands.of(0.8)
    keys = band_keys(tokens(documents), np.arange(len(documents)), 1, bands)
    observed = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = 1 - (1 - exact**bands.rows) ** bands.count
    assert exact == pytest.approx(similarity, abs=0.01)
    assert abs(observed - expected) <= 4 * np.sqrt(expected * (1 - expected) / pairs) + 1 / pairs
    assert bands.recall(exact) == expected


def test_bands_are_the_longest_that_reach_the_recall():
    """By the definition of the S-curve, for every length."""
    for threshold in (0.05, 0.3, 0.5, 0.8, 0.95, 1.0):
        bands = Bands.of(threshold)
        assert bands.count == NUM_PERM // bands.rows
        reaching = [r for r in range(1, NUM_PERM + 1) if 1 - (1 - threshold**r) ** (NUM_PERM // r) >= 0.99]
        assert bands.rows == max(reaching)
    assert Bands.of(0.001) == Bands(NUM_PERM, 1) and Bands.of(0.001).recall(0.001) < 0.99


def test_hashes_of_ngrams_are_those_of_whole_numbers(tokens):
    """Python's integers modulo 2^64, and MurmurHash3's finalizer as published."""

    def finalized(value: int) -> int:
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * multiplier % 2**64
        return value ^ value >> 33

    ids = [0, 7, 50000, 2**31 - 1, 0, 7]
    multipliers = MULTIPLIERS[:3].tolist()
    expected = [
        finalized(sum(m * x for m, x in zip(multipliers, ids[start : start + 3])) % 2**64) for start in range(4)
    ]
    assert ngram_hashes(np.array(ids, np.int32), 3).tolist() == expected
    assert len(ngram_hashes(np.array([1, 2]), 3)) == 0
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 1, 2, 3]]
    ((hashes, edges),) = tokens(documents).ngram_batches(np.arange(3), 3)
    assert edges.tolist() == [0, 1, 3, 6]  # no n-gram spans two documents
    assert hashes.tolist() == [value for ids in documents for value in ngram_hashes(np.array(ids), 3).tolist()]


def test_signatures_do_not_depend_on_batches(tokens, monkeypatch):
    opened, bands = tokens(planted(seed=5)), Bands.of(0.8)
    chosen = np.flatnonzero(opened.lengths >= 5)
    keys = band_keys(opened, chosen, 5, bands)
    monkeypatch.setattr("megatron.data.inspection.ngrams.BATCH_TOKENS", 1)
    assert (band_keys(opened, chosen, 5, bands) == keys).all()
    assert len(np.unique(keys[:, 0])) > len(keys) / 3


def test_short_and_empty_documents_are_compared_exactly(tokens):
    opened = tokens([[1, 2], [], [1, 2, 3], [1, 2], [], [1, 2, 3, 4, 5]])
    duplicates = find_duplicates(opened, None, DuplicateOptions(near_duplicates=0.1))
    assert duplicates.clusters.tolist() == [0, 1, 2, 0, 1, 5]
