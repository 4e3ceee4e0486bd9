"""Failure detector: the first fault of any rank ends all ranks within seconds, with one line per node that names it.

    rank 0, 1, ... n  -- hello, fault, bye -->  hub in rank 0  -- welcome, start, fault, bye -->  rank 0, 1, ... n

Every rank keeps a TCP connection to a hub in rank 0, and the kernel closes it when a process dies. Without this a
collective whose peer has died fails at once, in minutes or never, and does not say which rank died.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

from megatron import parent_process, stop_signals

PAUSE = 2.0  # seconds before exiting: a launcher reports the process that exits first as the cause
PATIENCE = 3.0  # seconds within which a rank's death is known here after it made a collective fail
POLL = 1.0  # seconds between two checks of the parent process
RETRY = 0.1  # seconds between two attempts to connect to the hub
MAX_MESSAGE = 1 << 16  # bytes


class RankError(RuntimeError):
    """A rank did not connect in time."""


@dataclass(frozen=True)
class Fault:
    """The reason for ending all ranks; a request to stop (`stop`) is no error."""

    rank: int  # where it happened
    text: str  # one line
    code: int  # exit code of all ranks
    dead: bool = False  # the rank cannot report this itself
    stop: bool = False


def dead_rank(rank: int, where: str = "") -> Fault:
    """Return the fault of a rank whose connection was closed."""
    text = (
        f"rank {rank}{where} is gone: it was killed, or its node cannot be reached; all ranks exit, and the same "
        "command resumes from the newest checkpoint"
    )
    return Fault(rank, text, 1, dead=True)


def missing_ranks(ranks: list[int], minutes: float, size: int | None = None) -> str:
    """Return the message about `ranks` that did not connect."""
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"
    return (
        f"--distributed-timeout-minutes {minutes:g}: {names}{f' of {size}' if size else ''} did not connect in that "
        "time; start all ranks with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
    )


def listen(port: int, backlog: int = 1024) -> socket.socket:
    """Return a socket that listens on all addresses of this node.

    Raises: OSError, if the port is in use.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


