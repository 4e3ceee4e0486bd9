"""Strict epochs and validation windows, against brute force over the whole stream."""

import itertools

import numpy as np
import pytest

from megatron.config.subsets import SUBSETS, TokenCount
from megatron.data.samples import TrainSamples, ValidationWindows, _shuffled

# all tokens are different, so that they identify their position; there are empty documents everywhere
SIZES = [0, 7, 1, 0, 0, 12, 3, 5, 0, 9, 2, 0]
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
DOCUMENTS = [list(range(start, start + size)) for start, size in zip(STARTS, SIZES)]
TOTAL, LENGTH = sum(SIZES), 4  # 39 tokens: not a multiple of the length


def stream_of(samples: TrainSamples, count: int) -> list[int]:
    """Return the token stream of the first samples; each starts with the last target of the one before."""
    cuts = [samples[position] for position in range(count)]
    assert all(cut.dtype == np.int64 and len(cut) == LENGTH + 1 for cut in cuts)
    assert all(sample[-1] == other[0] for sample, other in itertools.pairwise(cuts))
    return [int(token) for cut in cuts for token in cut[:-1]]


def documents_in(epoch: list[int], documents: list[list[int]]) -> list[int]:
    """Return the order of the documents of an epoch; fail if it is not a concatenation of all of them."""
    left, order = {ids[0]: ids for ids in documents if ids}, []
    while epoch:
        ids = left.pop(epoch[0])
        assert epoch[: len(ids)] == ids
        order.append(ids[0])
        epoch = epoch[len(ids) :]
    assert not left
    return order


