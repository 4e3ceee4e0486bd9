"""The watch: who is named, by whom, and how soon. ParallelContext without torch, so that each case takes a second."""

import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import FailureDetector, Hub, RankError
from megatron.parallel.launch import adopt_launcher, device, join, local_rank
from tests.conftest import ROOT

# argv: rank, size, minutes, address of the hub, token, what to do then
PEER = """
import sys, time
from megatron.parallel.failure_detector import Hub, RankError, Watch
rank, size, minutes, port, token, then = sys.argv[1:]
rank, size, minutes, hub = int(rank), int(size), float(minutes), None
if rank == 0:
    hub = Hub(size, minutes)
    hub.start()
    print(hub.port, hub.token, flush=True)
    port, token = hub.port, hub.token
watch = Watch(rank, rank // 2 * 2)  # two processes on a node
watch.hub = hub
watch.on_failure = lambda text: print("last words:", text, flush=True)
watch.meet(lambda: ("127.0.0.1", int(port), token), minutes)
print("met", flush=True)
exec(then)
"""
STAY = "time.sleep(60)"
LEAVE = "watch.leave(1); print('left', flush=True)"


class Peers:
    """ParallelContext with a watch, by rank; what they do when all have met is a line of Python for each."""

    def __init__(self, *then: str, size: int | None = None, minutes: float = 1.0):
        self.size, self.minutes = size or len(then), minutes
        self.started = [self.start(0, "0", "", then[0])]
        self.port, self.token = self.started[0].stdout.readline().split()
        for rank, line in enumerate(then[1:], 1):
            self.started.append(self.start(rank, self.port, self.token, line))

    def start(self, rank: int, port: str, token: str, then: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PEER, *map(str, (rank, self.size, self.minutes, port, token, then))]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def met(self) -> "Peers":
        for process in self.started:
            assert process.stdout.readline() == "met\n"
        return self

    def end(self) -> list[tuple[int, str, str]]:
        """Return exit code, output and errors by rank."""
        said = [process.communicate(timeout=30) for process in self.started]
        return [(process.returncode, *each) for process, each in zip(self.started, said)]


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_killed_process_ends_the_others_with_one_line_a_node(victim):
    peers = Peers(STAY, STAY, STAY, STAY).met()
    began = time.monotonic()
    peers.started[victim].send_signal(signal.SIGKILL)
    ends = peers.end()
    assert time.monotonic() - began < 10
    speakers = {0: [1, 2], 1: [0, 2], 2: [0, 3], 3: [0, 2]}[victim]
    for rank, (code, out, errors) in enumerate(ends):
        if rank == victim:
            assert code == -signal.SIGKILL
            continue
        assert code == 1 and out.startswith("last words: ") and f"rank {victim}" in out
        assert errors.startswith("error: ") == (rank in speakers) and errors.count("\n") == (rank in speakers)
        assert not errors or (
            f"error: rank {victim}" in errors and "is gone" in errors and "the same command" in errors
        )


def test_what_one_process_reports_ends_all_with_its_code():
    ends = Peers(STAY, "watch.report('--lr 3: no', 2)", STAY).end()
    assert [code for code, *_ in ends] == [2, 2, 2]
    assert [errors for *_, errors in ends] == ["error: --lr 3: no\n", "", "error: --lr 3: no\n"]


def test_the_same_report_of_all_is_said_once_a_node():
    ends = Peers(*["watch.report('--lr 3: no', 2)"] * 4).end()
    assert [(code, errors.count("--lr 3: no")) for code, _, errors in ends] == [(2, 1), (2, 0), (2, 1), (2, 0)]


def test_who_did_not_come_is_named_by_those_who_did():
    ends = Peers(STAY, STAY, size=4, minutes=0.02).end()
    assert [code for code, *_ in ends] == [1, 1]
    assert "--distributed-timeout-minutes 0.02: ranks 2, 3 of 4 processes did not come" in ends[0][2]
    assert "MASTER_ADDR" in ends[0][2] and ends[1][2] == ""


def test_nobody_leaves_before_all_have_done_their_work():
    ends = Peers(LEAVE, f"time.sleep(1); print('worked', flush=True); {LEAVE}").end()
    assert [(code, errors) for code, _, errors in ends] == [(0, ""), (0, "")]
    peers = Peers(LEAVE, STAY).met()
    peers.started[1].kill()  # which others may need
    assert "rank 1" in peers.end()[0][2]


def test_one_that_had_nothing_left_to_do_may_be_killed():
    peers = Peers(LEAVE, LEAVE, f"time.sleep(1); {LEAVE}").met()
    time.sleep(0.3)
    peers.started[1].kill()
    assert [code for code, *_ in peers.end()] == [0, -signal.SIGKILL, 0]