def when_orphaned(act: Callable[[], None], parent: int) -> None:
    """Call `act`, in a thread, within a second of the end of `parent`, the parent process of this one."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        act()

    threading.Thread(target=wait, name="parent process", daemon=True).start()


def launcher() -> str | None:
    """Return the launcher that started this rank ("torchrun"), or None if a shell or another program did.

    A shell may end before its children; a launcher ends last, unless it is killed.
    """
    if parent_process.started_by().name == "slurmstepd":
        return "srun"
    variables = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    return next((name for variable, name in variables.items() if variable in os.environ), None)


def _send(connection: socket.socket, **message) -> None:
    with suppress(OSError):  # the reader of a connection notices that it is closed
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that a node has lost power or its network."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not every system has these names
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Hub(threading.Thread):
    """Rank 0's end of all connections: waits until all ranks have connected, then broadcasts the first fault."""

    def __init__(self, size: int, minutes: float):
        super().__init__(name="failure detector hub", daemon=True)
        self.size = size
        self.minutes = minutes
        self.token = secrets.token_hex(8)  # of this start: the store may still have the address of an earlier one
        self.start_time = time.monotonic()
        self.connections: dict[int, socket.socket] = {}  # by rank
        self.finished: set[int] = set()  # ranks that have sent bye
        self.complete = False  # all ranks have connected
        self.fault: Fault | None = None
        self.listener = listen(0, backlog=size)
        self.port = self.listener.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until all connected ranks have finished."""
        while not (self.complete and self.finished == self.connections.keys()):
            for key, _ in self.selector.select(timeout=1.0):
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    connection.settimeout(5)  # messages are small: only a rank that hangs does not receive one
                    _keep_alive(connection)
                    self.selector.register(connection, selectors.EVENT_READ, {"rank": None, "unread": b""})
                else:
                    self._read(cast(socket.socket, key.fileobj), key.data)
            if not (self.complete or self.fault) and time.monotonic() - self.start_time > 60 * self.minutes:
                missing = sorted(set(range(self.size)) - self.connections.keys())
                self._end(Fault(missing[0], missing_ranks(missing, self.minutes, self.size), 1))
        self._broadcast(bye=True)

    def _read(self, connection: socket.socket, peer: dict) -> None:
        try:
            data = connection.recv(MAX_MESSAGE)
            *lines, peer["unread"] = (peer["unread"] + data).split(b"\n")
            for line in lines:
                self._process(connection, peer, json.loads(line))
            is_open = data and len(peer["unread"]) < MAX_MESSAGE
        except (OSError, ValueError, KeyError, TypeError):  # closed; or not one of our ranks
            is_open = False
        if not is_open:
            self.selector.unregister(connection)
            connection.close()
            if self.connections.get(peer["rank"]) is connection:
                del self.connections[peer["rank"]]
                if peer["rank"] in self.finished:
                    self.finished.remove(peer["rank"])
                else:
                    self._end(dead_rank(peer["rank"], peer["where"]))

    def _process(self, connection: socket.socket, peer: dict, message: dict) -> None:
        if "hello" in message:
            rank = int(message["hello"])
            if message["token"] != self.token or self.complete or self.fault or rank in self.connections:
                raise ValueError
            peer |= {"rank": rank, "where": str(message["where"])}
            self.connections[rank] = connection
            _send(connection, welcome=True)
            self.complete = self.connections.keys() == set(range(self.size))
            if self.complete:
                self._broadcast(start=True)
        elif peer["rank"] is None:
            raise ValueError
        elif "fault" in message:
            self._end(Fault(**message["fault"]))
        else:
            self.finished.add(peer["rank"])

    def _end(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault
            self._broadcast(fault=asdict(fault))

    def _broadcast(self, **message) -> None:
        for connection in self.connections.values():
            _send(connection, **message)


class FailureDetector(threading.Thread):
    """A rank's end of the connection: from `connect` to `leave` the first fault of any rank ends this one too.

    The first rank of a node prints the line, and `on_failure` is called with it on every rank. A single rank, which
    has no hub, still exits with its launcher.
    """

    def __init__(self, rank: int, first_on_node: int):
        super().__init__(name="failure detector", daemon=True)
        self.rank = rank
        self.first_on_node = first_on_node
        self.hub: Hub | None = None
        self.on_failure: Callable[[str], None] | None = None
        self._all_connected = threading.Event()

    def exit_with_launcher(self, launcher: str) -> None:
        """End all ranks if the parent process of this one, a launcher, is killed; this rank at once if it is gone."""
        parent = parent_process.started_by()
        process = "" if parent.name in parent_process.ADOPTERS else f"process {parent.pid} on "
        text = (
            f"{launcher} ({process}{socket.gethostname()}), which started rank {self.rank}, is gone: it was "
            "killed; all ranks exit, and the same command resumes from the newest checkpoint"
        )
        if parent.is_gone:
            self.report(text, 1)
        when_orphaned(lambda: self.report(text, 1), parent.pid)

    def connect(self, find_hub: Callable[[], tuple[str, int, str] | None], minutes: float) -> str:
        """Wait until all ranks have connected to the hub; return its token, which no other start has.

        `find_hub` returns the hub's address, port and token, or None while they are unknown. If other ranks do not
        connect, the hub ends those that did.
        Raises: RankError, if there is no hub within `minutes`.
        """
        deadline = time.monotonic() + 60 * minutes
        while not ((hub := find_hub()) and self._try_connect(*hub)):
            if time.monotonic() > deadline:
                raise RankError(missing_ranks([0], minutes))
            time.sleep(RETRY)
        self.start()
        stop_signals.end_ranks_by(partial(self.report, stop=True))
        self._all_connected.wait()
        return hub[2]

    def _try_connect(self, address: str, port: int, token: str) -> bool:
        """Return whether the hub accepted this rank: `token` may be of an earlier start."""
        try:
            self._connection = socket.create_connection((address, port), timeout=5)
            self._lines = self._connection.makefile("rb")
            where = f" (process {os.getpid()} on {socket.gethostname()})"
            _send(self._connection, hello=self.rank, token=token, where=where)
            if not self._lines.readline():
                return False
            self._connection.settimeout(None)
        except OSError:
            return False
        _keep_alive(self._connection)
        return True

    def run(self) -> None:
        """Read the hub's messages until all ranks have finished, or end this process with the fault that it sends."""
        fault = dead_rank(0)  # if the hub closes the connection without a message
        with suppress(OSError, ValueError):
            for message in map(json.loads, self._lines):
                if "bye" in message:
                    return
                if "fault" in message:
                    fault = Fault(**message["fault"])
                    break
                self._all_connected.set()
        self._end(fault)

    def _end(self, fault: Fault) -> None:
        """Exit, whatever the main thread waits for."""
        first_is_dead = fault.dead and fault.rank == self.first_on_node
        printing_rank = self.first_on_node + 1 if first_is_dead else self.first_on_node
        try:
            if self.rank == printing_rank:
                # in one write: `print` writes the end of the line by itself, and the main thread may log in between
                sys.stderr.write(f"{'' if fault.stop else 'error: '}{fault.text}\n")
                sys.stderr.flush()
            if self.on_failure:
                self.on_failure(fault.text)
        finally:
            time.sleep(PAUSE)
            os._exit(fault.code)

    def report(self, text: str, code: int, stop: bool = False) -> None:
        """End all ranks with `text` and `code`, or with an earlier fault of another rank; does not return."""
        fault = Fault(self.rank, text, code, stop=stop)
        if not self.is_alive():  # there is no hub
            self._end(fault)
        _send(self._connection, fault=asdict(fault))
        self.join(60)
        os._exit(code)

    def leave(self, minutes: float) -> None:
        """Wait until all ranks have finished, up to `minutes`: another rank may still need this one."""
        if not self.is_alive():  # there is no hub
            return
        _send(self._connection, bye=True)
        self.join(60 * minutes)
        if self.hub:
            self.hub.join(60 * minutes)  # it may still be sending to other ranks
