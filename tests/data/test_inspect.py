"""Statistics, documents and training samples against plain Python and training; the tool and its refusals."""

import json
import math
import resource
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.data.copy_documents import Source
from megatron.data.index_file import write_index
from megatron.data.inspection.excerpts import SampleFlags, TokenizerFlags, document_text, open_tokenizer, sample_texts
from megatron.data.inspection.summary import QUANTILES, summarize
from megatron.data.inspection.text import summary_text
from megatron.data.tokenizer import ByteTokenizer, NullTokenizer, train_tokenizer
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from tests.conftest import ROOT, environment
from tools.inspect_dataset import read_options, run

EOD = 256
TEXTS = ["hello", "", "two words", "hello", "é"]


@pytest.fixture
def texts(data_set, tmp_path):
    """Return the source of a byte data set with metadata; its documents are TEXTS and one without an end."""
    tokenizer = ByteTokenizer()
    documents = [[*tokenizer.encode(text), EOD] for text in TEXTS]
    data_set([*documents, [97, EOD, 98], []], 257)
    metadata = {"tokenizer_type": "ByteTokenizer", "vocabulary_size": 257, "eod": EOD, "tokenizer_hash": None}
    (tmp_path / "data.json").write_text(json.dumps(metadata))
    return Source.open(str(tmp_path / "data"))


@pytest.fixture
def numbers(data_set, tmp_path):
    """Return the source of 60 documents of random ids without metadata, as of another system."""
    random = np.random.default_rng(0)
    data_set([[*random.integers(0, 999, random.integers(0, 60)), 999] for _ in range(60)])
    return Source.open(str(tmp_path / "data"))


# ------------------------------------------------------------------------------------ statistics


def test_statistics_are_those_of_plain_python(numbers):
    dataset = numbers.dataset
    documents = [dataset[number].tolist() for number in range(len(dataset))]
    ids = Counter(index for document in documents for index in document)
    total, lengths = sum(ids.values()), sorted(map(len, documents))
    summary = summarize(numbers, NullTokenizer(999))
    assert (summary["documents"], summary["tokens"], summary["empty_documents"]) == (60, total, 0)
    assert (summary["documents_without_eod"], summary["eod_tokens"], summary["bytes_per_token"]) == (0, 60, None)
    described = summary["lengths"]
    assert described["mean"] == pytest.approx(statistics.mean(lengths))
    assert (described["min"], described["max"]) == (lengths[0], lengths[-1])
    assert [*described["quantiles"].values()] == [lengths[math.ceil(q * 60) - 1] for q in QUANTILES]
    bins = described["histogram"]
    assert all(count == sum(low <= length <= high for length in lengths) for low, high, count in bins)
    assert sum(count for _, _, count in bins) == 60 and all(a[1] + 1 == b[0] for a, b in pairwise(bins))
    used = summary["vocabulary"]
    assert (used["size"], used["used"], used["outside"]) == (1000, len(ids), 0)
    assert used["share_used"] == len(ids) / 1000
    assert used["entropy_bits"] == pytest.approx(-sum(n / total * math.log2(n / total) for n in ids.values()))
    assert used["most_frequent"][0] == {"id": 999, "count": 60, "text": "end of document"}
    assert [entry["count"] for entry in used["most_frequent"]] == [count for _, count in ids.most_common(10)]
    assert {entry["count"] for entry in used["least_frequent"]} == {1}


def test_text_is_counted_in_bytes_and_missing_ends_are_reported(texts):
    summary = summarize(texts, ByteTokenizer())
    characters = sum(len(text.encode()) for text in TEXTS) + 2
    assert summary["text_bytes"] == characters
    assert summary["bytes_per_token"] == characters / (characters + 6)
    assert (summary["empty_documents"], summary["documents_without_eod"], summary["eod_tokens"]) == (1, 2, 6)
    shown = summary_text(summary)
    assert "2 documents do not end with it, and it occurs 1 times inside documents" in shown
    assert f"{characters} bytes" in shown and "'l' 4" in shown
    assert "  0  #" in shown and "4-7  #" in shown


