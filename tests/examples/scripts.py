"""Runs the example scripts of a clone, and reads what they print."""

import subprocess
from functools import cache
from pathlib import Path

from megatron.training.command_line import parse
from tests.conftest import ROOT, environment
from tests.test_documentation import OBJECTIVES, commands

EXAMPLES = ROOT / "examples_scaling"
SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES))
    for folder in ("training", "evaluation", "downstream")
    for path in (EXAMPLES / folder).glob("*.sh")
)


def start(clone: Path, name: str, *flags: str, **variables: str) -> subprocess.Popen:
    """Start a script; `name` is its path below examples_scaling."""
    command = ["bash", f"examples_scaling/{name}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=clone, env=environment() | variables, text=True, **pipes)


def run(clone: Path, name: str, *flags: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run a script and check its exit code."""
    process = start(clone, name, *flags, **variables)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err[-3000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@cache
def printed(clone: Path, name: str, *flags: str, **variables: str) -> str:
    """Return what a script prints with DRY_RUN=1 on one rank."""
    return run(clone, name, *flags, DRY_RUN="1", **{"NPROC": "1", **variables}).stdout


def command(text: str) -> list[str]:
    """Return the words of the only command among printed lines."""
    (words,) = commands(text)
    return words


def configuration(words: list[str], *flags: str):
    """Return the configuration of a command that trains or evaluates, with further flags."""
    entry = next(word for word in words if word in OBJECTIVES)
    return parse(OBJECTIVES[entry], [*words[words.index(entry) + 1 :], *flags])
