"""Megatron's order against a direct, slow construction, token by token."""

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.megatron_order import MegatronOrder
from megatron.data.samples import TrainSamples
from megatron.training.launcher import main

SIZES = {
    "even": [7, 7, 7, 7],
    "uneven": [1, 30, 4, 2, 0, 17, 9, 55, 3],
    "one": [41],
    "empty at the end": [3, 30, 0, 9, 0, 0],
    "empty at both ends": [0, 0, 41, 7, 0],
}


def slowly(sizes, seq_length, seed, requested):
    """Return the samples as lists of (document, offset) by the published algorithm, step by step."""
    total = sum(sizes)
    epochs = 1
    while (epochs * total - 1) // seq_length < requested:
        epochs += 1
    random = np.random.RandomState(seed)
    missing = requested - ((epochs - 1) * total - 1) // seq_length
    apart = epochs > 1 and missing < int(0.80 * ((total - 1) // seq_length))
    documents = []
    for copies in [epochs - 1, 1] if apart else [epochs]:
        block = np.array(list(range(len(sizes))) * copies)
        random.shuffle(block)
        documents += block.tolist()
    tokens = [(document, offset) for document in documents for offset in range(sizes[document])]
    samples = [tokens[start : start + seq_length + 1] for start in range(0, len(tokens) - seq_length, seq_length)]
    first = ((epochs - 1) * total - 1) // seq_length if apart else len(samples)
    order = []
    for block in (np.arange(first), np.arange(first, len(samples))):
        random.shuffle(block)
        order += block.tolist()
    return [samples[index] for index in order], epochs, apart


def write(tmp_path, sizes) -> IndexedDataset:
    """Write documents with the ids document * 100 + offset."""
    with IndexedDatasetWriter(tmp_path / "data", 60000) as writer:
        for document, size in enumerate(sizes):
            writer.add_document([document * 100 + offset for offset in range(size)])
    return IndexedDataset(tmp_path / "data")


@pytest.mark.parametrize("seed", [0, 1234])
@pytest.mark.parametrize("seq_length", [2, 5, 16])
@pytest.mark.parametrize("name", SIZES)
def test_every_sample_equals_the_slow_construction(name, seq_length, seed, tmp_path):
    sizes, seen = SIZES[name], set()
    dataset = write(tmp_path, sizes)
    for requested in (1, 2, 3, 5, 8, 13, 21, 40, 100):
        expected, epochs, apart = slowly(sizes, seq_length, seed, requested)
        samples = TrainSamples(dataset, seq_length, seed, "megatron")
        samples.request(requested)
        token_ids = [samples[position].tolist() for position in range(requested)]
        assert token_ids == [[d * 100 + o for d, o in sample] for sample in expected[:requested]]
        seen.add((epochs > 1, apart))
    assert (True, True) in seen or (True, False) in seen


def test_what_fills_up_a_short_last_batch_can_be_read(tmp_path):
    samples = TrainSamples(write(tmp_path, SIZES["one"]), 5, 0, "megatron")
    samples.request(8)  # exactly the samples that one epoch has
    assert len(samples[8]) == 6


def test_both_kinds_of_last_epoch_are_met():
    """Otherwise the test above could not distinguish them."""
    kinds = {slowly(SIZES["uneven"], 5, 0, requested)[1:] for requested in range(1, 80)}
    assert {apart for epochs, apart in kinds if epochs > 1} == {True, False} and (1, False) in kinds


def test_the_types_are_megatrons():
    order = MegatronOrder(np.array(SIZES["uneven"]), 5, 0, 40)
    assert (order.documents.dtype, order.shuffle.dtype, order.ends.dtype) == (np.int32, np.uint32, np.int64)


def test_unique_tokens_cut_the_documents(tmp_path):
    samples = TrainSamples(write(tmp_path, SIZES["uneven"]), 5, 0, "megatron", unique_tokens=40)
    samples.request(30)
    expected, _, _ = slowly([1, 30, 4, 2, 0, 3], 5, 0, 30)
    assert [samples[i].tolist() for i in range(30)] == [[d * 100 + o for d, o in s] for s in expected[:30]]


@pytest.mark.parametrize("requested", [3, 9, 40])
def test_a_part_of_split_keeps_its_empty_documents_at_the_end(tmp_path, requested):
    whole = write(tmp_path, [4, 0, 9, 30, 0, 0, 17, 55])
    samples = TrainSamples(whole.document_range(1, 6), 5, 7, "megatron")
    samples.request(requested)
    expected, _, _ = slowly([0, 9, 30, 0, 0], 5, 7, requested)
    assert [samples[i].tolist() for i in range(requested)] == [
        [(d + 1) * 100 + o for d, o in sample] for sample in expected[:requested]
    ]


def test_other_orders_draw_as_if_no_empty_document_stood_at_the_end(data_set):
    """The order of older runs does not change."""
    with_empty = data_set([[1, 2, 3], [], [4, 5], [6, 7, 8, 9], [], []], name="with")
    without = data_set([[1, 2, 3], [], [4, 5], [6, 7, 8, 9]], name="without")
    for order in ("documents", "windows"):
        with_empty_samples, without_samples = (TrainSamples(dataset, 3, 0, order) for dataset in (with_empty, without))
        assert [with_empty_samples[i].tolist() for i in range(12)] == [without_samples[i].tolist() for i in range(12)]


def test_a_changed_budget_is_refused_on_a_branch_too(tiny, tmp_path, capsys):
    flags = [*map(str, tiny), "--epoch-order", "megatron", "--train-unique-tokens", "400"]
    main("ar", [*flags, "--save", str(tmp_path / "a"), "--exit-interval", "2"])
    longer = [flag if flag != "93" else "120" for flag in flags]
    with pytest.raises(SystemExit) as left:
        main("ar", [*longer, "--load", str(tmp_path / "a"), "--save", str(tmp_path / "b")])
    assert left.value.code == 2
    assert "--epoch-order megatron: depends on the budget, 93 samples in" in capsys.readouterr().err
