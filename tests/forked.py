"""ParallelContext that are forked from one where torch is loaded: as started by themselves, but four seconds sooner."""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

_context = get_context("forkserver")
_context.set_forkserver_preload(["megatron.training.main", __name__])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def surroundings(env: dict[str, str]) -> Iterator[None]:
    """Have the server of forked processes started with `env`: libraries read some of it when they are loaded."""
    with mock.patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()
    yield


def run_script(command: list[str], env: dict[str, str], timeout: float, size: int = 1) -> subprocess.CompletedProcess:
    """Run `command` (a script and its arguments) in `size` processes; return what they did, as subprocess.run.

    Several find their places in the environment, as those of torchrun do. The exit code is the first one that is none
    of success.
    """
    places = [{}]
    if size > 1:
        master = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [master | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        started = start_script(command, env, outputs, places)
        until = time.monotonic() + timeout
        for process in started:
            process.join(max(0, until - time.monotonic()))
        if any(process.is_alive() for process in started):
            for process in started:
                process.kill()
                process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        text = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
    codes = [process.exitcode for process in started]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), *text)


def start_script(command: list[str], env: dict[str, str], outputs: list[Path], places: list[dict] = [{}]) -> list:
    """Start `command` in one process per item of `places`, which holds more of its environment; return the processes.

    `outputs` are the files of standard output and standard error.
    """
    with surroundings(env):
        started = [_context.Process(target=_work, args=(command, env | place, outputs)) for place in places]
        for process in started:
            process.start()
    return started


def _work(command: list[str], env: dict[str, str], outputs: list[Path]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")