def test_strangers_and_earlier_starts_are_sent_away():
    peers = Peers(STAY, size=2)
    for words in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"{}\n",
        b'{"hello": 1, "token": "of-another", "where": ""}\n',
        b"x" * 70000,
    ):
        with socket.create_connection(("127.0.0.1", int(peers.port)), timeout=5) as connection:
            connection.sendall(words)
            try:
                assert connection.recv(100) == b""
            except ConnectionResetError:
                pass
    peers.started.append(peers.start(1, peers.port, peers.token, STAY))
    peers.met()
    peers.started[1].kill()
    assert "rank 1" in peers.end()[0][2]


def test_a_hub_of_an_earlier_start_is_asked_again_until_the_right_one_answers():
    hub = Hub(2, 1.0)
    hub.start()
    found = iter([("127.0.0.1", 1, "dead"), ("127.0.0.1", hub.port, "before"), ("127.0.0.1", hub.port, hub.token)])
    first, second = FailureDetector(0, 0), FailureDetector(1, 0)
    assert first._hello("127.0.0.1", hub.port, hub.token)
    first.start()
    assert second.meet(lambda: next(found), 1.0) == hub.token
    for watch in (first, second):
        watch._connection.sendall(b'{"bye": true}\n')
    first.join(10)
    second.join(10)
    assert not (first.is_alive() or second.is_alive())


def test_a_hub_that_is_nowhere_is_named():
    with pytest.raises(RankError, match="--distributed-timeout-minutes 0.005: rank 0 did not come"):
        FailureDetector(1, 0).meet(lambda: ("127.0.0.1", 1, ""), 0.005)


# ---------------------------------------------------------------------------- what the launcher says

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def place():
    """Set the variables of a launcher, and no others; what is set meanwhile does not outlive the test."""

    def put(**given):
        for name in [name for name in os.environ if name.startswith("SLURM_")] + [*PLACE, "LOCAL_RANK"]:
            os.environ.pop(name, None)
        os.environ.update(given)

    with mock.patch.dict(os.environ):
        yield put


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_says_half_is_refused(name, place):
    place(**{key: value for key, value in PLACE.items() if key != name})
    with pytest.raises(ConfigurationError, match=f"WORLD_SIZE=2: needs {name}, which is not set; start ranks with"):
        join()


def test_places_that_make_no_sense_are_refused(place):
    place(**PLACE | {"RANK": "2"})
    with pytest.raises(ConfigurationError, match="RANK=2: is not below WORLD_SIZE=2"):
        join()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        place(**PLACE | {name: "one"})
        with pytest.raises(ConfigurationError, match=f"{name}=one: is not a whole number"):
            join(0.005) if name != "LOCAL_RANK" else local_rank()


def test_a_port_in_use_is_named(place):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place(**PLACE | {"RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(ConfigurationError, match=f"MASTER_PORT={port}: .*it is in use.*choose another"):
            join()
    place(**PLACE | {"RANK": "0", "MASTER_PORT": "70000"})
    with pytest.raises(ConfigurationError, match="MASTER_PORT=70000: cannot be listened on"):
        join()


def test_a_first_process_that_does_not_come_is_named(place):
    place(**PLACE)
    with pytest.raises(RankError, match="0.005: rank 0 did not come.*MASTER_ADDR=127.0.0.1 MASTER_PORT=1: .*refused"):
        join(0.005)


@pytest.mark.parametrize("local, visible, index", [("3", 1, 0), ("3", 4, 3), ("0", 8, 0)])
def test_each_process_takes_its_own_gpu(local, visible, index, place, gpus):
    place(**PLACE, LOCAL_RANK=local)
    assert gpus(visible) == [index]


def test_more_processes_than_gpus_are_refused(place, gpus):
    place(**PLACE, LOCAL_RANK="2")
    with pytest.raises(ConfigurationError, match="LOCAL_RANK=2: has no GPU, 2 are visible here; start no more"):
        gpus(2)


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see so many GPUs; return those that a process takes."""

    def take(visible: int) -> list[int]:
        taken = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
        device()
        return taken

    return take


def test_plain_srun_gives_every_process_its_place(place):
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    place(**slurm)
    adopt_launcher()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    place(**slurm, RANK="0", WORLD_SIZE="2")  # torchrun, itself started by srun
    adopt_launcher()
    assert os.environ["WORLD_SIZE"] == "2" and "LOCAL_RANK" not in os.environ
    place(SLURM_PROCID="0", SLURM_NTASKS="8")  # a batch script that runs one process
    adopt_launcher()
    assert "RANK" not in os.environ and not dist.is_initialized()
