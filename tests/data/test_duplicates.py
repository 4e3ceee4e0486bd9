"""Exact duplicates, which documents are removed and why, and the cleaned data set byte by byte."""

import json

import numpy as np
import pytest

from megatron.data.copy_documents import Source
from megatron.data.index_file import Index, write_index
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.inspection.clean import describe, write_clean
from megatron.data.inspection.duplicates import REASONS, DuplicateOptions, find_duplicates
from megatron.data.inspection.ngrams import DocumentTokens

EOD = 999
LONG = list(range(100, 160))
EDITED = [*LONG[:-1], 5]  # 55 of 57 5-grams in common
OTHER_EDIT = [6, *LONG[1:]]
# 0 and 4 are equal, 2 and 5 nearly equal 0; 3 and 6 are empty
DOCUMENTS = [LONG, [1, 2, 3], EDITED, [], LONG, OTHER_EDIT, [], [7, 8, 9, 10, 11, 12]]


@pytest.fixture
def written(data_set, tmp_path):
    """Return a function that writes documents with end-of-document tokens and opens them."""

    def write(documents, name="data", metadata=None):
        data_set([[*ids, EOD] for ids in documents], name=name)
        if metadata is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(metadata))
        return Source.open(str(tmp_path / name))

    return write


def search(source: Source, against: Source | None = None, **options):
    """Return the duplicates and the options."""
    names = {"against": against.prefix} if against else {}
    chosen = DuplicateOptions(**options, **names)
    others = DocumentTokens(against.dataset, EOD) if against else None
    return find_duplicates(DocumentTokens(source.dataset, EOD), others, chosen), chosen


def cleaned(tmp_path, source, against=None, **options):
    """Write the data set without duplicates to `clean`; return its metadata."""
    duplicates, chosen = search(source, against, remove=True, output_prefix=str(tmp_path / "clean"), **options)
    return write_clean(source, duplicates, chosen, against)


def assert_equal_files(tmp_path, name: str) -> None:
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"clean{suffix}").read_bytes() == (tmp_path / f"{name}{suffix}").read_bytes()


def reasons_of(path) -> dict[int, tuple]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["document"]: (line["reason"], line["of"]) for line in lines}


def test_equal_documents_leave_the_first(written, tmp_path):
    source = written(DOCUMENTS, metadata={"corpus_hash": "c", "eod": EOD, "bytes": 3, "round_trip": {}})
    metadata = cleaned(tmp_path, source, exact_duplicates=True)
    written([ids for number, ids in enumerate(DOCUMENTS) if number not in (4, 6)], "expected")
    assert_equal_files(tmp_path, "expected")
    assert reasons_of(tmp_path / "clean.removed.jsonl") == {4: (REASONS[1], 0), 6: (REASONS[1], 3)}
    assert metadata == read_metadata(tmp_path / "clean")
    assert metadata["documents"] == 6 == len(IndexedDataset(str(tmp_path / "clean")))
    assert metadata["eod"] == EOD and "bytes" not in metadata and "round_trip" not in metadata
    (removal,) = metadata["removed"]
    assert (removal["documents"], removal["tokens"], removal["corpus_hash"]) == (2, 62, "c")
    assert removal["parameters"] == {"threshold": None}


def test_nearly_equal_documents_leave_the_first_of_each_cluster(written, tmp_path):
    pytest.importorskip("rensa")
    source = written(DOCUMENTS, metadata={"corpus_hash": "c"})
    metadata = cleaned(tmp_path, source, near_duplicates=0.8)
    written([ids for number, ids in enumerate(DOCUMENTS) if number not in (2, 4, 5, 6)], "expected")
    assert_equal_files(tmp_path, "expected")
    assert reasons_of(tmp_path / "clean.removed.jsonl") == {
        2: (REASONS[2], 0),
        4: (REASONS[1], 0),
        5: (REASONS[2], 0),
        6: (REASONS[1], 3),
    }
    parameters = metadata["removed"][0]["parameters"]
    assert (parameters["threshold"], parameters["ngram"]) == (0.8, 5) and "rensa" in parameters["library"]
    exact_only = search(source, exact_duplicates=True)[0]
    assert metadata["corpus_hash"] != "c" and exact_only.reasons().tolist() == [0, 0, 0, 0, 1, 0, 1, 0]
    again = cleaned_again(tmp_path)
    assert [step["documents"] for step in again["removed"]] == [4, 0]  # nothing is left to remove


def cleaned_again(tmp_path):
    """Clean the cleaned data set; return its metadata."""
    source = Source.open(str(tmp_path / "clean"))
    output = str(tmp_path / "again")
    duplicates, options = search(source, near_duplicates=0.8, remove=True, output_prefix=output)
    return write_clean(source, duplicates, options, None)


