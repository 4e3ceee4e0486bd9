"""Blends against a slow reference that sorts all due times, and the samples that a run reads."""

import math
from fractions import Fraction

import numpy as np
import pytest

from megatron.data.blend import BLEND_ORDERS, GreedyShares, Shares, TrainBlend, ValidationBlend, combined_hash
from megatron.data.samples import TrainSamples, ValidationWindows

WEIGHTS = [[1], [0.3, 0.7], [1, 1, 1], [5, 1, 0.01], [0.2] * 5, [1e-6, 3, 2], list(range(1, 301))]


def slowly(weights, positions: int) -> list[tuple[int, int]]:
    """Return (member, index) of the first samples by sorting all due times in exact arithmetic."""
    total = sum(map(Fraction, weights))
    due = [
        ((index + Fraction(1, 2)) / (Fraction(weight) / total), member, index)
        for member, weight in enumerate(weights)
        for index in range(int(positions * Fraction(weight) / total) + 2)
    ]
    return [(member, index) for _, member, index in sorted(due)[:positions]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{len(weights)} of {weights[0]}")
def test_positions_are_dealt_in_the_order_in_which_samples_are_due(weights):
    shares, expected = Shares(weights), slowly(weights, 700)
    dealt = [shares.locate(position) for position in range(700)]
    # in floats, ties between members may be in another order; the samples of each member are in order
    counts, slow_counts = np.zeros(len(weights)), np.zeros(len(weights))
    for position, ((member, index), (slow_member, _)) in enumerate(zip(dealt, expected)):
        assert index == counts[member]
        counts[member] += 1
        slow_counts[slow_member] += 1
        assert shares.counts(position + 1) == counts.tolist()
        assert abs(counts - slow_counts).max() <= 1
    wanted = 700 * np.array(weights) / sum(weights)
    assert abs(counts - wanted).max() < 1 + 1e-6 * len(weights)


@pytest.mark.parametrize("weights", WEIGHTS[1:], ids=lambda weights: f"{len(weights)} of {weights[0]}")
def test_far_positions_cost_nothing_and_follow_one_another(weights):
    shares, start = Shares(weights), 10**12
    counts = shares.counts(start)
    assert sum(counts) == start
    for position in range(start, start + 300):
        member, index = shares.locate(position)
        assert index == counts[member]
        counts[member] += 1


def greedily(weights, positions: int) -> list[tuple[int, int]]:
    """Return (member, index) of the first samples by Megatron's algorithm: next is the largest deficit."""
    total = 0.0
    for weight in weights:
        total += weight
    shares = np.array([weight / total for weight in weights])
    shares, counts, dealt = (shares / np.sum(shares)).tolist(), [0] * len(weights), []
    for position in range(positions):
        chosen, largest = 0, -math.inf
        for member, share in enumerate(shares):
            error = share * max(float(position), 1.0) - float(counts[member])
            if error > largest:  # ties go to the first
                chosen, largest = member, error
        dealt.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return dealt


GREEDY_WEIGHTS = [*WEIGHTS, [0.1] * 10, [0.2, 0.3, 0.5], [0.7, 0.1, 0.1, 0.1], [1, 1e-9], [1e-9, 1], [30, 70, 1e-3]]


@pytest.mark.parametrize("segments, length", [(1, 1), (3, 7), (16, 64)])
@pytest.mark.parametrize("weights", GREEDY_WEIGHTS, ids=lambda weights: f"{len(weights)} of {weights[0]}")
def test_megatrons_order_is_that_of_its_greedy_rule(weights, segments, length, monkeypatch):
    """The order does not depend on the segments and blocks in which it is computed."""
    monkeypatch.setattr(GreedyShares, "SEGMENTS", segments)
    monkeypatch.setattr(GreedyShares, "LENGTH", length)
    positions = 400 if len(weights) > 9 or length == 1 else 2500
    expected = greedily(weights, positions)
    shares = GreedyShares(weights)
    assert [shares.locate(position) for position in range(positions)] == expected
    for position in (0, 1, 5, 399):  # a resume starts anywhere
        assert GreedyShares(weights).locate(position) == expected[position]
        counts = np.bincount([member for member, _ in expected[:position]], minlength=len(weights))
        assert GreedyShares(weights).counts(position) == counts.tolist()


def test_megatrons_order_is_exact_beyond_a_block():
    weights, positions = [0.61, 0.3, 0.09], GreedyShares.LENGTH * GreedyShares.SEGMENTS + 5000
    expected, shares = greedily(weights, positions), GreedyShares(weights)
    probes = np.random.default_rng(0).integers(positions, size=2000).tolist()
    probes += range(positions - 1000, positions)
    assert [shares.locate(position) for position in probes] == [expected[position] for position in probes]


def test_both_orders_hold_the_shares_and_differ():
    weights = [0.5, 0.3, 0.2]
    orders = {name: kind(weights) for name, kind in BLEND_ORDERS.items()}
    dealt = {name: [shares.locate(k)[0] for k in range(1000)] for name, shares in orders.items()}
    assert dealt["due-time"] != dealt["megatron"]
    for members in dealt.values():
        assert abs(np.bincount(members) - [500, 300, 200]).max() <= 1


def test_the_scale_of_weights_does_not_change_megatrons_order():
    for scale in (2.0**-900, 2.0**1020):
        scaled, plain = (GreedyShares([weight * factor for weight in (3, 2, 2.5)]) for factor in (scale, 1))
        assert [scaled.locate(k) for k in range(500)] == [plain.locate(k) for k in range(500)]


def test_a_blend_reads_each_member_in_its_own_order(data_set):
    first = data_set([list(range(30))], name="first")
    second = data_set([list(range(100, 150))], name="second")
    members = [TrainSamples(dataset, 4, seed=1) for dataset in (first, second)]
    blend = TrainBlend(members, [1, 3])
    read = [blend[position].tolist() for position in range(40)]
    assert [ids for ids in read if ids[0] < 100] == [members[0][index].tolist() for index in range(10)]
    assert [ids for ids in read if ids[0] >= 100] == [members[1][index].tolist() for index in range(30)]
    assert blend.unique_tokens == 80
    assert blend.epochs(40) == [10 * 4 / 30, 30 * 4 / 50]


@pytest.mark.parametrize("order", ["documents", "windows", "megatron"])
def test_a_cut_member_is_the_first_tokens_of_its_file(data_set, order):
    """As if its file ended there: the blend reads what it reads of shorter data sets."""
    first, second = [range(20), range(20, 31), range(31, 60)], [range(100, 160)]
    whole = [data_set(documents, name=str(number)) for number, documents in enumerate((first, second))]
    short = [data_set([range(20), range(20, 25)], name="short"), whole[1]]
    blends = [
        TrainBlend([TrainSamples(whole[0], 4, 1, order, 25), TrainSamples(whole[1], 4, 1, order)], [1, 3]),
        TrainBlend([TrainSamples(dataset, 4, 1, order) for dataset in short], [1, 3]),
    ]
    for blend in blends:
        blend.request(80)
    cut, expected = ([blend[index].tolist() for index in range(80)] for blend in blends)
    assert cut == expected and {token for ids in cut for token in ids if token < 100} == set(range(25))
    assert blends[0].unique_tokens == 85 and blends[0].epochs(80) == [20 * 4 / 25, 60 * 4 / 60]


def test_megatrons_order_of_a_member_is_that_of_its_own_share(data_set):
    datasets = [data_set([[0] * 9, [1] * 13], name="a"), data_set([[2] * 40], name="b")]
    blend = TrainBlend([TrainSamples(dataset, 4, 1234, "megatron") for dataset in datasets], [0.5, 0.5])
    blend.request(20)
    alone = TrainSamples(datasets[0], 4, 1234, "megatron")
    alone.request(10)
    own = [blend[position].tolist() for position in range(20) if blend._shares.locate(position)[0] == 0]
    assert own == [alone[index].tolist() for index in range(10)]


def test_megatrons_blend_asks_each_member_for_half_a_percent_more(data_set):
    """As in Megatron-DeepSpeed: the order of a member depends on how many samples are requested from it."""
    sizes = [*range(1, 29), 17]  # 423 tokens give 211 samples in two epochs
    datasets = [data_set([[500 * member + size] * size for size in sizes], name=str(member)) for member in range(2)]
    weights, samples = [0.3, 0.7], 700
    blend = TrainBlend([TrainSamples(dataset, 4, 1234, "megatron") for dataset in datasets], weights, "megatron")
    blend.request(samples)
    alone = [TrainSamples(dataset, 4, 1234, "megatron") for dataset in datasets]
    for member, count in zip(alone, (212, 493)):  # ceil(210 * 1.005), ceil(490 * 1.005)
        member.request(count)
    for position, (member, index) in enumerate(greedily(weights, samples)):
        assert blend[position].tolist() == alone[member][index].tolist()


def test_validation_windows_of_a_blend_keep_the_shares_and_number_the_documents_on(data_set):
    first = data_set([[1] * 10, [2] * 31], name="first")  # 10 windows
    second = data_set([[3] * 201], name="second")  # 50 windows
    parts = [ValidationWindows(dataset, 4) for dataset in (first, second)]
    whole = ValidationBlend(parts, [1, 2])
    assert (len(whole), whole.documents) == (30, 3)
    few = ValidationBlend(parts, [1, 2], limit=6)
    owners = [few[window][1][0] for window in range(len(few))]
    assert len(few) == 6 and owners.count(2) == 4
    for blend in (whole, few):
        for window in range(len(blend)):
            ids, documents = blend[window]
            assert (ids == documents + 1).all()


def test_validation_reads_no_window_twice_however_small_a_member(data_set):
    parts = [ValidationWindows(data_set([[0] * size], name=str(size)), 4) for size in (5, 101)]
    blend = ValidationBlend(parts, [0.5, 0.5])
    assert [len(part) for part in parts] == [1, 25] and len(blend) == 2


def test_the_hash_of_a_blend_depends_on_members_and_shares_and_not_on_their_scale():
    assert combined_hash(["a"], [3.0]) == "a"
    two = combined_hash(["a", "b"], [1.0, 3.0])
    assert two == combined_hash(["a", "b"], [0.25, 0.75])
    assert combined_hash(["a", "b"], [0.3, 0.6]) == combined_hash(["a", "b"], [1, 2])
    assert Shares([1e308, 1e308]).shares == [0.5, 0.5]
    assert two == combined_hash(["a", "b"], [1.0, 3.0], [None, None])
    cuts = [[5, None], [6, None], [None, 5], [5, 5], [15, None]]
    hashes = [two, combined_hash(["b", "a"], [1.0, 3.0]), combined_hash(["a", "b"], [1.0, 2.0])]
    hashes += [combined_hash(["a", "b"], [1.0, 3.0], cut) for cut in cuts]
    assert len(set(hashes)) == 3 + len(cuts)
