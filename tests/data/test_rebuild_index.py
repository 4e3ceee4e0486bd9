"""A rebuilt index against the index that should have been written, and files that stay unchanged."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.index_file import HEADER, write_index
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.rebuild_index import rebuild_index
from tests.conftest import ROOT

EOD = 500
DOCUMENTS = [[5, 6, 7, EOD], [8, EOD], [9, 10, 11, 12, 13, EOD]]


def written(folder: Path, dtype=np.uint16, documents=DOCUMENTS, sizes=None, boundaries=None) -> Path:
    """Write tokens and an index with the given sizes and boundaries; return the prefix."""
    np.concatenate(documents).astype(dtype).tofile(folder / "data.bin")
    sizes = [len(ids) for ids in documents] if sizes is None else sizes
    boundaries = np.arange(len(sizes) + 1) if boundaries is None else np.array(boundaries)
    write_index(folder / "data.idx", np.dtype(dtype), np.array(sizes), boundaries)
    return folder / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:2], [[EOD]] * 7])
def test_a_token_that_the_index_did_not_count_is_given_back(tmp_path, refused, documents, dtype):
    written(tmp_path, dtype, documents)
    right = (tmp_path / "data.idx").read_bytes()
    prefix = written(tmp_path, dtype, documents, [len(ids) - 1 for ids in documents])
    old = (tmp_path / "data.idx").read_bytes()
    if sum(map(len, documents)) > len(documents):
        with refused("--append-eod", f"tools/rebuild_index.py {prefix}"):
            IndexedDataset(prefix)
    rebuilt = rebuild_index(prefix)
    assert (rebuilt.documents, rebuilt.end_id) == (len(documents), EOD)
    assert (tmp_path / "data.idx").read_bytes() == right and rebuilt.backup.read_bytes() == old
    assert [ids.tolist() for ids in map(IndexedDataset(prefix).__getitem__, range(len(documents)))] == documents
    assert rebuild_index(prefix) is None  # it matches now
    assert {path.name for path in tmp_path.iterdir()} == {"data.bin", "data.idx", "data.idx.bak"}


def test_the_token_belongs_to_the_last_sentence_of_a_document(tmp_path):
    """As --split-sentences writes them, with a document that has no sentence: no token was appended to it."""
    prefix = written(tmp_path, sizes=[2, 1, 1, 3, 2], boundaries=[0, 2, 2, 3, 5])
    assert rebuild_index(prefix).documents == 3
    assert IndexedDataset(prefix).sizes.tolist() == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("entry, offset", [(1, 8 - 2**32), (2, -4), (2, 0)])
def test_pointers_are_computed_from_sizes(tmp_path, refused, entry, offset):
    prefix = written(tmp_path)
    right = (tmp_path / "data.idx").read_bytes()
    index = bytearray(right)
    start = HEADER.size + 4 * 3 + 8 * entry
    index[start : start + 8] = offset.to_bytes(8, "little", signed=True)
    (tmp_path / "data.idx").write_bytes(index)
    with refused("it is damaged", "tools/rebuild_index.py"):
        IndexedDataset(prefix)
    assert rebuild_index(prefix).end_id is None
    assert (tmp_path / "data.idx").read_bytes() == right


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"documents": [[5, 6], [7, 8]], "sizes": [1, 1]}, ["counts 2 tokens", "the same id at the end", "both again"]),
        ({"sizes": [3, 1, 4]}, ["counts 8 tokens", "24 bytes of uint16", "write both again"]),
        ({"sizes": [9, 9, 9]}, ["counts 27 tokens"]),
        ({"sizes": [-1, 9, 1]}, ["counts 9 tokens"]),
        ({"documents": DOCUMENTS[:1], "sizes": [3]}, ["counts 3 tokens", "two or more documents", "write both again"]),
        ({"documents": [[], DOCUMENTS[0]], "sizes": [3], "boundaries": [0, 0, 1]}, ["two or more documents"]),
        ({"boundaries": [0, 9, 1, 3]}, ["boundaries do not ascend"]),
    ],
)
def test_what_neither_fault_explains_is_left_as_it_is(tmp_path, refused, change, parts):
    prefix = written(tmp_path, **change)
    before = contents(tmp_path)
    with refused(*parts):
        rebuild_index(prefix)
    assert contents(tmp_path) == before


def test_an_older_backup_is_not_overwritten(tmp_path, refused):
    prefix = written(tmp_path, sizes=[3, 1, 5])
    (tmp_path / "data.idx.bak").write_bytes(b"older")
    before = contents(tmp_path)
    with refused("data.idx.bak: exists", "move it away"):
        rebuild_index(prefix)
    assert contents(tmp_path) == before


def test_a_failure_leaves_the_old_index(tmp_path, monkeypatch):
    prefix = written(tmp_path, sizes=[3, 1, 5])
    old = (tmp_path / "data.idx").read_bytes()

    def stop(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError):
        rebuild_index(prefix)
    assert (tmp_path / "data.idx").read_bytes() == old and not [*tmp_path.glob("*.partial")]


def test_the_command_says_what_it_did_and_refuses_in_one_line(tmp_path):
    prefix = written(tmp_path, sizes=[3, 1, 5])
    command = [sys.executable, "tools/rebuild_index.py", str(prefix)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 documents, 12 tokens, every document now ends in its id 500" in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing was changed" in again.stdout
    refused = subprocess.run([*command[:2], tmp_path / "none"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "none.idx: no such file" in refused.stderr


def test_our_own_files_need_nothing(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", 1000) as writer:
        for ids in [*DOCUMENTS, []]:
            writer.add_document(ids)
    assert rebuild_index(tmp_path / "data") is None