def test_documents_of_the_other_data_set_go_first(written, tmp_path):
    """Document 0 is in the other data set: of its cluster, 2 equals none there and nearly equals it, and 5 stays."""
    pytest.importorskip("rensa")
    source, against = written(DOCUMENTS), written([[50] * 9, LONG, [7, 8, 9, 10, 11, 12]], "validation")
    duplicates, options = search(source, against, near_duplicates=0.97)  # neither edit reaches it
    assert duplicates.reasons().tolist() == [3, 0, 0, 0, 3, 0, 1, 3]
    assert duplicates.other.tolist() == [1, -1, -1, -1, 1, -1, -1, 2]
    metadata = cleaned(tmp_path, source, against, near_duplicates=0.93)
    written([ids for number, ids in enumerate(DOCUMENTS) if number in (1, 3)], "expected")
    assert_equal_files(tmp_path, "expected")
    lines = reasons_of(tmp_path / "clean.removed.jsonl")
    assert lines[2] == (REASONS[4], 1) and lines[4] == (REASONS[3], 1) and lines[6] == (REASONS[1], 3)
    assert metadata["removed"][0]["against"]["prefix"] == against.prefix
    summary = describe(source, DocumentTokens(source.dataset, EOD), duplicates, options)
    assert summary["against"]["equal"] == {
        "documents": 3,
        "tokens": 129,
        "share_of_tokens": 129 / source.dataset.total_tokens,
    }


def test_of_a_cluster_the_first_document_that_is_not_elsewhere_stays(written):
    pytest.importorskip("rensa")
    chain = [list(range(start, start + 100)) for start in (0, 6, 12)]  # neighbours share 90 of 102 5-grams
    source, against = written(chain), written([list(range(-0, 100))], "validation")
    duplicates, _ = search(source, against, near_duplicates=0.85)
    assert duplicates.clusters.tolist() == [0, 0, 0]
    assert duplicates.reasons().tolist() == [3, 4, 0]  # 2 is not near 0, so it is the first that is left


def test_no_within_removes_documents_of_the_other_data_set_only(written):
    source, against = written(DOCUMENTS), written([[1, 2, 3]], "validation")
    duplicates, _ = search(source, against, exact_duplicates=True, within=False)
    assert duplicates.reasons().tolist() == [0, 3, 0, 0, 0, 0, 0, 0]


def test_the_end_of_document_token_and_the_dtype_do_not_count(written, data_set, tmp_path):
    source = written([[1, 2, 3], [4, 5]])
    data_set([[4, 5], [1, 2]], 80000, name="wide")  # int32, without end-of-document tokens
    duplicates, _ = search(source, Source.open(str(tmp_path / "wide")), exact_duplicates=True)
    assert duplicates.other.tolist() == [-1, 0]


def test_the_largest_clusters_are_described(written):
    pytest.importorskip("rensa")
    source = written([[1, 1, 1, 1, 1, 1], [2] * 7, *DOCUMENTS, *[[3] * 20] * 10])
    duplicates, options = search(source, near_duplicates=0.8)
    summary = describe(source, DocumentTokens(source.dataset, EOD), duplicates, options)
    first, second, *_ = summary["largest_clusters"]
    assert (first["documents"], first["tokens"], first["first_documents"]) == (10, 200, [*range(10, 18)])
    assert second["first_documents"] == [2, 4, 6, 7]
    assert second["similarity_to_first"] == [1.0, 55 / 57, 1.0, 55 / 57]
    assert summary["within"]["equal"]["documents"] == 11 and summary["within"]["near"]["documents"] == 2


def test_sentences_of_other_writers_are_entries(tmp_path):
    np.array([1, 2, 3, 1, 2, 4], np.uint16).tofile(tmp_path / "data.bin")
    write_index(tmp_path / "data.idx", np.dtype(np.uint16), [2, 1, 2, 1], np.array([0, 2, 2, 3, 4]))
    source = Source.open(str(tmp_path / "data"))
    duplicates, options = search(source, exact_duplicates=True, remove=True, output_prefix=str(tmp_path / "clean"))
    write_clean(source, duplicates, options, None)
    index = Index.open(tmp_path / "clean.idx")
    assert index.sizes.tolist() == [2, 1, 1]
    assert index.boundaries.tolist() == [0, 2, 2, 3]  # the document whose sentence was removed is gone


def test_nothing_left_is_refused(written, tmp_path, refused):
    source = written([LONG, [1, 2]])
    before = sorted(path.name for path in tmp_path.iterdir())
    with refused("--remove", "leaves no tokens"):
        cleaned(tmp_path, source, source, exact_duplicates=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_same_search_gives_the_same_files(written, tmp_path):
    pytest.importorskip("rensa")
    source = written(DOCUMENTS)
    cleaned(tmp_path, source, near_duplicates=0.8)
    first = {path.suffix: path.read_bytes() for path in tmp_path.glob("clean.*")}
    for path in tmp_path.glob("clean.*"):
        path.unlink()
    cleaned(tmp_path, source, near_duplicates=0.8)
    assert {path.suffix: path.read_bytes() for path in tmp_path.glob("clean.*")} == first