@pytest.mark.parametrize("unique", [None, 30, 28, 20, 8, 7])
def test_an_epoch_of_documents_is_all_documents_permuted_and_the_stream_runs_on(data_set, unique):
    samples = TrainSamples(data_set(DOCUMENTS), LENGTH, seed=1, unique_tokens=unique)
    size = unique or TOTAL
    # the first `unique` tokens in file order, the last document cut
    cut_documents = [[token for token in ids if token < size] for ids in DOCUMENTS]
    stream = stream_of(samples, 5 * size // LENGTH)
    orders = [documents_in(stream[epoch * size :][:size], cut_documents) for epoch in range(5 - 1)]
    assert len(set(map(tuple, orders))) > 1 or sum(map(bool, cut_documents)) < 3
    for position in range(5 * size // LENGTH):
        assert samples.epochs(position) == [position * LENGTH / size]


def test_orders_depend_on_seed_and_epoch_alone(data_set):
    dataset = data_set(DOCUMENTS)
    first, again = (TrainSamples(dataset, LENGTH, seed=1) for _ in range(2))
    stream = stream_of(first, 4 * TOTAL // LENGTH)
    # read backwards: there is no state
    assert all(list(again[position]) == list(first[position]) for position in reversed(range(4 * TOTAL // LENGTH)))
    epochs = [tuple(stream[epoch * TOTAL :][:TOTAL]) for epoch in range(3)]
    assert len(set(epochs)) == 3
    assert stream_of(TrainSamples(dataset, LENGTH, seed=2), TOTAL // LENGTH) != stream[: TOTAL // LENGTH * LENGTH]


@pytest.mark.parametrize("order", ["documents", "windows"])
def test_unique_tokens_are_the_first_of_the_file_whatever_the_seed(data_set, order):
    dataset = data_set(DOCUMENTS)
    for seed in range(3):
        samples = TrainSamples(dataset, LENGTH, seed, order, unique_tokens=20)
        seen = {int(token) for position in range(40) for token in samples[position]}
        assert (samples.unique_tokens, seen) == (20, set(range(20)))


@pytest.mark.parametrize("unique", [5, 8, 9, 20, 37, TOTAL])
def test_windows_of_an_epoch_are_disjoint_cuts_of_the_ring_at_a_new_offset(data_set, unique):
    samples = TrainSamples(data_set(DOCUMENTS), LENGTH, 3, "windows", unique)
    count, offsets, orders = unique // LENGTH, set(), set()
    for epoch in range(12):
        cuts = [samples[epoch * count + turn] for turn in range(count)]
        for cut in cuts:
            assert list(cut) == [(int(cut[0]) + step) % unique for step in range(LENGTH + 1)]  # wraps around
        read = [int(token) for cut in cuts for token in cut[:-1]]
        assert len(set(read)) == count * LENGTH  # no token twice, less than a window left out
        starts = tuple(int(cut[0]) for cut in cuts)
        offsets.add(frozenset(starts))
        orders.add(tuple(np.argsort(starts)))
    assert len(offsets) > 1
    assert len(orders) > 1 or count == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000])
def test_the_keyed_permutation_is_a_bijection(count):
    orders = [[_shuffled(index, count, seed, epoch) for index in range(count)] for seed in (0, 1) for epoch in (0, 7)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(map(tuple, orders))) == 4 or count < 16


def test_the_keyed_permutation_is_spread():
    """The image of 0 over 4000 epochs is uniform: chi-squared of 8 cells below its 1e-6 quantile."""
    cells = np.bincount([_shuffled(0, 8, 5, epoch) for epoch in range(4000)], minlength=8)
    assert ((cells - 500) ** 2 / 500).sum() < 41


@pytest.mark.parametrize("order", ["documents", "windows"])
def test_windows_start_at_once_and_documents_need_only_their_sizes(data_set, monkeypatch, order):
    dataset = data_set(DOCUMENTS)
    reads = []
    monkeypatch.setattr(dataset, "_checked", lambda ids: reads.append(len(ids)) or ids)
    samples = TrainSamples(dataset, LENGTH, 1, order)
    assert reads == []
    samples[10**9]  # the cost does not depend on the index
    assert sum(reads) == LENGTH + 1


def test_a_corpus_smaller_than_a_sample_is_refused(data_set, refused):
    dataset = data_set([[1, 2, 3], [4]])
    assert list(TrainSamples(dataset, 3, 0)[0]) != []
    for build in (lambda: TrainSamples(dataset, 4, 0), lambda: ValidationWindows(dataset, 4)):
        with refused("--seq-length 4", "needs 5 tokens", "data.bin holds 4", "add text"):
            build()
    with refused("--seq-length 3", "needs 4 tokens", "--train-unique-tokens leaves 3"):
        TrainSamples(dataset, 3, 0, unique_tokens=3)
    with refused("--train-unique-tokens 5", "data.bin holds 4", "lower it"):
        TrainSamples(dataset, 3, 0, unique_tokens=5)


def test_validation_windows_lie_side_by_side_and_know_each_owner(data_set):
    windows = ValidationWindows(data_set(DOCUMENTS), LENGTH)
    owner = [document for document, size in enumerate(SIZES) for _ in range(size)]
    assert len(windows) == (TOTAL - 1) // LENGTH
    for number in range(len(windows)):
        ids, owners = windows[number]
        expected = list(range(number * LENGTH, number * LENGTH + LENGTH + 1))
        assert (ids.tolist(), owners.tolist()) == (expected, [owner[token] for token in expected])


@pytest.mark.parametrize(
    "limit, starts", [(1, [0]), (2, [0, 4]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (9, range(9)), (99, range(9))]
)
def test_a_limit_spreads_the_windows(data_set, limit, starts):
    windows = ValidationWindows(data_set(DOCUMENTS), LENGTH, limit)
    assert [int(windows[number][0][0]) for number in range(len(windows))] == [start * LENGTH for start in starts]


def test_a_subset_that_is_given_by_name_ends_with_a_document(data_set, refused, monkeypatch):
    dataset = data_set(DOCUMENTS)  # documents end at 7, 8, 20, 23, 28, 37 and 39
    monkeypatch.setitem(SUBSETS, "C4-test", 23)
    assert TrainSamples(dataset, LENGTH, 1, unique_tokens=TokenCount("C4-test")).unique_tokens == 23
    monkeypatch.setitem(SUBSETS, "C4-test", 24)
    remedy = "give data in the published order, or the number 24"
    with refused("--train-unique-tokens C4-test", "of 24 tokens", "data documents end at tokens 23 and 28", remedy):
        TrainSamples(dataset, LENGTH, 1, unique_tokens=TokenCount("C4-test"))
    assert TrainSamples(dataset, LENGTH, 1, unique_tokens=TokenCount("24")).unique_tokens == 24
    monkeypatch.setitem(SUBSETS, "C4-test", 40)
    with refused("--train-data-path a C4-test", "data.bin holds 39 tokens, and the published subset 40"):
        TrainSamples(dataset, LENGTH, 1, unique_tokens=TokenCount("C4-test"), cut_by="--train-data-path a")
