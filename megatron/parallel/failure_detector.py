"""Who is still there: every process keeps a connection to the first one, and the kernel closes it when a process dies.

    rank 0, 1, ... n  -- hello, fault, bye -->  hub in rank 0  -- welcome, start, fault, bye -->  rank 0, 1, ... n

A collective whose peer is gone fails at once, in minutes or never, and does not say which peer it was. Here the first
fault of any process ends all of them in seconds, with one line on each node that names the rank.
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
from pathlib import Path

from megatron import stop_signals

PAUSE = 2.0  # seconds before leaving: a launcher names the process that it finds dead first as the cause
PATIENCE = 3.0  # seconds in which a peer's death is known here after it made a collective fail
POLL = 1.0  # seconds between two looks at the parent process
RETRY = 0.1  # seconds between two attempts to reach the hub
LONGEST = 1 << 16  # bytes of a message


class RankError(RuntimeError):
    """ParallelContext that should be there are not."""


@dataclass(frozen=True)
class Fault:
    """What ends all processes: the rank where it happened, one line, the exit code, and whether the rank is dead.

    A request to stop (`stop`) is no error.
    """

    rank: int
    text: str
    code: int
    gone: bool = False
    stop: bool = False


def gone(rank: int, where: str = "") -> Fault:
    text = f"rank {rank}{where} is gone: it was killed, or its node cannot be reached; every process leaves, "
    return Fault(rank, text + "and the same command goes on from the newest checkpoint", 1, gone=True)


def missing(ranks: list[int], minutes: float, size: int | None = None) -> str:
    """Return the line that says who did not come."""
    named = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"
    return (
        f"--distributed-timeout-minutes {minutes:g}: {named}{f' of {size} processes' if size else ''} did not come in "
        "that time; start them all with the same MASTER_ADDR, MASTER_PORT and number of processes"
    )


def listen(port: int, backlog: int = 1024) -> socket.socket:
    """Return a socket that listens on all addresses of this node; raises OSError where the port is taken."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


