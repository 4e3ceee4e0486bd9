"""Sweep files for the tests: runs of a second each."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import yaml

from megatron.sweeps import local_queue
from tests.forked import ForkedPopen

HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def toy(corpus: Path) -> dict:
    """Return a sweep of two variants and two budgets; its runs take a second each after their imports."""
    return {
        "flags": {
            "num-layers": 2,
            "hidden-size": 32,
            "num-attention-heads": 2,
            "seq-length": 32,
            "fp32": True,
            "compile": False,
            "micro-batch-size": 4,
            "global-batch-size": 8,
            "lr": "1e-2",
            "tokenizer-type": "ByteTokenizer",
            "train-data-path": f"{corpus}/train",
            "valid-data-path": [f"tuning={corpus}/tuning", f"validation={corpus}/validation"],
            "train-unique-tokens": 512,
            "eval-samples": 8,
            "eval-interval": 4,
            "save-interval": 4,
            "log-interval": 1,
            "num-workers": 0,
        },
        "parameters": {"train-epochs": [4, 8]},
        "variants": {"ar": {"flags": {"objective": "ar"}}, "mdm": {"flags": {"objective": "mdm"}}},
    }


def write(folder: Path, content: dict, **changes) -> Path:
    """Write a sweep file with changed top-level keys; None removes a key."""
    content = copy.deepcopy(content) | changes
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


@contextmanager
def forked_runs() -> Iterator[None]:
    """Have local queues of this process fork their runs from a process that has loaded torch."""
    names = {"Popen": ForkedPopen, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    with mock.patch.object(local_queue, "subprocess", SimpleNamespace(**names)):
        yield


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Have another process hold the lock of a run folder."""
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield
        holder.stdin.close()
