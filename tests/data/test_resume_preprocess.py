"""Preprocessing in several processes, killed and resumed, and under Megatron's command line: always the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron.data import preprocess as preparing
from megatron.data import preprocess_options, staging
from megatron.data import publish as publishing
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.preprocess import is_resumable, preprocess, resume_note
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.sources import base
from megatron.data.staging import StagedOutputs, only_writer
from megatron.data.tokenise import ChunkTokeniser, Documents
from megatron.data.tokenizer import HFTokenizer, train_tokenizer
from megatron.errors import ConfigurationError
from tests.conftest import ROOT, environment

SETTINGS = "from megatron.data import preprocess, preprocess_options; from megatron.data.sources import base"
SETTINGS += "; preprocess.RECORD_SECONDS, preprocess.RECORD_SHARE = 0, 0; base.CHUNK_BYTES = {chunk}"
SETTINGS += "; preprocess_options.BYTES_PER_WORKER = 1"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Real text: modules of the standard library in documents of some 1,000 characters, 0.6 MB."""
    folder = Path(os.__file__).parent
    files = [path.read_text() for path in sorted(folder.glob("[a-c]*.py"))]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [file[start : start + 1000] for file in files for start in range(0, len(file), 1000)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, text) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([json.loads(line)["text"] for line in text.open()], 600, path)
    return path


def options(text, folder, **changes) -> PreprocessOptions:
    flags = {"output_dir": folder, "input": (str(text),), "tokenizer_type": "ByteTokenizer", "workers": 1}
    return PreprocessOptions(**flags | changes)


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small_chunks(monkeypatch, size=20_000) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", size)
    monkeypatch.setattr(preprocess_options, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(preparing, "RECORD_SECONDS", 0)
    monkeypatch.setattr(preparing, "RECORD_SHARE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes most of the time of so many small records


def test_any_number_of_workers_gives_the_same_bytes(text, tokenizer, tmp_path, monkeypatch):
    small_chunks(monkeypatch, 60_000)
    flags = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tokenizer)}
    for workers in (1, 2, 7):
        preprocess(options(text, tmp_path / f"{workers}", workers=workers, **flags))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")
    trained = {"tokenizer_type": "HFTokenizer", "train_tokenizer": 400}
    for workers in (1, 2):
        preprocess(options(text, tmp_path / f"trained {workers}", workers=workers, **trained))
    assert contents(tmp_path / "trained 1") == contents(tmp_path / "trained 2")


def test_a_run_that_stopped_at_a_bad_record_goes_on_without_it(text, tmp_path, monkeypatch):
    small_chunks(monkeypatch)
    own, compute, calls = tmp_path / "own.jsonl", ChunkTokeniser.__call__, []
    lines = text.read_bytes().splitlines(keepends=True)
    own.write_bytes(b"".join([*lines[:300], b"{\n", *lines[300:]]))
    with pytest.raises(ConfigurationError, match=f"--input {own}: line 301 is not JSON") as caught:
        preprocess(options(own, tmp_path / "data"))
    note = f"; progress is recorded in {tmp_path / 'data' / '.partial'}, and the same command with --on-error skip "
    assert resume_note(options(own, tmp_path / "data"), caught.value) == f"{note}resumes there"
    assert resume_note(options(text, tmp_path / "data"), caught.value) == ""  # of other text
    monkeypatch.setattr(ChunkTokeniser, "__call__", lambda self, task: calls.append(task) or compute(self, task))
    assert preprocess(options(own, tmp_path / "data", on_error="skip"))["skipped"] == {"not JSON": 1}
    assert calls[0].chunk.first > 250
    preprocess(options(text, tmp_path / "whole"))
    assert (tmp_path / "data" / "train.bin").read_bytes() == (tmp_path / "whole" / "train.bin").read_bytes()


