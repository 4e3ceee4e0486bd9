"""Merged data sets against the concatenation of their documents, other writers' files, and refusals."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.blend import combined_hash
from megatron.data.copy_documents import Source, new_data_set
from megatron.data.index_file import Index, write_index
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.merge import input_prefixes, merge
from megatron.data.tokenizer import file_hash
from tests.conftest import ROOT, environment

DOCUMENTS = [[5, 6, 7, 9], [8, 9], [], [1, 9]]


@pytest.fixture
def two(data_set, tmp_path):
    """Return the prefixes of two data sets without metadata."""
    data_set(DOCUMENTS, name="a")
    data_set([[3, 9], [2, 2, 9]], name="b")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def record(prefix: str, **fields) -> None:
    """Write PREFIX.json as preprocessing does, with other values for `fields`."""
    dataset = IndexedDataset(prefix)
    usual = {"tokenizer_type": "ByteTokenizer", "tokenizer_hash": None, "vocabulary_size": 1000, "eod": 9}
    usual |= {"tokenizer_model": None, "corpus_hash": f"hash of {Path(prefix).name}", "source": prefix}
    usual |= {"documents": len(dataset), "tokens": dataset.total_tokens, "bytes": 10}
    Path(f"{prefix}.json").write_text(json.dumps(usual | fields))


def documents(prefix) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_documents_of_all_inputs_follow_one_another(two, tmp_path):
    merge(two, str(tmp_path / "new" / "out"))
    assert documents(tmp_path / "new" / "out") == [*DOCUMENTS, [3, 9], [2, 2, 9]]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.bin", "out.idx", "out.json"]
    merge(two[::-1], str(tmp_path / "reversed"))
    assert documents(tmp_path / "reversed") == [[3, 9], [2, 2, 9], *DOCUMENTS]


def test_a_merge_equals_the_data_set_written_at_once(two, data_set, tmp_path):
    data_set([*DOCUMENTS, [3, 9], [2, 2, 9]], name="whole")
    merge(two, str(tmp_path / "out"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_the_boundaries_of_documents_of_sentences_stay(tmp_path):
    """As --split-sentences of Megatron writes them; the second writer stored the first boundary only."""
    for name, boundaries in {"a": [0, 2, 2, 3], "b": [0]}.items():
        np.arange(6, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
        write_index(tmp_path / f"{name}.idx", np.dtype(np.uint16), [1, 2, 3], np.array(boundaries))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    index = Index.open(tmp_path / "out.idx")
    assert index.boundaries.tolist() == [0, 2, 2, 3, 4, 5, 6]
    assert index.sizes.tolist() == [1, 2, 3] * 2 and documents(tmp_path / "out")[3:] == documents(tmp_path / "b")


@pytest.mark.slow
def test_a_merge_beyond_four_gibibytes_reads_back(tmp_path):
    tokens = (1 << 29) + 3
    for number, name in enumerate(("a", "b", "c")):
        with open(tmp_path / f"{name}.bin", "wb") as data:
            data.truncate(4 * tokens)
            data.seek(4 * tokens - 4)
            data.write((number + 1).to_bytes(4, "little"))
        write_index(tmp_path / f"{name}.idx", np.dtype(np.int32), [tokens], np.array([0, 1]))
    merge([str(tmp_path / name) for name in "abc"], str(tmp_path / "out"))
    merged = IndexedDataset(str(tmp_path / "out"))
    assert [int(merged[number][-1]) for number in range(3)] == [1, 2, 3] and merged.total_tokens == 3 * tokens
    assert [int(merged[number][:-1].max()) for number in range(3)] == [0, 0, 0]


# ------------------------------------------------------------------------------------ metadata


def test_counts_are_added_and_the_corpus_hash_is_that_of_the_blend(two, tmp_path):
    trips = [
        {
            "changed_documents": changed,
            "characters": 10,
            "missing_characters": missing,
            "example": {"document": str(missing), "missing_characters": missing},
        }
        for changed, missing in ((1, 2), (3, 4))
    ]
    for prefix, trip in zip(two, trips):
        record(prefix, round_trip=trip, python_version=prefix)
    metadata = merge(two, str(tmp_path / "out"))
    assert metadata == read_metadata(tmp_path / "out")
    assert (metadata["documents"], metadata["tokens"], metadata["bytes"]) == (6, 13, 20)
    assert metadata["corpus_hash"] == combined_hash(["hash of a", "hash of b"], [8, 5])
    assert metadata["round_trip"] == {
        "changed_documents": 4,
        "characters": 20,
        "missing_characters": 6,
        "example": trips[1]["example"],
    }
    assert metadata["vocabulary_size"] == 1000 and metadata["eod"] == 9 and "python_version" not in metadata
    assert [part["prefix"] for part in metadata["merged"]] == two == metadata["source"]


def test_training_finds_the_tokenizer_next_to_the_merged_data(two, tmp_path):
    (tmp_path / "tokenizer.json").write_text("the tokenizer")
    for prefix in two:
        record(prefix, tokenizer_model="tokenizer.json", tokenizer_hash=file_hash(tmp_path / "tokenizer.json"))
    merge(two, str(tmp_path / "same"))  # in the folder of the inputs the file is there already
    assert read_metadata(tmp_path / "same")["tokenizer_model"] == "tokenizer.json"
    merge(two, str(tmp_path / "new" / "out"))
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "the tokenizer"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("another one")
    name = merge(two, str(tmp_path / "other" / "out"))["tokenizer_model"]
    assert name == "out.tokenizer.json" and (tmp_path / "other" / name).read_text() == "the tokenizer"
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "another one"


def test_missing_metadata_are_warned_of(two, tmp_path, caplog):
    merge(two, str(tmp_path / "unknown"))
    assert "cannot be checked" in caplog.text
    record(two[0])
    merge(two, str(tmp_path / "half"))
    assert f"{two[1]}.json: is missing" in caplog.text
    metadata = read_metadata(tmp_path / "half")
    hashes = ["hash of a", IndexedDataset(two[1]).fingerprint()]
    assert metadata["eod"] == 9 and metadata["corpus_hash"] == combined_hash(hashes, [8, 5])
    assert "bytes" not in metadata and metadata["documents"] == 6


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"tokenizer_hash": "x"}, ["another tokenizer", "tokenizer_hash"]),
        ({"vocabulary_size": 1001}, ["vocabulary_size 1001 and 1000"]),
        ({"eod": 8}, ["eod 8 and 9"]),
        ({"tokenizer_type": "NullTokenizer"}, ["tokenizer_type NullTokenizer and ByteTokenizer"]),
    ],
)
def test_mixed_tokenizers_are_refused(two, tmp_path, refused, fields, parts):
    record(two[0])
    record(two[1], **fields)
    before = contents(tmp_path)
    with refused(two[0], two[1], "merge data of one tokenizer", *parts):
        merge(two, str(tmp_path / "out"))
    assert contents(tmp_path) == before


def test_other_wrong_inputs_are_refused(two, data_set, tmp_path, refused):
    data_set([[70000]], 80000, name="wide")
    before = contents(tmp_path)
    with refused("int32", "uint16", "merge data of one tokenizer"):
        merge([two[0], str(tmp_path / "wide")], str(tmp_path / "out"))
    with refused(f"--output-prefix {two[1]}", f"is the input {two[1]}"):
        merge(two, two[1])
    with refused("wide.idx exists already", "name another prefix"):
        merge(two, str(tmp_path / "wide"))
    with refused("none.idx: no such file"):
        merge([two[0], str(tmp_path / "none")], str(tmp_path / "out"))
    with refused("names", "twice"):
        input_prefixes([two[0], f"{tmp_path}/./a"])
    (tmp_path / "empty").mkdir()
    with refused("empty: is a folder without"):
        input_prefixes([str(tmp_path / "empty")])
    with refused("names no file"):
        merge(two, f"{tmp_path}/new/")
    with refused("cannot be created", "name another"):
        merge(two, str(tmp_path / "a.bin" / "out"))  # a file is not a folder
    with refused("--output-prefix /proc/self/out", "cannot be created", "name another"):
        merge(two, "/proc/self/out")  # nobody can write to it
    (tmp_path / "empty").rmdir()
    assert contents(tmp_path) == before


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing_in_the_way(two, tmp_path, refused):
    with new_data_set(str(tmp_path / "out"), np.dtype(np.uint16), 0, "writing") as other:
        other.copy(Source.open(two[0]))
        with refused("another process writes it"):
            merge(two, str(tmp_path / "out"))
        assert (tmp_path / "out.bin.partial").exists()
    assert not [*tmp_path.glob("out*")]  # `finish` was not called
    (tmp_path / "out.bin.partial").write_bytes(bytes(1000))  # left by a killed process
    merge(two, str(tmp_path / "out"))
    assert documents(tmp_path / "out")[: len(DOCUMENTS)] == DOCUMENTS and not [*tmp_path.glob("*.partial")]


def command(*arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run the tool; no file may be larger than `limit` bytes."""
    words = [sys.executable, str(ROOT / "tools" / "merge_datasets.py"), *map(str, arguments)]
    set_limit = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.run(words, capture_output=True, text=True, env=environment(), preexec_fn=set_limit)


def test_the_tool_merges_a_folder_and_survives_a_full_disk(two, data_set, tmp_path):
    data_set([[1] * 10000], name="large")
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, name in enumerate(("b", "a", "large")):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(tmp_path / f"{name}{suffix}", folder / f"part_{number}{suffix}")
    full = command("--input", folder, "--output-prefix", tmp_path / "out", limit=8192)
    assert full.returncode == 1 and full.stderr.splitlines()[-1].startswith("error: --output-prefix")
    assert "free space" in full.stderr and "Traceback" not in full.stderr
    assert not [*tmp_path.glob("out*")]
    done = command("--input", folder, "--output-prefix", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: 7 documents, 10,013 tokens of 3 data sets" in done.stdout
    assert documents(tmp_path / "out")[:2] == [[3, 9], [2, 2, 9]]
