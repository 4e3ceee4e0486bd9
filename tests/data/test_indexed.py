"""Megatron's token files: their bytes, and all ways in which they can be damaged."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data import index_file
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, read_metadata

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10]]


def by_hand(code: int, letter: str, documents=DOCUMENTS) -> tuple[bytes, bytes]:
    """Return the bytes of .bin and .idx, written field by field."""
    width, count = struct.calcsize("<" + letter), len(documents)
    ids = [index for document in documents for index in document]
    sizes = [len(document) for document in documents]
    offsets = [sum(sizes[:place]) * width for place in range(count)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", count, count + 1)
    index += struct.pack(f"<{count}i", *sizes) + struct.pack(f"<{count}q", *offsets)
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    return struct.pack(f"<{len(ids)}{letter}", *ids), index


def place(folder: Path, data: bytes, index: bytes) -> str:
    (folder / "data.bin").write_bytes(data)
    (folder / "data.idx").write_bytes(index)
    return str(folder / "data")


@pytest.mark.parametrize("vocabulary_size, code, letter", [(65499, 8, "H"), (65500, 4, "i")])
def test_written_bytes_equal_the_format(tmp_path, vocabulary_size, code, letter):
    with IndexedDatasetWriter(tmp_path / "data", vocabulary_size) as writer:
        for ids in DOCUMENTS:
            writer.add_document(ids)
    assert ((tmp_path / "data.bin").read_bytes(), (tmp_path / "data.idx").read_bytes()) == by_hand(code, letter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_an_index_written_in_chunks_equals_the_format(tmp_path, monkeypatch, count):
    monkeypatch.setattr(index_file, "CHUNK", 3)
    documents = [[1] * (number * 5 % 4) for number in range(count)]
    with IndexedDatasetWriter(tmp_path / "data", 65499) as writer:
        for ids in documents:
            writer.add_document(ids)
    assert (tmp_path / "data.idx").read_bytes() == by_hand(8, "H", documents)[1]


@pytest.mark.parametrize("code, letter", [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type_is_read(tmp_path, code, letter):
    dataset = IndexedDataset(place(tmp_path, *by_hand(code, letter)))
    assert [list(dataset[document]) for document in range(len(dataset))] == DOCUMENTS
    assert (dataset.total_tokens, list(dataset.sizes)) == (6, [3, 0, 1, 2])
    assert list(dataset.stream(2, 5)) == [7, 8, 9]
    assert list(dataset.read(0, 1, 3)) == [6, 7]


def test_the_largest_ids_survive(data_set):
    assert list(data_set([[0, 65498]], 65499)[0]) == [0, 65498]
    assert list(data_set([[0, 128255]], 128256)[0]) == [0, 128255]
    with pytest.raises(AssertionError):  # 70000 does not fit 16 bits and would be read as 4464
        data_set([np.array([70000])], 50000)


@pytest.mark.parametrize(
    "wrong, parts",
    [
        (lambda data, index: (data, b""), ["data.idx", "empty or has another format"]),
        (lambda data, index: (data, index[:20]), ["data.idx", "empty or has another format"]),
        (lambda data, index: (data, b"TNTIDX\x00\x00" + index[8:]), ["data.idx", "empty or has another format"]),
        (lambda data, index: (data, index[:9] + b"\x02" + index[10:]), ["data.idx", "version 2", "write it again"]),
        (lambda data, index: (data, index[:17] + b"\x07" + index[18:]), ["data.idx", "dtype code 7", "write it again"]),
        (lambda data, index: (data, index[:17] + b"\x63" + index[18:]), ["data.idx", "dtype code 99"]),
        (lambda data, index: (data, index[:-3]), ["data.idx", f"has {34 + 12 * 4 + 8 * 5 - 3} bytes", "needs 122"]),
        (lambda data, index: (data, index + b"\x00"), ["data.idx", "has 123 bytes", "needs 122"]),
        (lambda data, index: (data[:-1], index), ["data.bin", "has 11 bytes", "points to 12", "write both again"]),
        (lambda data, index: (b"", index), ["data.bin", "has 0 bytes"]),
        (lambda data, index: by_hand(8, "H", []), ["data.idx", "holds no tokens", "preprocess_data.py"]),
        (lambda data, index: by_hand(8, "H", [[], []]), ["data.idx", "holds no tokens"]),
    ],
    ids="empty cut-header legacy version float unknown short-idx long-idx short-bin no-bin none hollow".split(),
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, refused, wrong, parts):
    prefix = place(tmp_path, *wrong(*by_hand(8, "H")))
    with refused(*parts):
        IndexedDataset(prefix)


BOTH = ["data.bin", "do not belong together", "write both again"]
APPENDED = [
    "data.bin",
    "one token less for each document",
    "--append-eod",
    "here 500",
    "is shifted",
    "rebuild_index.py",
]


@pytest.mark.parametrize(
    "data, parts",
    [
        (by_hand(4, "i")[0], ["has 24 bytes and its index covers 12", *BOTH]),  # another dtype
        (by_hand(8, "H", [*DOCUMENTS, [1, 2, 3, 4]])[0], ["has 20 bytes", *BOTH]),  # more documents
        (by_hand(8, "H")[0] * 2, BOTH),  # merged without its index
        (by_hand(8, "H")[0] + b"\x00", ["has 13 bytes", *BOTH]),
        (by_hand(8, "H")[0] + b"\x00" * 6, BOTH),  # as many extra tokens as documents that are not empty
        (by_hand(8, "H", [[*ids, 500] for ids in DOCUMENTS])[0], ["has 20 bytes and its index covers 12", *APPENDED]),
    ],
    ids="dtype documents merged byte three appended".split(),
)
def test_more_tokens_than_the_index_covers_are_refused(tmp_path, refused, data, parts):
    with refused(*parts):
        IndexedDataset(place(tmp_path, data, by_hand(8, "H")[1]))


def test_one_document_with_one_id_too_many_is_not_taken_for_an_appended_one(tmp_path, refused):
    data, index = by_hand(8, "H", [[5, 6, 7, 8]])[0], by_hand(8, "H", [[5, 6, 7]])[1]
    with refused("has 8 bytes and its index covers 6", *BOTH):
        IndexedDataset(place(tmp_path, data, index))


def entry(kind: str, number: int, value: int) -> bytes:
    """Return the index of DOCUMENTS with one number of its sizes, offsets or boundaries changed."""
    index, count = bytearray(by_hand(8, "H")[1]), len(DOCUMENTS)
    start, letter = {"size": (34, "i"), "offset": (34 + 4 * count, "q"), "boundary": (34 + 12 * count, "q")}[kind]
    struct.pack_into("<" + letter, index, start + number * struct.calcsize("<" + letter), value)
    return bytes(index)


REBUILD = ["it is damaged", "rebuild it: python tools/rebuild_index.py"]


@pytest.mark.parametrize(
    "kind, number, value, parts",
    [
        ("size", 0, -1, ["gives document 0 -1 tokens", "it is damaged, write it again"]),
        ("size", 3, -2, ["gives document 3 -2 tokens"]),
        ("size", 0, 2, ["puts document 1 at byte 6, and its sizes put it at 4", *REBUILD]),
        ("size", 3, 1, ["data.bin", "has 12 bytes and its index covers 10", "write both again"]),
        ("size", 3, 3, ["data.bin", "has 12 bytes and its index points to 14"]),
        ("offset", 0, 2, ["puts document 0 at byte 2, and its sizes put it at 0", *REBUILD]),
        ("offset", 2, 6 - 2**32, ["puts document 2 at byte -4294967290, and its sizes put it at 6", *REBUILD]),
        ("offset", 3, 0, ["puts document 3 at byte 0, and its sizes put it at 8", *REBUILD]),
        ("boundary", 0, -1, ["boundaries do not ascend from 0 to at most 4", "it is damaged, write it again"]),
        ("boundary", 0, 1, ["boundaries do not ascend from 0"]),
        ("boundary", 2, 9, ["boundaries do not ascend"]),
        ("boundary", 4, 5, ["boundaries do not ascend"]),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, refused, monkeypatch, kind, number, value, parts):
    for chunk in (1, 3, 1 << 20):  # the result does not depend on the chunk size
        monkeypatch.setattr(index_file, "CHUNK", chunk)
        with refused(*parts):
            IndexedDataset(place(tmp_path, by_hand(8, "H")[0], entry(kind, number, value)))


@pytest.mark.parametrize("boundaries", [[], [0], [0, 4], [0, 0, 3, 3, 4], [0, 2]])
def test_documents_of_several_sentences_and_other_writers_boundaries_are_read(tmp_path, boundaries):
    """Megatron indexes sentences with --split-sentences; RWKV's files and early merges have only a boundary of 0."""
    data, index = by_hand(8, "H")
    index = index[:26] + struct.pack("<Q", len(boundaries)) + index[34 : 34 + 12 * 4]
    dataset = IndexedDataset(place(tmp_path, data, index + struct.pack(f"<{len(boundaries)}q", *boundaries)))
    assert [list(dataset[document]) for document in range(len(dataset))] == DOCUMENTS


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, refused, suffix):
    prefix = place(tmp_path, *by_hand(8, "H"))
    Path(prefix + suffix).unlink()
    with refused(f"data{suffix}: no such file", "preprocess_data.py"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("letter, code, ids, worst", [("H", 8, [3, 600], 600), ("i", 4, [3, -2], -2)])
def test_an_id_outside_the_vocabulary_is_refused_when_it_is_read(tmp_path, refused, letter, code, ids, worst):
    dataset = IndexedDataset(place(tmp_path, *by_hand(code, letter, [ids])), vocabulary_size=600)
    assert list(dataset.read(0, 0, 1)) == [3]
    for read in (lambda: dataset.read(0, 0, 2), lambda: dataset.stream(0, 2)):
        with refused("data.bin", f"token id {worst}", "ids 0 to 599", "--tokenizer-model"):
            read()


def test_metadata_is_read_where_there_is_some(tmp_path, refused):
    assert read_metadata(tmp_path / "data") == {}
    for text in ('{"eod": 1', "\udcff", "[1]", "7"):
        (tmp_path / "data.json").write_bytes(text.encode(errors="surrogateescape"))
        with refused("data.json", "is not", "write the data again"):
            read_metadata(tmp_path / "data")
    (tmp_path / "data.json").write_text('{"eod": 1}')
    assert read_metadata(tmp_path / "data") == {"eod": 1}


def test_an_old_index_never_stands_beside_new_tokens(tmp_path, data_set, monkeypatch, refused):
    data_set([[1, 2], [3]])

    def stop(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        data_set([[4], [5, 6]])
    with refused("data.idx: no such file"):
        IndexedDataset(str(tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path, data_set):
    before = data_set([[1, 2]])[0].tolist()
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "data", 1000) as writer:
        writer.add_document([3, 4, 5])
        raise KeyError
    assert IndexedDataset(str(tmp_path / "data"))[0].tolist() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]