@pytest.mark.parametrize("moment", ["write_index", "_describe", "_move"])
def test_a_run_that_ends_after_the_last_chunk_resumes(text, tmp_path, monkeypatch, moment):
    """Such as on a disk that has room for the tokens, and not for the index."""
    small_chunks(monkeypatch)
    preprocess(options(text, tmp_path / "whole"))
    module = staging if moment == "write_index" else publishing

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(module, moment, fail)
        preprocess(options(text, tmp_path / "data"))
    assert resume_note(options(text, tmp_path / "data")).endswith(".partial, and the same command resumes there")
    assert resume_note(options(text, tmp_path / "whole")) == ""
    monkeypatch.setattr(ChunkTokeniser, "__call__", None)  # nothing is tokenised again
    preprocess(options(text, tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


class Interrupt(Exception):
    """Stands for a signal at a known place."""


@pytest.mark.parametrize("after", [1, 2, 20])
def test_an_interrupted_run_resumes_without_tokenising_again(text, tokenizer, tmp_path, monkeypatch, after):
    small_chunks(monkeypatch)
    flags = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tokenizer)}
    preprocess(options(text, tmp_path / "whole", **flags))
    computed = []
    compute = ChunkTokeniser.__call__

    def interrupted(self, task):
        computed.append(task.chunk.first)
        if len(computed) == after:
            raise Interrupt
        return compute(self, task)

    monkeypatch.setattr(ChunkTokeniser, "__call__", interrupted)
    with pytest.raises(Interrupt):
        preprocess(options(text, tmp_path / "data", **flags))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ([".partial"] if after > 1 else [])
    assert is_resumable(tmp_path / "data" / ".partial") == (after > 1)
    # after the record, before a kill: more was written than recorded
    for name in ("train.bin", "train.sizes") if after > 1 else ():
        with open(tmp_path / "data" / ".partial" / name, "ab") as file:
            file.write(bytes(1000))
    preprocess(options(text, tmp_path / "data", **flags))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert len(computed) == len(set(computed)) + 1  # the chunk of the interruption alone was computed again


def test_a_record_of_progress_fits_files_that_were_cut_and_did_not_grow(tmp_path):
    """Else the next interruption loses everything: a record of more than the files hold is not used."""
    names, dtype = {"train": "train", "tuning": "tuning"}, np.dtype(np.uint16)
    for lengths in ({}, {"train": (1, 3), "tuning": (1, 3)}, {"train": (1, 3), "tuning": (0, 0)}):
        with StagedOutputs(tmp_path, names, dtype, lengths) as outputs:
            assert outputs.to_disk() == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
            for name in names if not lengths else ():
                for _ in range(2):
                    outputs.add(name, Documents(np.arange(3, dtype=dtype), np.array([3], np.int32), b"", 3, {}))


@pytest.mark.parametrize("change", ["text", "splits", "key", "errors", "progress", "shorter", "missing"])
def test_progress_of_other_text_or_flags_is_not_used(text, tmp_path, monkeypatch, change):
    small_chunks(monkeypatch)
    own = tmp_path / "own.jsonl"
    own.write_bytes(text.read_bytes().replace(b'{"text"', b'{"other": "x", "text"'))
    compute, calls = ChunkTokeniser.__call__, []

    def interrupted(self, task):
        calls.append(task)
        if len(calls) == 10:
            raise Interrupt
        return compute(self, task)

    monkeypatch.setattr(ChunkTokeniser, "__call__", interrupted)
    with pytest.raises(Interrupt):
        preprocess(options(own, tmp_path / "data", on_error="skip" if change == "errors" else "stop"))
    flags, stage = {}, tmp_path / "data" / ".partial"
    if change == "text":
        own.write_bytes(own.read_bytes().replace(b"import", b"IMPORT"))
    elif change in ("splits", "key"):
        flags = {"splits": (50, 25, 25)} if change == "splits" else {"json_keys": ("other",), "splits": (1, 0, 0)}
    elif change == "progress":
        (stage / "progress.json").write_bytes((stage / "progress.json").read_bytes()[:-20])
    elif change == "shorter":
        os.truncate(stage / "tuning.sizes", 8)
    elif change == "missing":
        (stage / "train.bin").unlink()
    calls.clear()
    monkeypatch.setattr(ChunkTokeniser, "__call__", lambda self, task: calls.append(task) or compute(self, task))
    preprocess(options(own, tmp_path / "data", **flags))
    assert len(calls) > 10 and calls[0].chunk.first == 1  # from the beginning
    preprocess(options(own, tmp_path / "fresh", **flags))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def program(chunk: int, *flags) -> list[str]:
    """Return the command that runs the tool with a record of progress after every small chunk, in two workers."""
    start = f"sys.argv = {[str(ROOT / 'tools/preprocess_data.py'), *map(str, flags)]}"
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", f"{SETTINGS.format(chunk=chunk)}; import runpy, sys; {start}; {run}"]


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_the_same_bytes(text, tokenizer, tmp_path):
    large = tmp_path / "large.jsonl"
    large.write_bytes(text.read_bytes() * 100)
    draw = random.Random(0)
    flags = ["--input", large, "--tokenizer-model", tokenizer, "--workers", 2]
    subprocess.run(program(1 << 18, "--output-dir", tmp_path / "whole", *flags), env=environment(), check=True)
    kills, positions = 0, []
    while kills < 10:
        command = program(1 << 18, "--output-dir", tmp_path / "data", *flags)
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
        progress = tmp_path / "data" / ".partial" / "progress.json"
        before, deadline = progress.stat().st_mtime_ns if progress.exists() else 0, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if progress.exists() and progress.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(draw.random() * 0.5)
        assert process.poll() is None, "finished before it was killed: enlarge the text"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        positions.append(json.loads(progress.read_bytes())["position"])
        kills += 1
    assert positions == sorted(positions) and len({*map(tuple, positions)}) > 5
    subprocess.run(program(1 << 18, "--output-dir", tmp_path / "data", *flags), env=environment(), check=True)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.fixture