def when_orphaned(act: Callable[[], None], parent: int) -> None:
    """Call `act`, in a thread, within a second of the end of the process `parent`, which started this one."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        act()

    threading.Thread(target=wait, name="parent watch", daemon=True).start()


def launcher() -> str | None:
    """Return the launcher that started this rank ("torchrun"), or None where a shell or another program did.

    A shell may end before what it started; a launcher ends last, unless it is killed.
    """
    with suppress(OSError):  # not every system has /proc
        if Path(f"/proc/{os.getppid()}/comm").read_text() == "slurmstepd\n":
            return "srun"
    variables = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    return next((name for variable, name in variables.items() if variable in os.environ), None)


def _send(connection: socket.socket, **message) -> None:
    with suppress(OSError):  # a peer that is gone is noticed where it is read from
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out within half a minute that a node has lost its power or its network."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not every system names them so
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Hub(threading.Thread):
    """The first process's end of all connections; it also calls the roll."""

    def __init__(self, size: int, minutes: float):
        super().__init__(name="watch hub", daemon=True)
        self.size, self.minutes = size, minutes
        self.token = secrets.token_hex(8)  # of this start: an earlier one may have left its address behind
        self.began = time.monotonic()
        self.peers: dict[int, socket.socket] = {}  # those that are there
        self.ready: set[int] = set()  # to leave
        self.complete, self.fault = False, None
        self.listener = listen(0, backlog=size)
        self.port = self.listener.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self) -> None:
        while not (self.complete and self.ready == self.peers.keys()):
            for key, _ in self.selector.select(timeout=1.0):
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    connection.settimeout(5)  # messages are small: only a peer that stands still does not take one
                    _keep_alive(connection)
                    self.selector.register(connection, selectors.EVENT_READ, {"rank": None, "unread": b""})
                else:
                    self._read(key.fileobj, key.data)
            if not (self.complete or self.fault) and time.monotonic() - self.began > 60 * self.minutes:
                absent = sorted(set(range(self.size)) - self.peers.keys())
                self._end(Fault(absent[0], missing(absent, self.minutes, self.size), 1))
        self._tell(bye=True)

    def _read(self, connection: socket.socket, peer: dict) -> None:
        try:
            data = connection.recv(LONGEST)
            *lines, peer["unread"] = (peer["unread"] + data).split(b"\n")
            for line in lines:
                self._hear(connection, peer, json.loads(line))
            stays = data and len(peer["unread"]) < LONGEST
        except (OSError, ValueError, KeyError, TypeError):  # gone; or a stranger on this port
            stays = False
        if not stays:
            self.selector.unregister(connection)
            connection.close()
            if self.peers.get(peer["rank"]) is connection:
                del self.peers[peer["rank"]]
                if peer["rank"] in self.ready:
                    self.ready.remove(peer["rank"])
                else:
                    self._end(gone(peer["rank"], peer["where"]))

    def _hear(self, connection: socket.socket, peer: dict, message: dict) -> None:
        if "hello" in message:
            rank = int(message["hello"])
            if message["token"] != self.token or self.complete or self.fault or rank in self.peers:
                raise ValueError
            peer |= {"rank": rank, "where": str(message["where"])}
            self.peers[rank] = connection
            _send(connection, welcome=True)
            self.complete = self.peers.keys() == set(range(self.size))
            if self.complete:
                self._tell(start=True)
        elif peer["rank"] is None:
            raise ValueError
        elif "fault" in message:
            self._end(Fault(**message["fault"]))
        else:
            self.ready.add(peer["rank"])

    def _end(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault
            self._tell(fault=asdict(fault))

    def _tell(self, **message) -> None:
        for connection in self.peers.values():
            _send(connection, **message)


class FailureDetector(threading.Thread):
    """This process's end. From `meet` to `leave` the first fault of any process ends this one too.

    One line says it where this process speaks for its node, and `on_failure` is called with the line. A single rank,
    which meets nobody, still ends with its launcher.
    """

    def __init__(self, rank: int, first_on_node: int):
        super().__init__(name="watch", daemon=True)
        self.rank, self.first_on_node = rank, first_on_node
        self.hub: Hub | None = None
        self.on_failure: Callable[[str], None] | None = None
        self._all_here = threading.Event()

    def end_with(self, launcher: str) -> None:
        """Have all ranks end where the parent process of this one, a launcher, is killed."""
        parent = os.getppid()
        text = (
            f"{launcher} (process {parent} on {socket.gethostname()}), which started rank {self.rank}, is gone: it was "
            "killed; every rank leaves, and the same command resumes from the newest checkpoint"
        )
        when_orphaned(lambda: self.report(text, 1), parent)

    def meet(self, find: Callable[[], tuple[str, int, str] | None], minutes: float) -> str:
        """Wait until all processes have said hello to the hub; return its token, which no other start has.

        `find` returns the hub's address, port and token, or None while they are unknown. Raises RankError where there
        is no hub within `minutes`; where others do not come, the hub ends every process that did.
        """
        until = time.monotonic() + 60 * minutes
        while not ((found := find()) and self._hello(*found)):
            if time.monotonic() > until:
                raise RankError(missing([0], minutes))
            time.sleep(RETRY)
        self.start()
        stop_signals.end_ranks_by(partial(self.report, stop=True))
        self._all_here.wait()
        return found[2]

    def _hello(self, address: str, port: int, token: str) -> bool:
        """Return whether the hub took this process in: `token` may be of an earlier start."""
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
        fault = gone(0)  # unless the hub says otherwise before it falls silent
        with suppress(OSError, ValueError):
            for message in map(json.loads, self._lines):
                if "bye" in message:
                    return
                if "fault" in message:
                    fault = Fault(**message["fault"])
                    break
                self._all_here.set()
        self._end(fault)

    def _end(self, fault: Fault) -> None:
        """Leave, whatever the main thread waits for."""
        speaker = self.first_on_node + (fault.gone and fault.rank == self.first_on_node)
        try:
            if self.rank == speaker:
                print(f"{'' if fault.stop else 'error: '}{fault.text}", file=sys.stderr, flush=True)
            if self.on_failure:
                self.on_failure(fault.text)
        finally:
            time.sleep(PAUSE)
            os._exit(fault.code)

    def report(self, text: str, code: int, stop: bool = False) -> None:
        """End all processes, for `text`, or for a fault that came first; does not return."""
        fault = Fault(self.rank, text, code, stop=stop)
        if not self.is_alive():  # it has met nobody
            self._end(fault)
        _send(self._connection, fault=asdict(fault))
        self.join(60)
        os._exit(code)

    def leave(self, minutes: float) -> None:
        """Wait until no process has anything left to do, up to `minutes`; a peer that needs this one finds it here."""
        if not self.is_alive():  # it has met nobody
            return
        _send(self._connection, bye=True)
        self.join(60 * minutes)
        if self.hub:
            self.hub.join(60 * minutes)  # it is still telling the others
