"""tools/preprocess_data.py from the command line, and the files that it leaves after a failure."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib

import pytest

from megatron.data import preprocess as preparing
from megatron.data import publish as publishing
from megatron.data.contamination import HeldOut, TrainNgrams, ngram_hashes
from megatron.data.corpus import SPLITS, split_of_text
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.preprocess import preprocess
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.sources import base
from megatron.data.tokenizer import HFTokenizer, build_tokenizer, train_tokenizer
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from tests.conftest import ROOT, environment
from tests.data.sources import read_documents
from tests.data.test_tokenizer import sentencepiece_model

SHARES = (60, 20, 20)
WRITTEN = {f"{name}.{suffix}" for name in SPLITS for suffix in ("bin", "idx", "json")} | {"corpus.json"}


@pytest.fixture
def text(tmp_path):
    """A .jsonl file of 60 documents, one of them empty, many with the literal end-of-document token."""
    words = "the quick brown fox jumps over a lazy dog naïvely <|endoftext|> .\n".split(" ")
    # half of them repeat one pattern, so that splits share some n-grams
    lines = [" ".join(random.Random(number * (number % 2)).choices(words, k=number * 3)) for number in range(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def command(*flags) -> list[str]:
    return [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, flags)]


def call(*flags, code=0):
    """Run the tool; an error is one line."""
    done = subprocess.run(command(*flags), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done


def options(text, folder, **changes) -> PreprocessOptions:
    options = {"output_dir": folder, "input": (str(text),), "splits": SHARES, "tokenizer_type": "ByteTokenizer"}
    return PreprocessOptions(**options | changes)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_to_token_files_end_to_end(text, tmp_path):
    flags = ["--output-dir", tmp_path / "data", "--input", text, "--train-tokenizer", 280, "--splits", *SHARES]
    output = call(*flags).stdout
    assert set(contents(tmp_path / "data")) == WRITTEN | {"tokenizer.json"}
    tokenizer = HFTokenizer(str(tmp_path / "data" / "tokenizer.json"))
    assert tokenizer.vocabulary_size == 280
    expected = {name: [] for name in SPLITS}
    for document in read_documents([text]):
        expected[split_of_text("", document.text.encode(), SHARES)].append(document.text)
    record = json.loads((tmp_path / "data" / "corpus.json").read_text())
    for name, documents in expected.items():
        dataset, metadata = IndexedDataset(tmp_path / "data" / name), read_metadata(tmp_path / "data" / name)
        assert [list(dataset[number]) for number in range(len(dataset))] == [
            [*tokenizer.encode(document), tokenizer.eod] for document in documents
        ]
        size = {
            "documents": len(documents),
            "bytes": sum(len(document.encode()) for document in documents),
            "tokens": dataset.total_tokens,
        }
        assert record["splits"][name] == size
        assert metadata.items() >= size.items()
        assert (metadata["corpus_hash"], metadata["vocabulary_size"]) == (record["settings"]["hash"], 280)
        assert (metadata["tokenizer_type"], metadata["tokenizer_model"]) == ("HFTokenizer", "tokenizer.json")
        assert f"{name}: {size['documents']:,} documents, {size['bytes']:,} bytes, {size['tokens']:,} tokens" in output
    assert sum(map(len, expected.values())) == 59
    assert set(record["shared_13grams"]) == {"tuning", "validation"}
    train_tokenizer(expected["train"], 280, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "data" / "tokenizer.json").read_bytes()
    for name in ("tuning", "validation"):
        held, train = HeldOut(), TrainNgrams()
        for document in expected[name]:
            held.add(zlib.crc32(document.encode()), ngram_hashes(document.encode()))
        for document in expected["train"]:
            train.add(ngram_hashes(document.encode()))
        assert record["shared_13grams"][name] == held.shared(train)
        assert 0 < held.shared(train)["ngrams"] < 1
    assert record["shared_13grams"]["tuning"] == read_metadata(tmp_path / "data" / "tuning")["shared_13grams"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert "holds this corpus already" in call(*flags).stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_what_is_missing_or_cut_is_written_anew(text, tmp_path, name, damage):
    preprocess(options(text, tmp_path / "data"))
    before = contents(tmp_path / "data")
    assert preprocess(options(text, tmp_path / "data")) is None
    if damage == "missing":
        (tmp_path / "data" / name).unlink()
    else:
        (tmp_path / "data" / name).write_bytes(before[name][:-3])
    assert preprocess(options(text, tmp_path / "data")) is not None
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_tokenizer_that_is_not_the_one_that_made_the_data_is_written_anew(text, tmp_path, damage):
    requested = options(text, tmp_path / "data", tokenizer_type="HFTokenizer", train_tokenizer=280)
    preprocess(requested)
    before = contents(tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    if damage == "changed":
        (tmp_path / "data" / "tokenizer.json").write_bytes(before["tokenizer.json"] + b"\n")
    assert preprocess(requested) is not None
    assert contents(tmp_path / "data") == before


def test_other_settings_or_text_are_written_anew(text, tmp_path):
    folder = tmp_path / "data"
    first = preprocess(options(text, folder))
    assert preprocess(options(text, folder, splits=(70, 15, 15)))["settings"]["hash"] != first["settings"]["hash"]
    null = tmp_path / "ids.jsonl"
    null.write_text("".join(json.dumps({"text": f"{number} 7"}) + "\n" for number in range(60)))
    numbers = options(null, folder, tokenizer_type="NullTokenizer", vocab_size=60)
    assert preprocess(numbers)["splits"]["train"]["tokens"] % 3 == 0
    assert list(IndexedDataset(folder / "train", 61)[0][1:]) == [7, 60]
    assert preprocess(numbers) is None
    assert preprocess(options(null, folder, tokenizer_type="NullTokenizer", vocab_size=70000)) is not None
    assert IndexedDataset(folder / "train").dtype == "int32"


def test_an_existing_tokenizer_is_copied_and_its_content_counts(text, tmp_path):
    preprocess(options(text, tmp_path / "one", tokenizer_type="HFTokenizer", train_tokenizer=280))
    model = tmp_path / "one" / "tokenizer.json"
    again = options(text, tmp_path / "two", tokenizer_type="HFTokenizer", tokenizer_model=str(model))
    assert preprocess(again) is not None and preprocess(again) is None
    assert (tmp_path / "two" / "train.bin").read_bytes() == (tmp_path / "one" / "train.bin").read_bytes()
    preprocess(options(text, tmp_path / "one", tokenizer_type="HFTokenizer", train_tokenizer=285))
    assert preprocess(again) is not None
    assert build_tokenizer("HFTokenizer", tmp_path / "two" / "tokenizer.json").vocabulary_size == 285


def test_a_split_of_share_zero_is_not_written_and_another_texts_is_left_alone(text, tmp_path):
    preprocess(options(text, tmp_path / "data", splits=(100, 0, 0)))
    train = contents(tmp_path / "data")
    assert set(train) == {"train.bin", "train.idx", "train.json", "corpus.json"}
    other = tmp_path / "other.jsonl"
    shutil.copy(text, other)
    preprocess(options(other, tmp_path / "data", splits=(0, 0, 100)))
    both = contents(tmp_path / "data")
    assert both["train.bin"] == train["train.bin"] == both["validation.bin"]


def test_no_split_is_left_of_the_same_text_cut_otherwise(text, tmp_path):
    """Its documents are in train now, and selecting on them would be selecting on training text."""
    preprocess(options(text, tmp_path / "data"))
    assert (tmp_path / "data" / "tuning.idx").exists()
    preprocess(options(text, tmp_path / "data", splits=(100, 0, 0)))
    assert set(contents(tmp_path / "data")) == {"train.bin", "train.idx", "train.json", "corpus.json"}


@pytest.mark.parametrize("spelling", ["./text.jsonl", "data/../text.jsonl", "ABSOLUTE"])
def test_the_same_text_by_another_path_leaves_no_split_either(spelling, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preprocess(options("text.jsonl", tmp_path / "data"))
    preprocess(options(text if spelling == "ABSOLUTE" else spelling, tmp_path / "data", splits=(100, 0, 0)))
    assert set(contents(tmp_path / "data")) == {"train.bin", "train.idx", "train.json", "corpus.json"}


def test_a_split_whose_origin_is_unreadable_is_refused_before_anything_changes(text, tmp_path, refused):
    preprocess(options(text, tmp_path / "data"))
    (tmp_path / "data" / "tuning.json").write_text("{")
    before = contents(tmp_path / "data")
    with refused("tuning.json: is not JSON"):
        preprocess(options(text, tmp_path / "data", splits=(100, 0, 0)))
    assert contents(tmp_path / "data") == before


def test_small_batches_and_samples_give_the_same_files(text, tmp_path, monkeypatch):
    requested = {"tokenizer_type": "HFTokenizer", "train_tokenizer": 280}
    preprocess(options(text, tmp_path / "one", **requested))
    monkeypatch.setattr(base, "CHUNK_BYTES", 50)
    preprocess(options(text, tmp_path / "two", **requested))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # a tokenizer trained on a third of the text is different, and has the same size
    monkeypatch.setattr(preparing, "TOKENIZER_BYTES", 1000)
    preprocess(options(text, tmp_path / "three", tokenizer_type="HFTokenizer", train_tokenizer=275))
    three = HFTokenizer(str(tmp_path / "three" / "tokenizer.json"))
    monkeypatch.undo()
    preprocess(options(text, tmp_path / "four", tokenizer_type="HFTokenizer", train_tokenizer=275))
    assert three.vocabulary_size == 275
    assert contents(tmp_path / "four")["tokenizer.json"] != contents(tmp_path / "three")["tokenizer.json"]


@pytest.mark.parametrize("moment", ["encode_arrays", "_describe", "_move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_writer_changes_nothing(text, tmp_path, monkeypatch, moment, error):
    folder = tmp_path / "data"
    preprocess(options(text, folder))
    before = contents(folder)

    def fail(*_, **__):
        raise error

    if moment == "encode_arrays":
        monkeypatch.setattr("megatron.data.tokenizer.ByteTokenizer.encode_arrays", fail)
    else:
        monkeypatch.setattr(publishing, moment, fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error) as caught:
        preprocess(options(text, folder, splits=(70, 15, 15)))
    assert error is KeyboardInterrupt or f"--output-dir {folder}: cannot be written (No space" in str(caught.value)
    assert contents(folder) == before


def test_files_move_into_place_with_corpus_json_last(text, tmp_path, monkeypatch):
    """Killed after each move in turn: either the data is refused, or it is one data set."""
    folder, moved = tmp_path / "data", []
    replace = os.replace
    for steps in range(100):
        preprocess(options(text, folder))
        moved.clear()

        def stop(source, target, steps=steps):
            if str(source).startswith(str(folder / ".partial")) and os.path.dirname(target) == str(folder):
                if len(moved) == steps:
                    raise KeyboardInterrupt
                moved.append(os.path.basename(target))
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        try:
            preprocess(options(text, folder, splits=(70, 15, 15)))
            break
        except KeyboardInterrupt:
            assert not (folder / "corpus.json").exists()
            assert not (folder / "train.idx").exists() or {"train.bin", "train.idx"} <= set(moved)
        finally:
            monkeypatch.setattr(os, "replace", replace)
    assert (len(moved), moved[-1]) == (len(WRITTEN), "corpus.json")


def test_a_killed_writer_leaves_no_data_set_and_the_next_one_clears_up(text, tmp_path):
    folder = tmp_path / "data"
    flags = ["--output-dir", folder, "--input", text, "--tokenizer-type", "ByteTokenizer", "--splits", *SHARES]
    kill = "lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    stop = f"from megatron.data import publish; publish._describe = {kill}"
    start = f"sys.argv = {command(*flags)[1:]}; runpy.run_path(sys.argv[0], run_name='__main__')"
    program = f"import os, runpy, signal, sys; {stop}; {start}"
    killed = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in folder.iterdir()] == [".partial"]
    call(*flags)
    assert set(contents(folder)) == WRITTEN


def test_a_full_disk_is_one_line_and_changes_nothing(text, tmp_path):
    flags = [
        "--output-dir",
        tmp_path / "data",
        "--input",
        text,
        "--tokenizer-type",
        "ByteTokenizer",
        "--splits",
        *SHARES,
    ]
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "limited", *command(*flags)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"error: --output-dir {tmp_path / 'data'}: cannot be written (File too large)" in done.stderr
    assert contents(tmp_path / "data") == {}


def test_a_second_writer_waits_for_the_first(text, tmp_path):
    folder = tmp_path / "data"
    preprocess(options(text, folder))
    (folder / ".partial").mkdir()
    held = os.open(folder / ".partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    flags = ["--output-dir", folder, "--input", text, "--tokenizer-type", "ByteTokenizer", "--splits", *SHARES]
    second = subprocess.Popen(
        command(*flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "another process writes to it" in second.stderr.readline()
    time.sleep(0.1)
    assert second.poll() is None
    os.close(held)
    assert "holds this corpus already" in second.communicate(timeout=60)[0]


def test_text_that_changes_while_it_is_read_is_refused(text, tmp_path, monkeypatch, refused):
    survey = preparing._Preprocessing._survey

    def change(run):
        result = survey(run)
        text.write_text(text.read_text().replace("fox", "cat"))
        return result

    monkeypatch.setattr(preparing._Preprocessing, "_survey", change)
    with refused(f"--input {text}", "changed while it was read", "start again"):
        preprocess(options(text, tmp_path / "data", tokenizer_type="HFTokenizer", train_tokenizer=280))
    assert contents(tmp_path / "data") == {}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"splits": (80, 20)}, ["--splits 80 20", "three proportions"]),
        ({"splits": (80, -10, 30)}, ["--splits 80 -10 30", "none negative"]),
        ({"splits": (0, 0, 0)}, ["--splits 0 0 0", "one above 0"]),
        ({"splits": (float("nan"), 1, 1)}, ["--splits nan 1 1"]),
        ({"splits": (float("inf"), 1, 1)}, ["--splits inf 1 1"]),
        (
            {"tokenizer_type": "HFTokenizer", "splits": (0, 1, 1)},
            ["--splits 0 1 1", "no text to train", "--tokenizer-model"],
        ),
        ({"tokenizer_type": "HFTokenizer", "train_tokenizer": 256}, ["--train-tokenizer 256", "at least 257"]),
        (
            {"tokenizer_type": "HFTokenizer", "train_tokenizer": 300, "tokenizer_model": "x"},
            ["--train-tokenizer 300", "excludes --tokenizer-model x", "drop one"],
        ),
        ({"train_tokenizer": 300}, ["--train-tokenizer 300", "--tokenizer-type is ByteTokenizer", "leave it out"]),
        ({"tokenizer_model": "x"}, ["--tokenizer-model x", "--tokenizer-type is ByteTokenizer"]),
        ({"vocab_size": 9}, ["--vocab-size 9", "belongs to NullTokenizer"]),
        ({"tokenizer_type": "NullTokenizer"}, ["--tokenizer-type NullTokenizer", "needs --vocab-size"]),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 0}, ["--vocab-size 0", "at least 1"]),
    ],
)
def test_flags_that_cannot_be_are_refused(text, tmp_path, refused, changes, parts):
    with refused(*parts):
        options(text, tmp_path / "data", **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"input": ("nowhere.txt",)}, ["--input nowhere.txt", "no such file"]),
        ({"json_keys": ("body",)}, ['line 1 has no field "body"', "--json-keys"]),
        ({"splits": (98, 1, 1)}, ["--splits 98 1 1", "split has no document", "--txt-separator"]),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 9}, ["NullTokenizer", "0 to 8"]),
        ({"tokenizer_type": "HFTokenizer", "train_tokenizer": 9999}, ["--train-tokenizer 9999", "this text gives"]),
        (
            {"tokenizer_type": "HFTokenizer", "tokenizer_model": "no.json"},
            ["--tokenizer-model no.json", "no such file"],
        ),
        ({"tokenizer_type": "HFTokenizer", "tokenizer_model": __file__}, [f"--tokenizer-model {__file__}", "is not a"]),
    ],
)
def test_text_that_does_not_fit_is_refused_and_nothing_is_left(text, tmp_path, refused, changes, parts):
    with refused(*parts):
        preprocess(options(text, tmp_path / "data", **changes))
    assert not (tmp_path / "data").exists() or contents(tmp_path / "data") == {}


def test_input_without_text_and_a_folder_that_cannot_be_made(text, tmp_path, refused):
    (tmp_path / "empty.txt").write_text(" \n")
    with refused(f"--input {tmp_path / 'empty.txt'}: holds no text", "give files"):
        preprocess(options(tmp_path / "empty.txt", tmp_path / "data"))
    with refused(f"--output-dir {text}", "cannot be created", "name another"):
        preprocess(options(text, text))
    with refused(f"--output-dir {text / 'below'}", "cannot be created"):
        preprocess(options(text, text / "below"))


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    folder = ["--output-dir", tmp_path / "data"]
    assert "--output-dir" in call(code=2).stderr
    assert "did you mean --splits?" in call(*folder, "--split", 1, code=2).stderr
    for flags in (["--input"], ["--train-tokenizer", "many"], ["--tokenizer-type", "BPE"], ["--splits", "a", "b", "c"]):
        assert flags[0] in call(*folder, *flags, code=2).stderr
    assert "--splits -1 1 1: give three proportions" in call(*folder, "--splits", -1, 1, 1, code=2).stderr
    assert not (tmp_path / "data").exists()


def test_help_teaches():
    output = call("--help").stdout
    for part in ("--input PATH", "--txt-separator", "default: text", "python tools/preprocess_data.py --output-dir"):
        assert part in output


def test_gpt2_data_trains_with_the_tokenizer_that_is_written_beside_it(text, tmp_path):
    preprocess(options(text, tmp_path / "one", tokenizer_type="HFTokenizer", train_tokenizer=280))
    model = json.loads((tmp_path / "one" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]) + "\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    requested = options(text, tmp_path / "two", tokenizer_type="GPT2BPETokenizer", **files)
    assert preprocess(requested) is not None and preprocess(requested) is None
    assert (tmp_path / "two" / "train.bin").read_bytes() == (tmp_path / "one" / "train.bin").read_bytes()
    flags = ["--train-data-path", str(tmp_path / "two" / "train"), "--seq-length", "8"]
    model_flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --train-iters 1".split()
    by_files = [
        "--tokenizer-type",
        "GPT2BPETokenizer",
        "--vocab-file",
        files["vocab_file"],
        "--merge-file",
        files["merge_file"],
    ]
    for more in ([], by_files, by_files[2:]):  # the files imply the type
        sources = open_sources(parse("ar", [*flags, *model_flags, *more]))
        assert sources.tokenizer.vocabulary_size == 280
    assert call("--input", text, "--output-dir", tmp_path / "three", *by_files[2:]).returncode == 0
    two, three = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("two", "three"))
    assert two["tokenizer_type"] == three["tokenizer_type"] and two["tokenizer_hash"] == three["tokenizer_hash"]
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ConfigurationError, match="--vocab-file .*: no such file"):
        options(text, tmp_path / "two", tokenizer_type="GPT2BPETokenizer", **files)


def test_gpt2_files_other_than_those_that_made_the_data_are_refused(text, tmp_path, refused):
    preprocess(options(text, tmp_path / "data", tokenizer_type="HFTokenizer", train_tokenizer=280))
    model = json.loads((tmp_path / "data" / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(reversed(merges)) + "\n")
    flags = f"--tokenizer-type GPT2BPETokenizer --vocab-file {tmp_path}/vocab.json --merge-file {tmp_path}/merges.txt"
    flags += f" --train-data-path {tmp_path}/data/train --seq-length 8 --train-iters 1"
    with refused(f"{tmp_path}/data/train", "another tokenizer than --vocab-file", "--merge-file"):
        open_sources(parse("ar", [*"--num-layers 1 --hidden-size 8 --num-attention-heads 1".split(), *flags.split()]))


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer"])
def test_sentencepiece_data_trains_with_the_model_that_lies_beside_it(kind, text, tmp_path, refused):
    model = sentencepiece_model(tmp_path)
    requested = options(text, tmp_path / "data", tokenizer_type=kind, tokenizer_model=model)
    assert preprocess(requested) is not None and preprocess(requested) is None
    flags = f"--tokenizer-type {kind} --train-data-path {tmp_path}/data/train --seq-length 8 --train-iters 1"
    network = "--num-layers 1 --hidden-size 8 --num-attention-heads 1".split()
    sources = open_sources(parse("ar", [*network, *flags.split()]))
    assert sources.tokenizer.hash == build_tokenizer(kind, model).hash
    dataset = IndexedDataset(tmp_path / "data" / "train", sources.tokenizer.vocabulary_size)
    assert {int(dataset[document][-1]) for document in range(len(dataset))} == {sources.tokenizer.eod}
    other = sentencepiece_model(tmp_path, seed_sentencepiece_size=50, vocab_size=290)
    with refused(f"{tmp_path}/data/train", "was tokenised with"):
        open_sources(parse("ar", [*network, *flags.split(), "--tokenizer-model", other]))
    with refused(f"--tokenizer-type {kind}", "needs --tokenizer-model"):
        options(text, tmp_path / "data", tokenizer_type=kind)
