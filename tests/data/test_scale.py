"""Data sets too large for an index that is read as a whole when it is opened."""

import errno
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from megatron.data import index_file
from megatron.data.copy_documents import Source
from megatron.data.index_file import HEADER, MAGIC
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.errors import ConfigurationError
from tests.test_benchmarks import report_of

BILLION, LARGEST = 10**9, 2**31 - 1  # documents; tokens of one document at most
SIZES = [3, 0, 7, 1, 0, 0, 5, 4, 9, 2, 0, 6, 1, 8, 3, 0, 2, 5, 0]
ORDERS = ("documents", "windows", "megatron")


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def write_sparse(prefix, tokens: int) -> None:
    """Write a data set of a billion documents as sparse files: all but the last ones are empty, all ids are 0."""
    last = -(-tokens // LARGEST)
    sizes = np.full(last, LARGEST, "<i4")
    sizes[-1] = tokens - LARGEST * (last - 1)
    offsets = 2 * LARGEST * np.arange(last, dtype="<i8")
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, 8, BILLION, 1))
        index.seek(HEADER.size + 4 * (BILLION - last))
        index.write(sizes.tobytes())
        index.seek(HEADER.size + 4 * BILLION + 8 * (BILLION - last))
        index.write(offsets.tobytes() + struct.pack("<q", 0))
    with open(f"{prefix}.bin", "wb") as data:
        data.truncate(2 * tokens)


def test_a_billion_documents_at_500_epochs_are_read_at_once(tmp_path):
    tokens = 480 * BILLION
    try:
        write_sparse(tmp_path / "data", tokens)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.ENOSPC):
            raise
        pytest.skip(f"the file system does not hold a sparse file of {2 * tokens} bytes")
    tracemalloc.start()
    before, start = anonymous_bytes(), time.process_time()
    dataset = IndexedDataset(str(tmp_path / "data"), 50257)
    samples = TrainSamples(dataset, 2048, 1234, "windows")
    count = 500 * tokens // 2048
    samples.request(count)
    indices = np.random.default_rng(0).integers(count, size=200).tolist()
    assert all(len(samples[index]) == 2049 for index in indices)
    assert samples.epochs(count) == [pytest.approx(500)] and len(dataset) == BILLION
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert max(peak, anonymous_bytes() - before) < 100e6


