"""Processes forked from a server that has imported torch: they start four seconds sooner."""

import itertools
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import IO
from unittest import mock

_context = get_context("forkserver")
_context.set_forkserver_preload(["megatron.training.launcher", __name__])


# below the ports that the kernel gives to outgoing connections, and another range for each worker of pytest-xdist
_ports = itertools.count(12_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) + os.getpid() % 1_000)


def free_port() -> int:
    """Return a port that no process uses, and that no other caller gets before its process listens on it."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", next(_ports))) as listener:
            return listener.getsockname()[1]


@contextmanager
def forkserver_environment(env: dict[str, str]) -> Iterator[None]:
    """Start the fork server with `env`, unless it runs: libraries read some variables when they are imported."""
    with mock.patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()
    yield


def run_script(
    command: list[str], env: dict[str, str], timeout: float, size: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run `command` on `size` ranks; return their result as subprocess.run does.

    The command is what follows `python`: a script, `-m` and a module, or `-c` and code; then its arguments. Several
    ranks get the variables of torchrun. The exit code is the first one that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        processes = start_script(command, env, outputs, rank_variables(size), cwd)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        if any(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
                process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        text = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
    codes = [process.exitcode for process in processes]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), *text)


def rank_variables(size: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of `size` ranks; none for a single rank."""
    if size == 1:
        return [{}]
    master = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [master | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start_script(
    command: list[str], env: dict[str, str], outputs: list[Path], variables: list[dict], cwd: Path | None = None
) -> list:
    """Start `command` in one process per item of `variables`, which is added to `env`; return the processes.

    `outputs` are the files of standard output and standard error.
    """
    with forkserver_environment(env):
        processes = [
            _context.Process(target=_run, args=(command, env | own, outputs, cwd or Path.cwd())) for own in variables
        ]
        for process in processes:
            process.start()
    return processes


class ForkedPopen:
    """The interface of subprocess.Popen for a Python program that `start_script` starts; stderr goes to `stdout`."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: IO, **_):
        (process,) = start_script(command[1:], env, [Path(stdout.name)] * 2, [{}])
        self._process, self.pid = process, process.pid
        self.terminate, self.kill, self.wait = process.terminate, process.kill, process.join

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode


def _run(command: list[str], env: dict[str, str], outputs: list[Path], cwd: Path) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    program, *arguments = command
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if program in ("-m", "-c"):
        sys.path.insert(0, str(cwd))
        text, *arguments = arguments
    sys.argv[:] = [program, *arguments]
    if program == "-m":
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    elif program == "-c":
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