def running(text, tmp_path):
    """The tool in two workers on 30 MB with its worker processes, after progress was recorded; killed at the end."""
    large = tmp_path / "large.jsonl"
    large.write_bytes(text.read_bytes() * 50)
    flags = ["--input", large, "--tokenizer-type", "ByteTokenizer", "--workers", 2, "--output-dir", tmp_path / "data"]
    command = program(20_000, *flags)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "data" / ".partial" / "progress.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        workers = _workers(process)
        assert len(workers) == 2
        yield process, workers
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_workers_end_with_a_killed_parent(running):
    process, workers = running
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "signal_number, victim, code, message",
    [
        (signal.SIGKILL, "worker", 2, "--workers 2: a worker process was killed"),
        pytest.param(signal.SIGINT, "parent", 130, "interrupted", marks=pytest.mark.slow),
        (signal.SIGINT, "group", 130, "interrupted"),
        (signal.SIGTERM, "parent", 143, "interrupted"),
        pytest.param(signal.SIGTERM, "group", 143, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_early_says_how_to_go_on(running, tmp_path, signal_number, victim, code, message):
    process, workers = running
    if victim == "group":
        os.killpg(process.pid, signal_number)
    else:
        os.kill(int(workers[0]) if victim == "worker" else process.pid, signal_number)
    errors = process.communicate(timeout=60)[1]
    note = f"; progress is recorded in {tmp_path / 'data' / '.partial'}, and the same command resumes there\n"
    assert process.returncode == code and errors.endswith(note), errors
    error = errors.splitlines()[-1]  # and no line of a worker or of multiprocessing's resource_tracker follows
    assert error.startswith(f"error: {message}") and "Traceback" not in errors and "resource_tracker" not in errors
    assert is_resumable(tmp_path / "data" / ".partial") and not (tmp_path / "data" / "corpus.json").exists()


def test_workers_that_start_while_a_run_is_interrupted_end_in_silence(text, tmp_path):
    """They read the tokenizer that the run has trained, which it removes at its end."""
    flags = ["--input", text, "--train-tokenizer", 300, "--workers", 2, "--output-dir", tmp_path / "data"]
    command = program(20_000, *flags)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not _workers(process):
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "error: interrupted; nothing was changed\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_writer_of_a_prefix_waits_and_another_prefix_does_not(text, tmp_path):
    def start(prefix):
        flags = ["--input", text, "--tokenizer-type", "ByteTokenizer", "--output-prefix", tmp_path / prefix]
        command = [sys.executable, ROOT / "tools/preprocess_data.py", *flags]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with only_writer(tmp_path / ".a.partial", "test"):
        other, same = start("b"), start("a")
        assert "text: " in other.communicate(timeout=60)[0]
        assert "another process writes to it; waiting" in same.stderr.readline()
        assert same.poll() is None
    assert "text: " in same.communicate(timeout=60)[0]
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["a_text_document.bin", "b_text_document.bin"]


def _workers(process: subprocess.Popen) -> list[str]:
    """Return the process ids of the workers of the tool."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def megatron_tokens(text: Path, tokenizer: HFTokenizer) -> list[list[int]]:
    """Return what Megatron's preprocess_data.py writes with --append-eod, document by document."""
    documents = [json.loads(line)["text"] for line in text.open()]
    return [[*tokenizer.encode(document), tokenizer.eod] for document in documents]


@pytest.mark.parametrize(
    "flags",
    [
        "--output-prefix OUT/x --append-eod --workers 2 --partitions 4 --dataset-impl mmap --json-keys text",
        "--output-prefix x --root OUT --append-eod --workers 64 --log-interval 10 --seq-length 1024 --keep-newlines",
    ],
    ids=["Megatron-LM", "published"],
)
def test_megatrons_command_line(text, tokenizer, tmp_path, flags):
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--tokenizer-type", "HFTokenizer"]
    words = flags.replace("OUT", str(tmp_path)).split()
    done = subprocess.run([*command, "--tokenizer-model", tokenizer, *words], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    dataset, expected = IndexedDataset(str(tmp_path / "x_text_document")), megatron_tokens(text, HFTokenizer(tokenizer))
    assert [dataset[number].tolist() for number in range(len(dataset))] == expected
    index = (tmp_path / "x_text_document.idx").read_bytes()  # the format, written out: version, uint16, N, N + 1
    count = len(expected)
    sizes = np.array([*map(len, expected)], np.int64)
    assert (
        index[:34]
        == b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08" + np.array([count, count + 1], "<u8").tobytes()
    )
    assert np.array_equal(np.frombuffer(index, "<i4", count, 34), sizes)
    assert np.array_equal(np.frombuffer(index, "<i8", count, 34 + 4 * count), (np.cumsum(sizes) - sizes) * 2)
    assert np.array_equal(np.frombuffer(index, "<i8", count + 1, 34 + 12 * count), np.arange(count + 1))
    metadata = read_metadata(tmp_path / "x_text_document")
    assert metadata["tokenizer_model"] == "x_tokenizer.json" and (tmp_path / "x_tokenizer.json").exists()


def test_without_append_eod_no_document_ends_with_it(text, tokenizer, tmp_path):
    flags = {"output_dir": None, "output_prefix": str(tmp_path / "x"), "tokenizer_type": "HFTokenizer"}
    preprocess(options(text, None, tokenizer_model=str(tokenizer), **flags))
    dataset, expected = IndexedDataset(str(tmp_path / "x_text_document")), megatron_tokens(text, HFTokenizer(tokenizer))
    assert dataset.total_tokens == sum(map(len, expected)) - len(expected)
    assert dataset[0].tolist() == expected[0][:-1]


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--split-sentences", ["--split-sentences: cuts documents for BERT's objective", "leave it out"]),
        ("--dataset-impl lazy", ["--dataset-impl lazy: only mmap is written"]),
        ("--append-bos", ["--append-bos: documents only end with a token"]),
        ("--partition 2", ["unknown flag --partition"]),
    ],
)
def test_flags_of_megatron_that_are_refused(text, tmp_path, flags, parts):
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--output-prefix", tmp_path / "x"]
    done = subprocess.run([*command, *flags.split()], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
    assert done.stderr.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_a_tokenizer_by_its_name_on_the_hub_or_in_a_folder(text, tokenizer, tmp_path):
    """The name is looked up in the hub's cache here, as on a node without network."""
    snapshot = tmp_path / "cache" / "models--someone--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    variables = environment() | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    outputs = []
    for number, name in enumerate(("someone/name", snapshot, tokenizer, "someone/other")):
        command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--tokenizer-model", name]
        command += ["--output-dir", tmp_path / f"{number}", "--workers", "1"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        outputs.append((tmp_path / f"{number}" / "train.bin").read_bytes() if done.returncode == 0 else done.stderr)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[3].startswith("error: --tokenizer-model someone/other: no such file, and the hub") and (
        outputs[3].count("\n") == 1
    )
