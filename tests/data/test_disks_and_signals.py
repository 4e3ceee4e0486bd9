"""The data tools on a read-only disk, with a line of 2 GB, and stopped while they import their libraries."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from tests.conftest import ROOT, environment

LINES = '{"text": "first"}\n', '{"text": "last"}\n'
LONG_LINE = 2 << 30  # bytes


def command(tool: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def preprocessing(*arguments) -> list[str]:
    flags = ["--tokenizer-type", "ByteTokenizer", "--splits", 1, 0, 0]
    return command("preprocess_data.py", *arguments, *flags)


@pytest.fixture
def read_only(tmp_path):
    """Return a function that runs a command while the folder `mounted` is on a read-only disk."""
    folder = tmp_path / "mounted"
    (folder / "old" / ".partial").mkdir(parents=True)  # of an interrupted run
    (folder / "old" / ".partial" / "train.bin").write_bytes(b"12")
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec"
    probe = subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine permits no mounts in a user namespace: {probe.stderr.strip()}")

    def run(words: list[str]) -> subprocess.CompletedProcess:
        shell = ["unshare", "-rm", "sh", "-c", f'{mount} "$@"', "sh", *words]
        return subprocess.run(shell, capture_output=True, text=True, env=environment())

    return run


def test_a_read_only_disk_is_one_line_and_changes_nothing(read_only, tmp_path):
    disk, text, data = tmp_path / "mounted", tmp_path / "text.jsonl", tmp_path / "data"
    text.write_text("".join(LINES))
    with IndexedDatasetWriter(data, 100) as writer:
        for ids in ([1, 2], [1, 2], [3]):
            writer.add_document(ids)
    before = sorted(disk.rglob("*"))
    commands = {
        f"--output-dir {disk}/new": preprocessing("--input", text, "--output-dir", disk / "new"),
        f"--output-dir {disk}/old": preprocessing("--input", text, "--output-dir", disk / "old"),
        f"--output-prefix {disk}/a": command("merge_datasets.py", "--input", data, "--output-prefix", disk / "a"),
        f"--output-prefix {disk}/b": command(
            "inspect_dataset.py", data, "--exact-duplicates", "--remove", "--output-prefix", disk / "b"
        ),
    }
    for flag, words in commands.items():
        done = read_only(words)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: {flag}: cannot be "), done.stderr
        assert "(Read-only file system); " in done.stderr
    assert sorted(disk.rglob("*")) == before


def test_input_on_a_read_only_disk_is_read(read_only, tmp_path):
    (tmp_path / "mounted" / "text.jsonl").write_text("".join(LINES))
    done = read_only(preprocessing("--input", tmp_path / "mounted", "--output-dir", tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert len(IndexedDataset(str(tmp_path / "data" / "train"))) == 2


def test_an_error_is_one_line_with_any_name_of_a_file(tmp_path):
    missing = tmp_path / "first\nsecond"
    done = subprocess.run(
        command("merge_datasets.py", "--input", missing, "--output-prefix", tmp_path / "a"),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and r"first\nsecond" in done.stderr, done.stderr


# from a small process, since the peak of a process includes that of the one that starts it
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_line_of_two_gigabytes_takes_bounded_memory(tmp_path, kind):
    path, output = tmp_path / f"text.{kind}", tmp_path / "data"
    with open(path, "wb") as file:
        file.write(f"{LINES[0]}\n".encode())
        for _ in range(LONG_LINE >> 24):
            file.write(b"x" * (1 << 24))
        file.write(f"\n\n{LINES[1]}".encode())
    flags = ["--input", path, "--output-dir", output, *(["--txt-separator", ""] if kind == "txt" else [])]
    stopped = subprocess.run(preprocessing(*flags), env=environment(), capture_output=True, text=True)
    where = {"jsonl": f"{path}: line 3", "txt": f"{path}:3"}[kind]
    error = f"error: --input {where}: is one document of more than 67108864 bytes; "
    assert stopped.returncode == 2 and stopped.stderr.startswith(error), stopped.stderr
    assert not [*output.glob("[!.]*")]  # .partial keeps progress where reading took long
    command = [sys.executable, "-c", PEAK_MEMORY, *preprocessing(*flags, "--on-error", "skip")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    peak = int(done.stderr.splitlines()[-1])
    dataset = IndexedDataset(str(output / "train"))
    assert [bytes(dataset[number][:-1].astype(np.uint8)).strip() for number in (0, -1)] == (
        [b"first", b"last"] if kind == "jsonl" else [line.strip().encode() for line in LINES]
    )
    assert len(dataset) == 2 and peak < 400_000  # kilobytes; a short line takes 200,000


TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
WHILE_IMPORTING = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("megatron.") and "megatron.stop_signals" in sys.modules:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["{tool}", "--help"]
runpy.run_path("{tool}", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tool", ["preprocess_data.py", "generate.py", "report.py"])
def test_a_stop_signal_during_the_imports_is_one_line(tool, number):
    source = WHILE_IMPORTING.format(tool=ROOT / "tools" / tool, number=int(number))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (128 + number, "error: interrupted; nothing was written\n")
    assert done.stdout == ""


@pytest.mark.parametrize("tool", TOOLS)
def test_all_tools_install_the_handlers(tool):
    source = (ROOT / "tools" / tool).read_text()
    imports = source.index("from megatron import stop_signals")
    assert not re.search(r"^(import|from) (numpy|torch|tqdm|megatron)", source[:imports], re.MULTILINE)
    assert "stop_signals.install_in_tool()" in source[imports:]
    assert source.endswith("    stop_signals.run_tool(main)\n")


WHILE_RUNNING = """
import os, signal
from megatron.stop_signals import run_tool
run_tool(lambda: os.kill(os.getpid(), signal.{name}))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_signal_of_a_running_tool_is_one_line(name):
    words = [sys.executable, "-c", WHILE_RUNNING.format(name=name)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + signal.Signals[name], "error: interrupted\n")


WHILE_BLOCKED = """
import os, signal, sys, threading, time
from megatron.stop_signals import blocked, run_tool
def main():
    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()  # it receives the signal
    with blocked():
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.2)
        print("end of the block")
    print("after the block")
run_tool(main)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_signal_waits_for_a_block_also_where_another_thread_receives_it(name):
    words = [sys.executable, "-c", WHILE_BLOCKED.format(name=name)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + signal.Signals[name], "error: interrupted\n")
    assert done.stdout == "end of the block\n"


def test_imported_tools_install_no_handlers():
    """Worker processes import the tool that started them, and pytest has its own handler of Ctrl-C."""
    source = "import signal, runpy; runpy.run_path({!r}, run_name='tool'); print(signal.getsignal(signal.SIGTERM))"
    words = [sys.executable, "-c", source.format(str(ROOT / "tools" / "preprocess_data.py"))]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == str(signal.getsignal(signal.SIGTERM)), done.stderr
