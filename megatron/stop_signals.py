"""Signals that stop a training run, SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (Ctrl-C), or a tool, SIGTERM and SIGINT.

Entry points of training install the handlers before they import anything slow. Until `defer` is called a request exits
at once: nothing was trained and no lock is held. After that it is recorded, and the run stops between two steps.
Schedulers repeat signals (SLURM sends SIGTERM twice within milliseconds), so repetitions are one request; only a second
SIGINT, which a user sends, ends a run that is saving.

Tools install theirs before their imports, too. Until `run_tool` is called they exit at once; then a request raises
`Interrupted`, and a second SIGINT ends the process.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
TOOL_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_signal_name: str | None = None  # of the first signal
_is_deferred = False
_postponed: list[int] | None = None  # stop signals in a block of `blocked`; None outside
_handlers_before: dict[int, Any] = {}  # of the stop signals of a tool
_end_all_ranks: Callable[[str, int], None] | None = None


class StopRequested(Exception):
    """A request to stop came before the first step; the message is its reason."""


class Interrupted(KeyboardInterrupt):
    """A stop signal that a tool received."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.exit_code = 128 + number  # as shells report it


def install() -> None:
    """Install the handlers of the stop signals; for entry points only."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def install_in_tool() -> None:
    """Make the stop signals of a tool end it at once, with one line; for entry points only, before slow imports."""
    _handlers_before.update((number, signal.signal(number, _end_imports)) for number in TOOL_SIGNALS)


def run_tool(main: Callable[[], None]) -> None:
    """Call the `main` of a tool, in which stop signals raise `Interrupted`; for entry points only, after the imports.

    What `main` does not catch ends the process with one line. In the end the handlers are those before
    `install_in_tool`.
    """
    for number in TOOL_SIGNALS:
        signal.signal(number, _raise)
    try:
        main()
    except Interrupted as request:
        print(f"error: {request}", file=sys.stderr)
        sys.exit(request.exit_code)
    finally:
        for number, handler in _handlers_before.items():
            signal.signal(number, handler)


def end_ranks_by(end_all_ranks: Callable[[str, int], None]) -> None:
    """Make a request that is not deferred call `end_all_ranks` with a message and the exit code."""
    global _end_all_ranks
    _end_all_ranks = end_all_ranks


def defer() -> None:
    """Record requests from now on; the caller must check `requested` whenever it can stop."""
    global _is_deferred
    _is_deferred = True


def requested() -> str | None:
    """Return the name of the first stop signal of this process, or None."""
    return _signal_name


@contextmanager
def blocked() -> Iterator[None]:
    """Delay the stop signals of this thread to the end of the block; a process forked in it never receives them.

    Another thread, such as one of a library, may receive one all the same, and Python calls the handler in the main
    thread; that of a tool is then called again at the end of the block.
    """
    global _postponed
    mask, _postponed = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), []
    try:
        yield
    finally:
        postponed, _postponed = _postponed, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if postponed:
            signal.raise_signal(postponed[0])


def ignore() -> None:
    """Ignore further requests: the run is over, and Python's shutdown would restore handlers that kill the process."""
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame) -> None:
    global _signal_name
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
    if _signal_name:
        return
    _signal_name = signal.Signals(number).name
    if not _is_deferred:
        _end_at_once()


def _end_imports(number: int, frame) -> None:
    os.write(2, b"error: interrupted; nothing was written\n")
    os._exit(128 + number)


def _raise(number: int, frame) -> None:
    if _postponed is not None:
        _postponed.append(number)
        return
    signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    raise Interrupted(number)


def _end_at_once() -> None:
    message, code = f"stopped by {_signal_name}: nothing was trained, nothing was written", _exit_code()
    if _end_all_ranks:
        _end_all_ranks(message, code)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        os.write(2, f"{message}\n".encode())  # this handler may have interrupted code that uses sys.stderr
    os._exit(code)


def _exit_code() -> int:
    """Return --exit-code-when-stopped; the command line may not have been parsed yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--exit-code-when-stopped", type=float, default=0)
    try:
        return int(parser.parse_known_args(sys.argv[1:])[0].exit_code_when_stopped)
    except (argparse.ArgumentError, ValueError, OverflowError):
        return 0  # the real parser refuses such a value
