"""Signals that stop a training run: SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (Ctrl-C).

Entry points install the handlers before they import anything slow. Until `defer` a request ends the process at once:
nothing was trained and nothing is held. From then on it is recorded, and the run stops between two steps. Schedulers
repeat signals (SLURM sends SIGTERM twice within milliseconds), so repetitions are one request; only a second SIGINT,
which a person sends, ends a run that is saving.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_name: str | None = None  # of the first signal
_deferred = False
_end_all_ranks: Callable[[str, int], None] | None = None


class StopRequested(Exception):
    """A request to stop came before the first step; the message is its reason."""


def install() -> None:
    """Handle the stop signals of this process from now on; for entry points, which own their process."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def end_ranks_by(end_all_ranks: Callable[[str, int], None]) -> None:
    """Have a request that is not deferred end every rank: `end_all_ranks` takes a line and the exit code."""
    global _end_all_ranks
    _end_all_ranks = end_all_ranks


def defer() -> None:
    """Record requests from now on; whoever defers them looks at `requested` as often as it can stop."""
    global _deferred
    _deferred = True


def requested() -> str | None:
    """Return the name of the first stop signal of this process, or None."""
    return _name


def ignore() -> None:
    """Ignore further requests: the run is over, and Python's shutdown would restore signals that kill."""
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame) -> None:
    global _name
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)  # the second one ends at once
    if _name:
        return
    _name = signal.Signals(number).name
    if not _deferred:
        _end_at_once()


def _end_at_once() -> None:
    line, code = f"stopped by {_name}: nothing was trained, nothing was written", _exit_code()
    if _end_all_ranks:
        _end_all_ranks(line, code)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        os.write(2, f"{line}\n".encode())  # sys.stderr may be in use by the code that this handler interrupts
    os._exit(code)


def _exit_code() -> int:
    """Return --exit-code-when-stopped of a command line that may not have been parsed yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--exit-code-when-stopped", type=float, default=0)
    try:
        return int(parser.parse_known_args(sys.argv[1:])[0].exit_code_when_stopped)
    except (argparse.ArgumentError, ValueError, OverflowError):
        return 0  # the parser of all flags would have refused it
