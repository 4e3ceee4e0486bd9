"""All kinds of sources: the same text from each gives the same token files; what is broken is named or counted."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import preprocess
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.sources import base
from megatron.data.sources.base import BadRecord
from megatron.data.sources.registry import list_sources
from megatron.data.sources.tables import HuggingFaceDataset
from megatron.errors import ConfigurationError
from tests.conftest import ROOT, environment
from tests.data.sources import read_records

TEXTS = [f"document {number} \u2028 naïve <|endoftext|> [MASK]\n\0 {'x' * (number % 50)}" for number in range(3000)]
LINES = "".join(json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def table():
    return pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})


def options(folder, **changes) -> PreprocessOptions:
    return PreprocessOptions(**{"output_dir": folder, "tokenizer_type": "ByteTokenizer", "workers": 1} | changes)


def token_files(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def write_sources(folder: Path, table: pyarrow.Table) -> dict[str, dict]:
    """Write the same text in every format; return the flags that read each."""
    (folder / "a.jsonl").write_text(LINES)
    (folder / "b.json").write_text(LINES.replace("\n", "\r\n\n"))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    (folder / "d.ndjson.bz2").write_bytes(bz2.compress(LINES.encode()))
    (folder / "e.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    parquet.write_table(table, folder / "f.parquet", row_group_size=700, compression="zstd")
    with ipc.new_stream(folder / "g.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2000)
    large = table.cast(pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.large_string())]))
    with ipc.new_file(folder / "h.arrow", large.schema) as file:
        file.write_table(large)
    halves = folder / "halves"
    (halves / "below").mkdir(parents=True)
    parquet.write_table(table.slice(0, 1000), halves / "1.parquet")
    (halves / "below" / "2.jsonl").write_text("\n".join(LINES.split("\n")[1000:]))
    (halves / "notes.md").write_text("not data")
    saved = datasets.Dataset(table)
    saved.save_to_disk(folder / "saved", max_shard_size="50KB")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(folder / "splits")
    hub = folder / "hub"
    hub.mkdir()
    parquet.write_table(table, hub / "train-00000-of-00001.parquet")
    files = {path.name: {"input": (str(path),)} for path in folder.iterdir() if path.is_file()}
    return files | {
        "folder": {"input": (str(halves),)},
        "pattern": {"input": (str(halves / "*.parquet"), str(halves / "**/2.*"))},
        **{name: {"hf_dataset": str(folder / name)} for name in ("saved", "splits", "hub")},
    }


def test_the_same_text_in_any_format_gives_the_same_files(tmp_path, table):
    results = {}
    for name, flags in write_sources(tmp_path, table).items():
        summary = preprocess(options(tmp_path / "out" / name, **flags))
        results[name] = token_files(tmp_path / "out" / name), summary["settings"]["hash"], summary["shared_13grams"]
    assert len(results) == 13
    for name, result in results.items():
        assert result == results["a.jsonl"], name
    parts = [IndexedDataset(str(tmp_path / "out" / "f.parquet" / name)) for name in ("train", "tuning", "validation")]
    decoded = {bytes(part[number][:-1].tolist()).decode() for part in parts for number in range(len(part))}
    assert decoded == set(TEXTS) and sum(map(len, parts)) == len(TEXTS)


def test_a_data_set_in_the_cache_is_read_offline(tmp_path, table):
    """The cache as load_dataset fills it, under the name of the data set on the hub."""
    parquet.write_table(table, tmp_path / "train.parquet")
    prepared = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    prepared.download_and_prepare()
    entry = tmp_path / "home" / "datasets" / "someone___texts" / "default" / "0.0.0" / ("0123456789" * 4)
    entry.mkdir(parents=True)
    for path in Path(prepared.cache_dir).iterdir():
        (entry / path.name.replace(f"{prepared.dataset_name}-", "texts-")).write_bytes(path.read_bytes())
    info = json.loads((entry / "dataset_info.json").read_bytes())
    (entry / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "texts", "config_name": "default"}))
    variables = environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--tokenizer-type", "ByteTokenizer"]
    command += ["--hf-dataset", "someone/texts", "--output-dir", tmp_path / "data"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    preprocess(options(tmp_path / "file", input=(str(tmp_path / "train.parquet"),)))
    assert token_files(tmp_path / "data") == token_files(tmp_path / "file")


def test_standard_input_is_json_lines(tmp_path):
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--tokenizer-type", "ByteTokenizer", "--input", "-"]
    flags = ["--output-dir", tmp_path / "a", "--splits", "98", "1", "1"]
    done = subprocess.run([*command, *flags], input=LINES, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "train: 2,9" in done.stdout, done.stderr
    (tmp_path / "b.jsonl").write_text(LINES)
    preprocess(options(tmp_path / "b", input=(str(tmp_path / "b.jsonl"),), splits=(98, 1, 1)))
    assert token_files(tmp_path / "a") == token_files(tmp_path / "b")
    done = subprocess.run([*command, *flags], input=LINES, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and token_files(tmp_path / "a") == token_files(tmp_path / "b")  # read once, and written
    flags = ["--output-dir", tmp_path / "c", "--tokenizer-type", "HFTokenizer", "--train-tokenizer", "300"]
    done = subprocess.run([*command, *flags], input=LINES, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "error: --input -: is read once" in done.stderr, done.stderr


def test_every_file_of_a_pattern_is_text_with_txt(tmp_path):
    for name in ("b.md", "deep/a.md", "deep/c.rst", "deep/.hidden.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    texts = [record.text for record in read_records([f"{tmp_path}/**/*.md"], txt=True)]
    assert texts == ["text of b.md", "text of deep/a.md"]
    assert len([*read_records([tmp_path], txt=True)]) == 3


def test_several_keys_give_a_data_set_each(tmp_path):
    lines = [{"text": "a b", "body": "c"}, {"text": "", "body": "d e"}, {"text": " ", "body": "f"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = {"output_dir": None, "output_prefix": str(tmp_path / "out" / "x"), "append_eod": True}
    summary = preprocess(options(None, input=(str(tmp_path / "x.jsonl"),), json_keys=("text", "body"), **flags))
    assert {name: size["documents"] for name, size in summary["splits"].items()} == {"text": 2, "body": 3}
    assert summary["skipped"] == {"blank": 1}  # Megatron leaves out empty documents, and tokenises white space
    assert [*IndexedDataset(str(tmp_path / "out" / "x_body_document"))[1]] == [*b"d e", 256]
    assert not (tmp_path / "out" / ".x.partial").exists()


BAD_LINES = {
    b"{": "not JSON",
    b'{"body": "x"}': 'no field "text"',
    b'{"text": 5}': "not a string",
    b'{"text": "\\ud800"}': "lone surrogates",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": " "}': "blank",
    b'{"text": "' + b"y" * 3000 + b'"}': "too long",
}


def test_bad_records_are_counted_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "LONGEST_DOCUMENT", 2000)
    monkeypatch.setattr(base, "CHUNK_BYTES", 500)
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:500]]
    lines = [*good]
    for number, line in enumerate(BAD_LINES):
        lines.insert(number * 60, line)
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good))
    with pytest.raises(ConfigurationError, match="line 1 is not JSON"):
        preprocess(options(tmp_path / "a", input=(str(tmp_path / "bad.jsonl"),)))
    assert not [*(tmp_path / "a").iterdir()]
    summary = preprocess(options(tmp_path / "a", input=(str(tmp_path / "bad.jsonl"),), on_error="skip"))
    assert summary["skipped"] == dict.fromkeys(sorted(BAD_LINES.values()), 1)
    preprocess(options(tmp_path / "b", input=(str(tmp_path / "good.jsonl"),)))
    assert token_files(tmp_path / "a") == token_files(tmp_path / "b")


def test_rows_that_are_no_text_are_counted(tmp_path):
    (tmp_path / "x").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    invalid = pyarrow.array([b"a", b"\xff", b"b"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "y.parquet")
    for name, reason in (("x", "not a string"), ("y", "not UTF-8")):
        records = [*read_records([tmp_path / f"{name}.parquet"])]
        assert [isinstance(record, BadRecord) for record in records] == [False, True, False]
        assert records[1].reason == reason and f"{name}.parquet: row 2" in str(records[1])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.xz"])
def test_a_damaged_file_is_named_or_counted(tmp_path, table, name, refused):
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, path)
    elif name == "a.arrow":
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    else:
        path.write_bytes((gzip if name.endswith("gz") else lzma).compress(LINES.encode()))
    path.write_bytes(path.read_bytes()[:-3000])
    (tmp_path / "b.jsonl").write_text(LINES)
    inputs = (str(path), str(tmp_path / "b.jsonl"))
    with refused(f"--input {path}", "is damaged or truncated"):
        preprocess(options(tmp_path / "out", input=inputs))
    summary = preprocess(options(tmp_path / "out", input=inputs, on_error="skip"))
    assert summary["skipped"] == {"damaged file": 1}
    assert sum(size["documents"] for size in summary["splits"].values()) >= len(TEXTS)


@pytest.mark.parametrize(
    "name, keys, parts",
    [
        ("a.parquet", ("body",), ['has no column "body", but id, text', "--json-keys"]),
        ("a.parquet", ("id",), ['its column "id" has the type int64, not string', "--json-keys"]),
        ("a.txt", ("text", "body"), ["--json-keys text body", "is plain text", "give one"]),
    ],
)
def test_a_table_without_the_column_is_refused(tmp_path, table, refused, name, keys, parts):
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("x")
    with refused(*parts):
        [*read_records([tmp_path / name], keys)]


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"hf_dataset": "no/such"}, ["--hf-dataset no/such", "cannot be loaded", "--hf-split"]),
        ({"hf_dataset": "SAVED", "hf_split": "test"}, ["--hf-split test", "has train", "give one of them"]),
        ({"hf_split": "test"}, ["--hf-split test", "does nothing without --hf-dataset"]),
        ({"input": ("a.jsonl",), "hf_dataset": "x"}, ["--input a.jsonl", "excludes --hf-dataset x"]),
        ({"txt": True}, ["--txt", "does nothing without --input"]),
        ({"json_keys": ("a", "b")}, ["--json-keys a b", "--output-prefix"]),
        ({"json_keys": ("a", "a")}, ["--json-keys a a", "twice"]),
        ({"output_prefix": "x"}, ["--output-dir", "--output-prefix", "one of them"]),
        ({"output_dir": None}, ["no --output-dir", "--output-prefix", "one of them"]),
        ({"output_dir": None, "output_prefix": "x", "json_keys": ("a/b",)}, ["--json-keys a/b", "no slash"]),
        ({"root": Path("x")}, ["--root x", "does nothing without --output-prefix"]),
        ({"workers": 0}, ["--workers 0", "at least 1"]),
        (
            {"output_dir": None, "output_prefix": "x", "splits": (90, 5, 5)},
            ["--splits 90 5 5", "does nothing without --output-dir"],
        ),
        ({"input": ("a.txt",), "txt_separator": "\n\n"}, ["--txt-separator \\n", "line break", "'' for an empty line"]),
        ({"hf_dataset": "SAVED", "txt_separator": "x"}, ["--txt-separator x", "does nothing without --input"]),
    ],
)
def test_flags_that_contradict_are_refused(tmp_path, monkeypatch, table, refused, flags, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset(table.slice(0, 3))}).save_to_disk(saved)
    flags = {name: str(saved) if value == "SAVED" else value for name, value in flags.items()}
    with refused(*parts):
        preprocess(options(**{"folder": tmp_path / "out"} | flags))


def test_a_separator_without_plain_text_is_refused(tmp_path, refused):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(LINES)
    for path in (str(tmp_path / "a.jsonl"), "-"):
        with refused("--txt-separator ---", "no file of --input is plain text", "leave it out"):
            list_sources([path], separator="---")
    assert len(list_sources([str(tmp_path)], separator="---")) == 2


def test_a_field_of_plain_text_is_refused(tmp_path, refused):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(LINES)
    text, both = (str(tmp_path / "a.txt"),), (str(tmp_path),)
    for flags in ({"input": text}, {}):
        with refused("--json-keys body", "all text is plain", "leave it out"):
            options(tmp_path / "out", json_keys=("body",), **flags).sources()
    assert len(options(tmp_path / "out", json_keys=("body",), input=both).sources()) == 2
    megatron = {"output_dir": None, "output_prefix": str(tmp_path / "x"), "json_keys": ("body",)}
    assert len(options(None, input=text, **megatron).sources()) == 1


def test_a_pipe_and_a_changing_or_vanishing_file(tmp_path, monkeypatch, refused):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with refused("pipe.jsonl: no such file"):
        [*read_records([tmp_path / "pipe.jsonl"])]
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    monkeypatch.setattr(base, "CHUNK_BYTES", 1000)
    for change in (lambda: path.write_text(LINES + LINES), path.unlink):
        records = read_records([path])
        next(records)
        threading.Thread(target=change).run()
        with refused(f"--input {path}"):
            list(records)


@pytest.mark.parametrize("library, name", [(bz2, "a.jsonl.bz2"), (lzma, "a.jsonl.xz")])
def test_a_damaged_stream_in_the_middle_of_a_file_is_not_its_end(tmp_path, refused, library, name):
    streams = [library.compress(b'{"text": "%d"}\n' % number * 100) for number in range(3)]
    (tmp_path / name).write_bytes(b"".join(streams))
    assert len([*read_records([tmp_path / name])]) == 300
    streams[1] = b"XXXX" + streams[1][4:]
    (tmp_path / name).write_bytes(b"".join(streams))
    records = [*read_records([tmp_path / name])]
    assert len(records) == 101 and records[-1].reason == "damaged file"  # what comes before the damage is read
    with refused(f"--input {tmp_path / name}: is damaged or truncated"):
        preprocess(options(tmp_path / "out", input=(str(tmp_path / name),)))
    (tmp_path / name).write_bytes(streams[0] + bytes(8) + streams[2] if library is lzma else streams[0] + streams[2])
    assert len([*read_records([tmp_path / name])]) == 200


def test_all_whole_lines_before_the_damage_of_a_file_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-200])
    records = [*read_records([tmp_path / "a.jsonl.gz"])]
    assert len(records) > 2900 and records[-1].reason == "damaged file"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(LINES.replace("\n", "\n\n").encode())[:-200])
    records = [*read_records([tmp_path / "a.txt.gz"], separator="")]
    assert len(records) > 2900 and records[-1].reason == "damaged file"
    with pytest.raises(ConfigurationError, match=r"holds no text \(skipped: 1 not JSON\); give files"):
        (tmp_path / "b.jsonl").write_text("{")
        preprocess(options(tmp_path / "out", input=(str(tmp_path / "b.jsonl"),), on_error="skip"))
    trained = {"tokenizer_type": "HFTokenizer", "train_tokenizer": 300, "on_error": "skip"}
    with pytest.raises(ConfigurationError, match=r"holds no text \(skipped: 1 not JSON\); give files"):
        preprocess(options(tmp_path / "out", input=(str(tmp_path / "b.jsonl"),), **trained))


class FailingDisk(io.BytesIO):
    """A file that cannot be read beyond its first 3,000 bytes."""

    def read1(self, size: int = -1) -> bytes:
        if self.tell() >= 3000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read1(min(size, 3000 - self.tell()))


def test_an_error_of_the_disk_does_not_move_the_edges_of_chunks(tmp_path, monkeypatch):
    """A run that resumes counts chunks: after a shorter one, the text up to the end of the whole one would be lost."""
    monkeypatch.setattr(base, "CHUNK_BYTES", 2000)
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    (source,) = list_sources([str(path)])
    expected = [chunk.data for chunk in source.chunks(("text",))]
    monkeypatch.setattr(source, "_open", lambda: nullcontext(FailingDisk(LINES.encode())))
    chunks = []
    with pytest.raises(OSError, match="Input/output error"):
        chunks.extend(chunk.data for chunk in source.chunks(("text",)))
    assert chunks == expected[:1]


def test_a_table_that_cannot_be_read_is_not_damaged(tmp_path, table, monkeypatch, refused):
    parquet.write_table(table, tmp_path / "a.parquet")

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with refused(f"--input {tmp_path / 'a.parquet'}: cannot be read (Permission denied)", "permissions"):
        [*read_records([tmp_path / "a.parquet"])]


def test_a_row_of_a_data_set_that_is_too_long_is_named(tmp_path, table, monkeypatch):
    datasets.Dataset(table.slice(0, 3)).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(base, "LONGEST_DOCUMENT", 1)
    source = HuggingFaceDataset(str(tmp_path / "saved"), "train", None)
    records = [record for chunk in source.chunks(("text",)) for record in chunk.records(("text",))]
    assert str(records[0]).startswith(f"--hf-dataset {tmp_path / 'saved'}: row 1: is one document of more than 1 bytes")


def test_chunks_of_a_table_are_small_whatever_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "CHUNK_BYTES", 100_000)
    table = pyarrow.table({"text": ["x" * 5000 + str(number) for number in range(1000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    with ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "b.arrow"):
        (source,) = list_sources([str(path)])
        chunks = [*source.chunks(("text",))]
        assert max(len(pickle.dumps(chunk)) for chunk in chunks) < 100_000 + 64 * 6000
        assert [chunk.first for chunk in chunks][:2] == [1, 65] and len(chunks) == 16
        assert sum(chunk.size for chunk in chunks) == pytest.approx(path.stat().st_size, rel=0.05)


def test_two_columns_of_one_name_are_refused(tmp_path, refused):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with refused(f"--input {tmp_path / 'a.parquet'}", 'has 2 columns "text"', "rename"):
        list(read_records([tmp_path / "a.parquet"]))


@pytest.mark.parametrize("change", ["truncated", "rewritten"])
def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path, table, monkeypatch, change):
    monkeypatch.setattr(base, "CHUNK_BYTES", 10_000)
    for name in ("a.parquet", "b.arrow"):
        path = tmp_path / name
        parquet.write_table(table, path, row_group_size=100)
        if name == "b.arrow":
            with ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=100)
        records = read_records([path])
        next(records)
        if change == "truncated":
            os.truncate(path, 5000)
        else:
            path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(ConfigurationError, match=f"--input {path}: (is damaged|changed while it was read)"):
            raise next(record for record in records if isinstance(record, BadRecord))


@pytest.mark.parametrize(
    "flags",
    [
        {"input": ("data/train.json",), "output_dir": "data"},
        {"input": ("data/*",), "txt": True, "output_dir": "data"},
        {"input": ("data/x_text_document.json",), "output_dir": None, "output_prefix": "data/x"},
        {"input": ("data/.partial/text.jsonl",), "output_dir": "data"},
    ],
)
def test_a_run_does_not_overwrite_its_input(tmp_path, monkeypatch, refused, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / ".partial").mkdir(parents=True)
    for name in ("train.json", "x_text_document.json", ".partial/text.jsonl"):
        (tmp_path / "data" / name).write_text(LINES)
    flags = flags | ({"output_dir": Path(flags["output_dir"])} if flags["output_dir"] else {})
    with refused("--input data/", "would be overwritten", "write elsewhere"):
        preprocess(options(**{"folder": None} | flags))
    assert (tmp_path / "data" / "train.json").read_text() == LINES


def test_links_do_not_multiply_a_folder(tmp_path, refused):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "x"}')
    os.symlink(".", tmp_path / "data" / "loop")
    os.symlink("a.jsonl", tmp_path / "data" / "b.jsonl")
    for path in (f"{tmp_path}/data", f"{tmp_path}/data/**/*.jsonl"):
        assert len(list_sources([path])) == 1
    with refused("a second time; leave one out"):
        list_sources([f"{tmp_path}/data/a.jsonl", f"{tmp_path}/data/../data/a.jsonl"])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_documents_that_cannot_be_encoded_are_bad_records(tmp_path, refused, on_error):
    lines = [json.dumps({"text": f"{number} 7"}) for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = {"tokenizer_type": "NullTokenizer", "vocab_size": 50, "on_error": on_error}
    requested = options(tmp_path / "out", input=(str(tmp_path / "a.jsonl"),), **flags)
    if on_error == "stop":
        with refused("'5", "0 to 49", f"(in {tmp_path / 'a.jsonl'}:5"):
            preprocess(requested)
        return
    summary = preprocess(requested)
    assert summary["skipped"] == {"cannot be encoded": 10}
    assert sum(size["documents"] for size in summary["splits"].values()) == 50
    before = token_files(tmp_path / "out")
    assert preprocess(requested) == summary and token_files(tmp_path / "out") == before


@pytest.mark.parametrize("prefix", ["x/", "..", "a/.", "x/.."])
def test_a_prefix_without_a_name_is_refused(refused, prefix):
    with refused(f"--output-prefix {prefix}", "no name for the files", "append one"):
        options(None, output_dir=None, output_prefix=prefix)