def test_the_published_quickstart_starts_in_two_seconds(tmp_path):
    """100M tokens of documents of 480 at 500 epochs, in the order that shuffles the documents."""
    sizes = np.maximum(1, np.random.default_rng(0).lognormal(5.67, 1.0, 208_931)).astype(np.int32)
    index_file.write_index(tmp_path / "data.idx", np.dtype(np.uint16), sizes, np.arange(len(sizes) + 1))
    with open(tmp_path / "data.bin", "wb") as data:
        data.truncate(2 * int(sizes.sum()))
    start = time.process_time()
    samples = TrainSamples(IndexedDataset(str(tmp_path / "data")), 2048, 1234)
    samples.request(500 * samples.unique_tokens // 2048)
    assert len(samples[0]) == 2049
    assert time.process_time() - start < 2


# ------------------------------------------------------------------------------ damage outside the checked blocks


@pytest.fixture
def sampled(monkeypatch):
    """Check blocks of two entries only: the first two, two in the middle, the last two."""
    monkeypatch.setattr(index_file, "WHOLE", 4)
    monkeypatch.setattr(index_file, "BLOCKS", 3)
    monkeypatch.setattr(index_file, "BLOCK", 2)


def write(folder, sizes=SIZES) -> str:
    """Write documents whose ids count all tokens."""
    ends = np.cumsum(sizes)
    with IndexedDatasetWriter(folder / "data", 1000) as writer:
        for end, size in zip(ends, sizes):
            writer.add_document(range(end - size, end))
    return str(folder / "data")


def damage(prefix: str, kind: str, entry: int, amount: int) -> None:
    """Add `amount` to a number of the index."""
    start, letter = {
        "size": (HEADER.size, "i"),
        "offset": (HEADER.size + 4 * len(SIZES), "q"),
        "boundary": (HEADER.size + 12 * len(SIZES), "q"),
    }[kind]
    with open(f"{prefix}.idx", "r+b") as index:
        position = start + entry * struct.calcsize(letter)
        index.seek(position)
        (value,) = struct.unpack(f"<{letter}", index.read(struct.calcsize(letter)))
        index.seek(position)
        index.write(struct.pack(f"<{letter}", value + amount))


def read(prefix: str, order: str, unique: int | None = None) -> list[list[int]]:
    samples = TrainSamples(IndexedDataset(prefix), 4, 1, order, unique_tokens=unique)
    samples.request(20)
    return [samples[index].tolist() for index in range(20)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("unique", [None, 20, sum(SIZES)])
def test_an_index_that_is_checked_in_samples_gives_the_same_samples(order, unique, tmp_path, sampled, monkeypatch):
    prefix = write(tmp_path)
    in_samples = read(prefix, order, unique)
    part = IndexedDataset(prefix).document_range(2, 14).document_range(1, 10)
    windows = ValidationWindows(part, 4)
    monkeypatch.setattr(index_file, "WHOLE", 100)
    assert read(prefix, order, unique) == in_samples
    expected = ValidationWindows(IndexedDataset(prefix).document_range(3, 12), 4)
    assert [windows[i][0].tolist() for i in range(len(windows))] == [
        expected[i][0].tolist() for i in range(len(expected))
    ]
    assert part.tokens_between(2, 5) == sum(SIZES[5:8]) and part.tokens_between(2, 2) == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kind, amount", [("size", 1), ("size", -20), ("offset", 2), ("offset", -(2**32)), ("offset", 999)]
)
def test_a_damaged_entry_is_refused_or_not_used(kind, amount, order, tmp_path, sampled):
    """Windows do not use documents, so that an entry between the blocks cannot change them."""
    prefix = write(tmp_path)
    expected, refused = read(prefix, order), 0
    for entry in range(len(SIZES)):
        damage(prefix, kind, entry, amount)
        try:
            assert read(prefix, order) == expected
        except ConfigurationError as error:
            refused += 1
            assert (
                f"document {entry}" in str(error) or f"document {entry + 1}" in str(error) or "data.bin" in str(error)
            )
        damage(prefix, kind, entry, -amount)
    assert refused == len(SIZES) if order != "windows" else 0 < refused < len(SIZES)


@pytest.mark.parametrize("entry", range(len(SIZES)))
def test_a_cut_or_a_single_document_sees_the_damage_that_it_meets(entry, tmp_path, sampled):
    prefix = write(tmp_path)
    documents = [IndexedDataset(prefix)[document].tolist() for document in range(len(SIZES))]
    damage(prefix, "offset", entry, 2)
    try:
        dataset = IndexedDataset(prefix)
    except ConfigurationError:
        return  # in a block
    for document, ids in enumerate(documents):
        if abs(document - entry) <= 1:
            with pytest.raises(ConfigurationError, match=f"puts document {max(document, entry)} at byte"):
                dataset[document]
        else:
            assert dataset[document].tolist() == ids
    for first, last in ((entry, len(SIZES)), (0, entry), (entry - 1, entry)):
        with pytest.raises(ConfigurationError, match=f"puts document {entry} at byte"):
            dataset.document_range(first, last)


@pytest.mark.parametrize("kind, amount", [("size", 1), ("offset", 2), ("boundary", -3)])
def test_a_tool_that_reads_all_documents_checks_all_entries(kind, amount, tmp_path, sampled):
    """Else a merge would write an index of the damaged sizes, which nothing contradicts."""
    prefix = write(tmp_path)
    Source.open(prefix)
    for entry in range(1, len(SIZES)):
        damage(prefix, kind, entry, amount)
        with pytest.raises(ConfigurationError, match=r"data\.(idx|bin)"):
            Source.open(prefix)
        damage(prefix, kind, entry, -amount)


def test_the_documents_of_a_cut_are_located_without_a_copy_of_the_index(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", 9) as writer:
        for _ in range(20_000):
            writer.add_document([1, 2])
    dataset = IndexedDataset(str(tmp_path / "data"))
    tracemalloc.start()
    assert [dataset.documents_with(tokens) for tokens in (1, 2, 3, 39_999, 40_000)] == [1, 1, 2, 20_000, 20_000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


def test_blocks_that_are_out_of_order_are_refused(tmp_path, sampled, refused):
    """As after a merge that overflowed 32 bits: entries agree with their neighbours, except at one place."""
    prefix = write(tmp_path)
    middle = (len(SIZES) - 2) // 2
    for entry in range(3, len(SIZES) - 3):
        damage(prefix, "offset", entry, -(2**32))
    with refused(f"puts document {middle} at byte -", "and document 0 is at byte 0", "rebuild it"):
        IndexedDataset(prefix)


def test_boundaries_of_a_large_index_are_checked_in_blocks(tmp_path, sampled, refused):
    prefix = write(tmp_path)
    for entry, amount in ((0, 1), (1, -2), (len(SIZES), 1), (len(SIZES) // 2, 99)):
        damage(prefix, "boundary", entry, amount)
        with refused("boundaries do not ascend"):
            IndexedDataset(prefix)
        damage(prefix, "boundary", entry, -amount)
    assert len(IndexedDataset(prefix)) == len(SIZES)


def test_the_tokens_of_a_large_index_must_fill_its_file(tmp_path, sampled, refused):
    prefix = write(tmp_path)
    size = os.path.getsize(f"{prefix}.bin")
    for length in (size - 2, size + 2, 0):
        os.truncate(f"{prefix}.bin", length)
        with refused("data.bin", f"has {length} bytes"):
            IndexedDataset(prefix)


@pytest.mark.slow
def test_the_benchmark_of_the_loader_measures_every_case(tmp_path):
    flags = "--samples 64 --micro-batch-sizes 8 --workers 0 1 --documents 1000 20000 --rounds 2"
    report = report_of(f"loader {flags}", tmp_path)
    assert len(report["loader"]) == 2 * 3 * 2 and len(report["opening"]) == 4
    assert all(min(row["tokens_per_second"]) > 0 for row in report["loader"])
    sizes = {row["documents"]: row["rounds"][0]["tokens"] for row in report["opening"]}
    assert all(tokens == pytest.approx(480 * documents, rel=0.1) for documents, tokens in sizes.items())
    assert all(0 < result["first"] <= result["random"] for row in report["opening"] for result in row["rounds"])