def test_lengths_on_the_edges_of_bins(data_set, tmp_path):
    data_set([[1] * length for length in (0, 1, 2, 3, 4, 7, 8)])
    summary = summarize(Source.open(str(tmp_path / "data")), None)
    assert summary["lengths"]["histogram"] == [[0, 0, 1], [1, 1, 1], [2, 3, 2], [4, 7, 2], [8, 15, 1]]
    assert summary["eod"] is None and summary["vocabulary"]["share_used"] is None
    assert "token unknown; give the tokenizer" in summary_text(summary)


def test_ids_outside_the_vocabulary_are_counted(numbers):
    summary = summarize(numbers, NullTokenizer(99))
    outside = sum(int((numbers.dataset[number] > 99).sum()) for number in range(60))
    assert summary["vocabulary"]["outside"] == outside > 0
    assert f"{outside:,} tokens are OUTSIDE the vocabulary, up to 999" in summary_text(summary)


def test_files_of_sentences_are_read_as_training_reads_them(tmp_path):
    np.arange(6, dtype=np.uint16).tofile(tmp_path / "data.bin")
    write_index(tmp_path / "data.idx", np.dtype(np.uint16), [1, 2, 3], np.array([0, 2, 3]))
    summary = summarize(Source.open(str(tmp_path / "data")), None)
    assert (summary["documents"], summary["grouped_documents"]) == (3, 2)
    assert "groups these 3 into 2" in summary_text(summary)


def test_ids_that_are_no_tokens_are_refused(tmp_path, refused):
    for ids, worst in (([1, -1], "-1"), ([1 << 25], "33554432")):
        np.array(ids, np.int32).tofile(tmp_path / "data.bin")
        write_index(tmp_path / "data.idx", np.dtype(np.int32), [len(ids)], np.array([0, 1]))
        with refused(f"data.bin: contains {worst}", "int32"):
            summarize(Source.open(str(tmp_path / "data")), None)


# ------------------------------------------------------------------------------------ documents, samples, tokenizers


def test_documents_are_decoded(texts):
    tokenizer = open_tokenizer(texts, TokenizerFlags())
    assert [document_text(texts, tokenizer, number)["text"] for number in range(5)] == [[text, ""] for text in TEXTS]
    assert document_text(texts, tokenizer, 5) == {"document": 5, "tokens": 3, "ids": [97, EOD, 98], "text": ["a", "b"]}
    assert document_text(texts, tokenizer, 6)["text"] == [""]


@pytest.mark.parametrize(
    "flags",
    [
        "--seq-length 16",
        "--seq-length 16 --seed 7 --epoch-order windows",
        "--seq-length 16 --train-unique-tokens 300",
        "--seq-length 20 --seed 3 --epoch-order megatron --train-samples 300",
        "--seq-length 16 --split 80,20",
    ],
)
def test_samples_are_those_that_training_reads(numbers, flags):
    chosen = [0, 1, 17, 200]
    options = read_options([numbers.prefix, *flags.split(), "--sample", *map(str, chosen)])
    shown = sample_texts(numbers, NullTokenizer(999), options.sample)
    model = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --tokenizer-type NullTokenizer --vocab-size 999"
    budget = [] if "--train-samples" in flags else ["--train-samples", "300"]
    config = parse("ar", [*model.split(), *budget, "--train-data-path", numbers.prefix, *flags.split()])
    train = open_sources(config).train
    train.request(300)
    assert [sample["ids"] for sample in shown] == [train[index].tolist() for index in chosen]
    assert [sample["sample"] for sample in shown] == chosen
    assert len(shown[0]["text"]) == shown[0]["ids"].count(999) + 1


