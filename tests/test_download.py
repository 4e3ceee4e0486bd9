"""download.sh against a local server that serves small replacement files, with faults on request."""

import codecs
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from megatron.config.subsets import UNIQUE_TOKENS
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.paths import read_path_file
from megatron.data.tokenizer import END, GPT2BPETokenizer, train_tokenizer
from tests.conftest import ROOT

VOCAB, MERGES = "gpt2-vocab.json", "gpt2-merges.txt"
TRAIN, VALID = "gpt2tok_c4_100_text_document", "gpt2tok_c4_val_text_document"
NAMES = [VOCAB, MERGES, f"{TRAIN}.idx", f"{TRAIN}.bin", f"{VALID}.idx", f"{VALID}.bin"]
LISTS = {f"{TRAIN}.bin": "train_c4_100m.txt", f"{VALID}.bin": "val_c4.txt"}
DOCUMENTS = [np.arange(size) % 270 for size in (20_000, 5, 10_000)]


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The bytes of every published file: a small byte-level BPE in GPT-2's format and two data sets."""
    folder = tmp_path_factory.mktemp("published")
    train_tokenizer(["the cat sat on the mat, the end of the matter " * 20], 270, folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted((token for token in model["vocab"] if token != END), key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / VOCAB).write_text(json.dumps({token: index for index, token in enumerate([*tokens, END])}))
    (folder / MERGES).write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for name, documents in ((TRAIN, DOCUMENTS), (VALID, DOCUMENTS[1:])):
        with IndexedDatasetWriter(folder / name, 270) as writer:
            for document in documents:
                writer.add_document(document)
    return {name: (folder / name).read_bytes() for name in NAMES}


class Handler(BaseHTTPRequestHandler):
    """Serves the files of the server and injects its faults."""

    def do_GET(self):
        server, name = self.server, self.path[1:]
        byte_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        server.requests.append((name, int(byte_range[1]) if byte_range else None))
        status = server.answers.pop(0) if server.answers else 200
        if status != 200 or name not in server.files:
            self.send_error(404 if status == 200 else status)
            return
        body = server.files[name]
        start = int(byte_range[1]) if byte_range and server.ranges else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = server.cuts.pop(name, None)
        self.wfile.write(body[start:cut])
        if cut is not None:
            self.wfile.flush()
            server.resume.wait(30)  # the connection stalls until `resume` is set, then breaks off

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(published):
    """Serves `files`. `answers`: the next statuses; `cuts`: file -> bytes after which its next response breaks off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.ranges, server.requests, server.answers, server.cuts = dict(published), True, [], [], {}
    server.resume = threading.Event()
    server.resume.set()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.resume.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def clone(tmp_path, published, server):
    """A folder with download.sh, and a manifest of the replacement files with the columns of the built-in table."""
    shutil.copy(ROOT / "download.sh", tmp_path)
    lines = []
    for name in NAMES:
        size = "-" if name == f"{VALID}.bin" else len(published[name])
        sha256 = hashlib.sha256(published[name]).hexdigest() if name in (VOCAB, MERGES) else "-"
        lines.append(f"{name} {server.url}/{name} {size} {sha256} {LISTS.get(name, '')}")
    (tmp_path / "manifest").write_text("# replacements\n\n" + "\n".join(lines) + "\n")
    return tmp_path


def environment(clone, **more) -> dict:
    inherited = {name: value for name, value in os.environ.items() if name not in ("DRY_RUN", "GPT2_URL", "C4_URL")}
    return inherited | {"MANIFEST": str(clone / "manifest"), "no_proxy": "*"} | more


def download(clone, *flags, **more):
    command = ["bash", str(clone / "download.sh"), *flags]
    return subprocess.run(command, env=environment(clone, **more), capture_output=True, text=True, timeout=60)


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def assert_complete(clone, published):
    assert {path.name for path in (clone / "data").iterdir()} == {*NAMES, *LISTS.values()}
    for name in NAMES:
        assert (clone / "data" / name).read_bytes() == published[name], name


def test_downloaded_files_are_readable_data_and_tokenizer(clone, published):
    result = download(clone)
    assert (result.returncode, result.stderr) == (0, "")
    assert_complete(clone, published)
    tokenizer = GPT2BPETokenizer(str(clone / "data" / VOCAB), str(clone / "data" / MERGES))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat" and tokenizer.vocabulary_size == 270
    train, valid = (IndexedDataset(clone / "data" / name, 270) for name in (TRAIN, VALID))
    assert [list(train[index]) for index in range(len(train))] == [list(document) for document in DOCUMENTS]
    assert valid.total_tokens == 10_005
    assert (clone / "data" / "train_c4_100m.txt").read_text() == f"1.0 data/{TRAIN}\n"
    assert (clone / "data" / "val_c4.txt").read_text() == f"1.0 data/{VALID}\n"


def test_nothing_is_fetched_twice(clone, server):
    download(clone)
    server.requests.clear()
    result = download(clone)
    assert (result.returncode, result.stderr, server.requests) == (0, "", [])
    assert result.stdout.splitlines() == [f"data/{name}: complete" for name in NAMES]


@pytest.mark.slow
def test_another_folder(clone, published):
    assert download(clone, "--dir", str(clone / "else where")).returncode == 0
    assert not (clone / "data").exists() and (clone / "else where" / VOCAB).read_bytes() == published[VOCAB]
    words = read_path_file(clone / "else where" / "val_c4.txt", "--valid-data-path-file")
    assert words == ["1.0", f"{clone}/else where/{VALID}"]


RANGES = pytest.mark.parametrize(
    "ranges",
    [
        pytest.param(True, id="resumed"),
        pytest.param(False, id="from the start where the server ignores ranges", marks=pytest.mark.slow),
    ],
)


@RANGES
def test_a_partial_file_is_resumed(clone, server, published, ranges):
    server.ranges = ranges
    (clone / "data").mkdir()
    for name in (VOCAB, f"{TRAIN}.bin"):
        (clone / "data" / f"{name}.partial").write_bytes(published[name][:1000])
    result = download(clone)
    assert result.returncode == 0 and f"{server.url}/{VOCAB}, resumed" in result.stdout
    assert_complete(clone, published)
    starts = [start for name, start in server.requests if name == f"{TRAIN}.bin"]
    assert starts == ([1000] if ranges else [1000, None])


@pytest.mark.parametrize(
    "partial", [b"x" * 100, pytest.param(b"x" * 1_000_000, marks=pytest.mark.slow)], ids=["foreign", "longer"]
)
@RANGES
def test_a_partial_file_of_something_else_is_fetched_again(clone, server, published, partial, ranges):
    server.ranges = ranges
    (clone / "data").mkdir()
    (clone / "data" / f"{VOCAB}.partial").write_bytes(partial)
    assert download(clone).returncode == 0
    assert_complete(clone, published)
    assert [start for name, start in server.requests if name == VOCAB] == [len(partial), None]


@pytest.mark.slow
def test_a_complete_partial_file_is_renamed(clone, server, published):
    (clone / "data").mkdir()
    (clone / "data" / f"{VOCAB}.partial").write_bytes(published[VOCAB])
    assert download(clone).returncode == 0
    assert_complete(clone, published)


@RANGES
def test_a_response_that_breaks_off_is_resumed(clone, server, published, ranges):
    server.ranges, server.cuts = ranges, {f"{TRAIN}.bin": 30_000}
    assert download(clone).returncode == 0
    assert_complete(clone, published)
    starts = [start for name, start in server.requests if name == f"{TRAIN}.bin"]
    assert starts == ([None, 30_000] if ranges else [None, 30_000, None])


def test_a_busy_server_is_retried(clone, server, published):
    server.answers = [503, 200]
    assert download(clone).returncode == 0
    assert_complete(clone, published)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (VOCAB, lambda body: body.replace(b"t", b"x", 1), r"has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        pytest.param(MERGES, lambda body: body[:-5], r"has \d+ bytes, expected \d+", marks=pytest.mark.slow),
        (f"{VALID}.bin", lambda body: body[:-10], "has 20000 bytes, and its .idx gives 20010"),
        pytest.param(
            f"{VALID}.bin", lambda body: body + b"x", "has 20011 bytes, and its .idx gives", marks=pytest.mark.slow
        ),
        pytest.param(
            f"{VALID}.idx", lambda body: b"<html>".ljust(len(body)), "is not a valid M", marks=pytest.mark.slow
        ),
        # sizes and offsets of the documents contradict each other
        (f"{VALID}.idx", lambda body: body[:34] + b"\7" + body[35:], "is not a valid Megatron index"),
    ],
)
def test_a_wrong_file_is_removed_and_named(clone, server, published, name, change, message):
    server.files[name] = change(published[name])
    result = download(clone)
    error = errors(result)[0]
    assert result.returncode == 1 and error.startswith(f"error: data/{name}: ") and re.search(message, error)
    assert "it was removed: run this again" in error and f"{server.url}/{name} is not the published file" in error
    assert not list((clone / "data").glob(f"{name}*"))


def test_a_bin_with_another_index_than_its_own_is_refused(clone, server, published):
    server.files[f"{TRAIN}.bin"] = published[f"{TRAIN}.bin"][:-2]
    manifest = clone / "manifest"
    manifest.write_text(manifest.read_text().replace(" 60010 - train", " 60008 - train"))
    result = download(clone)
    assert result.returncode == 1 and "has 60008 bytes, and its .idx gives 60010" in errors(result)[0]
    assert not (clone / "data" / "train_c4_100m.txt").exists() and (clone / "data" / "val_c4.txt").exists()


def test_a_wrong_file_that_existed_before_is_left_alone(clone, server):
    (clone / "data").mkdir()
    (clone / "data" / VOCAB).write_text("{}")
    result = download(clone)
    assert result.returncode == 1 and len(errors(result)) == 1
    assert re.search(rf"data/{VOCAB}: has 2 bytes, expected \d+; .* remove it and run this again", errors(result)[0])
    assert (clone / "data" / VOCAB).read_text() == "{}" and VOCAB not in dict(server.requests)


def test_a_missing_file_does_not_stop_the_others(clone, server):
    del server.files[MERGES], server.files[f"{TRAIN}.idx"]
    result = download(clone)
    assert result.returncode == 1
    assert [line.split(": ")[1] for line in errors(result)] == [f"data/{name}" for name in NAMES[1:4]]
    assert f"{server.url}/{MERGES}: The requested URL returned error: 404" in errors(result)[0]
    assert f"needs a valid data/{TRAIN}.idx first" in errors(result)[2]
    assert {path.name for path in (clone / "data").iterdir()} == {VOCAB, *NAMES[4:], "val_c4.txt"}
    assert len([name for name, _ in server.requests if name == MERGES]) == 1  # a 404 is not retried


def test_a_server_that_cannot_be_reached(clone):
    with socket.socket() as closed:  # bound but not listening, so no other process can take the port
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        manifest = clone / "manifest"
        manifest.write_text(re.sub(r"http://[^/]*", address, manifest.read_text()))
        result = download(clone)
    assert result.returncode == 1 and len(errors(result)) == len(NAMES) and not list((clone / "data").iterdir())
    assert f"error: data/{VOCAB}: {address}/{VOCAB}: Failed to connect" in errors(result)[0]
    assert "on another machine (DRY_RUN=1 prints names and URLs)" in result.stderr.splitlines()[-1]


def test_a_full_disk_leaves_a_partial_file_that_resumes(clone, server, published):
    result = subprocess.run(
        ["bash", clone / "download.sh"],
        env=environment(clone),
        capture_output=True,
        text=True,
        restore_signals=False,  # Python ignores SIGXFSZ, so a write fails as on a full disk
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert (
        result.returncode == 1 and len(errors(result)) == 1 and f"data/{TRAIN}.bin: {server.url}" in errors(result)[0]
    )
    assert 0 < (clone / "data" / f"{TRAIN}.bin.partial").stat().st_size <= 40_000
    assert not (clone / "data" / f"{TRAIN}.bin").exists()
    assert download(clone).returncode == 0
    assert_complete(clone, published)
    assert server.requests[-1][1] > 0


def test_an_interrupted_run_leaves_a_partial_file_that_resumes(clone, server, published):
    server.cuts = {f"{TRAIN}.bin": 30_000}
    server.resume.clear()
    process = subprocess.Popen(
        ["bash", clone / "download.sh"],
        env=environment(clone),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    partial = clone / "data" / f"{TRAIN}.bin.partial"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends for Ctrl-C
    assert process.wait(20) in (130, -signal.SIGINT)
    server.resume.set()
    assert partial.stat().st_size and not (clone / "data" / f"{TRAIN}.bin").exists()
    assert f"{VALID}.idx" not in dict(server.requests)  # the next file was not requested
    assert download(clone).returncode == 0
    assert_complete(clone, published)


@pytest.mark.slow
def test_a_terminal_sees_a_progress_bar(clone):
    master, slave = pty.openpty()
    result = subprocess.run(
        ["bash", clone / "download.sh"], env=environment(clone), stdout=subprocess.PIPE, stderr=slave
    )
    os.close(slave)
    assert result.returncode == 0 and b"#" in os.read(master, 100_000)
    os.close(master)


@pytest.mark.parametrize(
    "flags, more, message",
    [
        (["--fast"], {}, "download.sh --fast: unknown flag; --help lists them"),
        (["--dir"], {}, "download.sh --dir: needs a folder"),
        ([], {"MANIFEST": "nowhere"}, "MANIFEST=nowhere: cannot be read"),
        ([], {"MANIFEST": "download.sh"}, "--help has the form of a line"),
    ],
)
def test_a_mistake_is_reported_in_one_line(clone, server, flags, more, message):
    result = download(clone, *flags, **more)
    assert (result.returncode, len(errors(result)), len(result.stderr.splitlines())) == (
        2,
        1,
        1,
    ) and message in result.stderr
    assert not server.requests and not (clone / "data").exists()


def test_a_manifest_with_windows_line_endings_is_read(clone):
    before = download(clone, DRY_RUN="1").stdout
    table = (clone / "manifest").read_bytes().removeprefix(b"# replacements\n\n")
    (clone / "manifest").write_bytes(codecs.BOM_UTF8 + table.replace(b"\n", b"\r\n"))
    assert download(clone, DRY_RUN="1").stdout == before != ""
    assert download(clone).returncode == 0 and {*LISTS.values()} <= {path.name for path in (clone / "data").iterdir()}


@pytest.mark.parametrize("missing", ["curl", "python3", "sha256sum"])
def test_a_missing_tool_is_reported_in_one_line(clone, missing):
    tools = clone / "tools"
    tools.mkdir()
    for tool in {"bash", "dirname", "curl", "python3", "sha256sum"} - {missing}:
        (tools / tool).symlink_to(shutil.which(tool))
    result = download(clone, PATH=str(tools))
    assert (result.returncode, result.stderr) == (2, f"error: {missing}: not found; install it and run this again\n")


def test_help_teaches(clone):
    result = download(clone, "--help")
    assert result.returncode == 0 and result.stderr == "" and not (clone / "data").exists()
    for word in ("--dir DIR", "DRY_RUN=1", "GPT2_URL", "C4_URL", "MANIFEST=FILE", "Exit codes"):
        assert word in result.stdout


def dry_run_table(clone, **more) -> dict:
    """Return file -> (address, size) that DRY_RUN=1 prints for the built-in table."""
    result = download(clone, DRY_RUN="1", MANIFEST="", **more)
    assert (result.returncode, result.stderr) == (0, "") and not (clone / "data").exists()
    lines = [
        re.fullmatch(r"would download data/(\S+) \((\S+) bytes\) from (\S+)", line)
        for line in result.stdout.splitlines()
    ]
    return {line[1]: (line[3], line[2]) for line in lines}


def test_the_built_in_table_is_consistent_and_dry_run_prints_it(clone, server):
    table = dry_run_table(clone)
    num_tokens = UNIQUE_TOKENS["100M"]
    num_documents = {TRAIN: 208_931, VALID: 364_608}
    assert list(table) == NAMES and not server.requests
    assert table[f"{TRAIN}.bin"][1] == str(2 * num_tokens) and table[f"{VALID}.bin"][1] == "unknown"
    for name, count in num_documents.items():
        assert table[f"{name}.idx"][1] == str(34 + 4 * count + 8 * count + 8 * (count + 1))
    assert (table[VOCAB][1], table[MERGES][1]) == ("1042301", "456318")
    huggingface = "https://huggingface.co"
    assert table[VOCAB][0] == f"{huggingface}/openai-community/gpt2/resolve/main/vocab.json"
    assert table[f"{VALID}.bin"][0] == (
        f"{huggingface}/datasets/ZahlenReal/diffusion_data_constraint_quickstart/resolve/main/{VALID}.bin"
    )


def test_mirrors_replace_the_addresses(clone):
    table = dry_run_table(clone, GPT2_URL="http://mirror/a", C4_URL="http://mirror/b")
    assert [address for address, _ in table.values()] == [
        *["http://mirror/a/vocab.json", "http://mirror/a/merges.txt"],
        *[f"http://mirror/b/{name}" for name in NAMES[2:]],
    ]


def test_dry_run_leaves_out_existing_files(clone, published):
    (clone / "data").mkdir()
    for name in NAMES[1:]:
        (clone / "data" / name).write_bytes(published[name])
    result = download(clone, DRY_RUN="1")
    assert result.returncode == 0 and [line.split()[2] for line in result.stdout.splitlines()] == [f"data/{VOCAB}"]