def test_the_recorded_tokenizer_is_used(data_set, tmp_path):
    train_tokenizer(["a text to train on"] * 9, 260, tmp_path / "tokenizer.json")
    source = Source(data_set([[1, 2, 0]]), np.arange(2), {"tokenizer_type": "GPT2BPETokenizer"})
    assert open_tokenizer(source, TokenizerFlags()) is None  # no file is recorded
    source.metadata["tokenizer_model"] = "tokenizer.json"
    recorded = open_tokenizer(source, TokenizerFlags())
    given = open_tokenizer(source, TokenizerFlags(tokenizer_model=str(tmp_path / "tokenizer.json")))
    assert recorded.vocabulary_size == given.vocabulary_size == 260 and recorded.hash == given.hash
    source.metadata.clear()
    assert open_tokenizer(source, TokenizerFlags()) is None
    null = open_tokenizer(source, TokenizerFlags(tokenizer_type="NullTokenizer", vocab_size=5))
    assert document_text(source, null, 0)["text"] == ["1 2 0"]


# ------------------------------------------------------------------------------------ the tool


def inspect(capsys, *arguments) -> str:
    run(read_options(list(map(str, arguments))))
    return capsys.readouterr().out


def test_modes_can_be_combined_in_json(texts, capsys):
    results = json.loads(inspect(capsys, texts.prefix, "--document", 2, "--exact-duplicates", "--json"))
    assert [*results] == ["documents", "duplicates"] and results["documents"][0]["text"] == ["two words", ""]
    assert results["duplicates"]["within"]["equal"]["documents"] == 2  # "hello", and the empty ones
    assert results["duplicates"]["largest_clusters"][0]["excerpt"] == "hello"
    results = json.loads(inspect(capsys, texts.prefix, "--json"))
    assert results["statistics"]["documents"] == 7


def test_text_is_for_people(texts, capsys):
    shown = inspect(capsys, texts.prefix, "--document", 0, 5, "--exact-duplicates")
    assert "=== document 0: 6 tokens\nhello\n--- end of document ---\n" in shown
    assert "2 documents (28.57%) equal an earlier document" in shown and "cluster of 2 documents" in shown
    shown = inspect(capsys, texts.prefix, "--sample", 3, "--seq-length", 4)
    assert shown.startswith("=== sample 3, at epoch 0.4") and "5 tokens, the last only a target" in shown


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_histogram_is_plotted(texts, tmp_path, capsys, suffix, start):
    path = tmp_path / f"lengths{suffix}"
    assert "documents by length" in inspect(capsys, texts.prefix, "--plot", path)
    assert path.read_bytes().startswith(start) and not [*tmp_path.glob("*.partial")]


WRONG = {
    "none": ("none.idx: no such file",),
    "data --document 7": ("--document 7", "documents 0 to 6"),
    "data --document -1": ("--document -1", "documents 0 to 6"),
    "data --document x": ("--document x", "is not a number"),
    "data --sample -1": ("--sample -1", "start at 0"),
    "data --sample 0": ("--seq-length 2048", "one sample needs 2049 tokens"),
    "data --sample 0 --epoch-order megatron": ("--epoch-order megatron", "give --train-samples too"),
    "data --sample 1 7 --train-samples 7": ("--sample 1 7", "--train-samples 7 are the samples 0 to 6"),
    "data --sample 0 --epoch-order megatron --train-samples 7 --seed -1": ("--seed -1", "give 0 to 4294967295"),
    "data --seq-length 4": ("--seq-length 4", "does nothing without --sample"),
    "data --split 1,1": ("--split 1,1", "does nothing without --sample"),
    "data --sample 0 --seq-length 4 --split 0,1": ("--split 0,1", "three proportions"),
    "data --near-duplicates 0": ("--near-duplicates 0", "in (0, 1]"),
    "data --near-duplicates 1.1": ("--near-duplicates 1.1", "in (0, 1]"),
    "data --near-duplicates many": ("--near-duplicates many", "is not a number"),
    "data --against data": ("--against data", "needs --exact-duplicates or --near-duplicates"),
    "data --no-within --exact-duplicates": ("--no-within", "does nothing without --against"),
    "data --ngram 3": ("--ngram 3", "does nothing without --near-duplicates"),
    "data --ngram 0 --near-duplicates": ("--ngram 0", "in [1, 64]"),
    "data --remove --exact-duplicates": ("--remove", "--output-prefix"),
    "data --output-prefix x --exact-duplicates": ("--output-prefix x", "--remove"),
    "data --remove --output-prefix data --exact-duplicates": ("--output-prefix data", "is the input data"),
    "data --remove --output-prefix other --exact-duplicates --against other": ("is the input other",),
    "data --remove --output-prefix bare --exact-duplicates": ("bare.idx exists already",),
    "data --remove --output-prefix /proc/self/out --exact-duplicates": ("/proc/self/out: cannot be created",),
    "data --exact-duplicates --against other": ("another tokenizer", "eod 5 and 256", "compare data of one tokenizer"),
    "data --exact-duplicates --against wide": ("int32", "uint16"),
    "bare --document 0": ("--document 0", "no tokenizer is known for bare", "--tokenizer-type"),
    "bare --sample 0 --seq-length 2": ("--sample 0", "no tokenizer is known"),
    "bare --document 0 --tokenizer-type ByteTokenizer": ("has ids from 1 to 300", "ids 0 to 256"),
    "bare --document 0 --tokenizer-model none.json": ("--tokenizer-model none.json", "no such file"),
    "bare --vocab-size 4": ("--vocab-size 4", "--tokenizer-type"),
    "data --tokenizer-type NullTokenizer --vocab-size 9": ("was tokenised with another tokenizer", "257 ids"),
    "data --plot x.pdf": ("--plot x.pdf", ".png nor .svg"),
    "data --plot no/folder.png": ("--plot no/folder.png", "cannot be written"),
    "data --what": ("unknown flag --what",),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_refused_in_one_line(words, texts, data_set, tmp_path, monkeypatch, refused):
    data_set([[1, 300, 2]], name="bare")
    data_set([[70000]], 80000, name="wide")
    data_set([[1, 5]], name="other")
    (tmp_path / "other.json").write_text(json.dumps({"vocabulary_size": 257, "eod": 5}))
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with refused(*WRONG[words]):
        run(read_options(words.split()))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_near_duplicates_without_their_library(texts, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with refused("--near-duplicates: needs the package rensa, the extra dedup"):
        run(read_options([texts.prefix, "--near-duplicates"]))


def command(*arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run the tool; no file may be larger than `limit` bytes."""
    words = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py"), *map(str, arguments)]
    set_limit = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.run(words, capture_output=True, text=True, env=environment(), preexec_fn=set_limit)


def test_the_tool_removes_duplicates_and_survives_a_full_disk(data_set, tmp_path):
    data_set([[1] * 9000, [2, 3], [1] * 9000])
    arguments = [tmp_path / "data", "--exact-duplicates", "--remove", "--output-prefix", tmp_path / "out"]
    full = command(*arguments, limit=8192)
    assert full.returncode == 1 and "free space" in full.stderr and "Traceback" not in full.stderr
    assert not [*tmp_path.glob("out*")]
    done = command(*arguments)
    assert done.returncode == 0 and "1 documents removed, listed in" in done.stdout, done.stderr
    assert Path(f"{tmp_path}/out.removed.jsonl").read_text().count("\n") == 1
    missing = command(tmp_path / "none")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and missing.stderr.startswith("error: ")


def test_the_flags_of_samples_default_to_those_of_training():
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --train-data-path x --train-iters 1"
    config = parse("ar", flags.split())
    shown = SampleFlags()
    assert (shown.seq_length, shown.epoch_order) == (config.data.seq_length, config.data.epoch_order)
    assert shown.seed == config.training.seed
    with pytest.raises(ConfigurationError):
        SampleFlags(seq_length=1)
