"""The failure detector: which rank is named, on which nodes, and how soon.

The ranks are processes that do not import torch, so that a case takes about a second.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import FailureDetector, Hub, RankError
from megatron.parallel.launch import adopt_launcher, device, join, local_rank
from tests.conftest import ROOT

# argv: rank, world size, minutes, port of the hub, token, Python code to run when all ranks have connected
RANK = """
import sys, time
from megatron.parallel import failure_detector
from megatron.parallel.failure_detector import FailureDetector, Hub
failure_detector.PAUSE = 0.5  # less than in a training run
rank, size, minutes, port, token, code = sys.argv[1:]
rank, size, minutes, hub = int(rank), int(size), float(minutes), None
if rank == 0:
    hub = Hub(size, minutes)
    hub.start()
    print(hub.port, hub.token, flush=True)
    port, token = hub.port, hub.token
detector = FailureDetector(rank, rank // 2 * 2)  # two ranks per node
detector.hub = hub
detector.on_failure = lambda text: print("on_failure:", text, flush=True)
detector.connect(lambda: ("127.0.0.1", int(port), token), minutes)
print("connected", flush=True)
exec(code)
"""
STAY = "time.sleep(60)"
LEAVE = "detector.leave(1); print('left', flush=True)"


class Ranks:
    """Processes with a failure detector, by rank; each runs one line of Python when all have connected."""

    def __init__(self, *lines: str, size: int | None = None, minutes: float = 1.0):
        self.size, self.minutes = size or len(lines), minutes
        self.processes = [self.start(0, "0", "", lines[0])]
        self.port, self.token = self.processes[0].stdout.readline().split()
        for rank, line in enumerate(lines[1:], 1):
            self.processes.append(self.start(rank, self.port, self.token, line))

    def start(self, rank: int, port: str, token: str, line: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RANK, *map(str, (rank, self.size, self.minutes, port, token, line))]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def connected(self) -> "Ranks":
        """Wait until all ranks have connected."""
        for process in self.processes:
            assert process.stdout.readline() == "connected\n"
        return self

    def end(self) -> list[tuple[int, str, str]]:
        """Return exit code, output and errors by rank."""
        outputs = [process.communicate(timeout=30) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs, strict=True)]


@pytest.mark.parametrize("victim", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2)), 3])
def test_a_killed_rank_ends_the_others_with_one_line_per_node(victim):
    ranks = Ranks(STAY, STAY, STAY, STAY).connected()
    start = time.monotonic()
    ranks.processes[victim].send_signal(signal.SIGKILL)
    ends = ranks.end()
    assert time.monotonic() - start < 10
    printing_ranks = {0: [1, 2], 1: [0, 2], 2: [0, 3], 3: [0, 2]}[victim]
    for rank, (code, out, errors) in enumerate(ends):
        if rank == victim:
            assert code == -signal.SIGKILL
            continue
        assert code == 1 and out.startswith("on_failure: ") and f"rank {victim}" in out
        assert errors.startswith("error: ") == (rank in printing_ranks)
        assert errors.count("\n") == (rank in printing_ranks)
        assert not errors or (
            f"error: rank {victim}" in errors and "is gone" in errors and "the same command" in errors
        )


def test_what_one_rank_reports_ends_all_with_its_code():
    ends = Ranks(STAY, "detector.report('--lr 3: no', 2)", STAY).end()
    assert [code for code, *_ in ends] == [2, 2, 2]
    assert [errors for *_, errors in ends] == ["error: --lr 3: no\n", "", "error: --lr 3: no\n"]


def test_the_same_report_of_all_is_printed_once_per_node():
    ends = Ranks(*["detector.report('--lr 3: no', 2)"] * 4).end()
    assert [(code, errors.count("--lr 3: no")) for code, _, errors in ends] == [(2, 1), (2, 0), (2, 1), (2, 0)]


def test_ranks_that_did_not_connect_are_named_by_those_that_did():
    ends = Ranks(STAY, STAY, size=4, minutes=0.02).end()
    assert [code for code, *_ in ends] == [1, 1]
    assert "--distributed-timeout-minutes 0.02: ranks 2, 3 of 4 did not connect" in ends[0][2]
    assert "MASTER_ADDR" in ends[0][2] and ends[1][2] == ""


def test_no_rank_leaves_before_all_have_finished():
    ends = Ranks(LEAVE, f"time.sleep(1); print('worked', flush=True); {LEAVE}").end()
    assert [(code, errors) for code, _, errors in ends] == [(0, ""), (0, "")]
    ranks = Ranks(LEAVE, STAY).connected()
    ranks.processes[1].kill()  # other ranks may need it
    assert "rank 1" in ranks.end()[0][2]


def test_a_rank_that_has_finished_may_be_killed():
    ranks = Ranks(LEAVE, LEAVE, f"time.sleep(1); {LEAVE}").connected()
    time.sleep(0.3)
    ranks.processes[1].kill()
    assert [code for code, *_ in ranks.end()] == [0, -signal.SIGKILL, 0]


def test_other_clients_and_ranks_of_earlier_starts_are_rejected():
    ranks = Ranks(STAY, size=2)
    for data in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"{}\n",
        b'{"hello": 1, "token": "of-another", "where": ""}\n',
        b"x" * 70000,
    ):
        with socket.create_connection(("127.0.0.1", int(ranks.port)), timeout=5) as connection:
            connection.sendall(data)
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
    ranks.processes.append(ranks.start(1, ranks.port, ranks.token, STAY))
    ranks.connected()
    ranks.processes[1].kill()
    assert "rank 1" in ranks.end()[0][2]


def test_addresses_of_earlier_starts_are_retried_until_the_right_hub_accepts():
    hub = Hub(2, 1.0)
    hub.start()
    addresses = iter([("127.0.0.1", 1, "dead"), ("127.0.0.1", hub.port, "before"), ("127.0.0.1", hub.port, hub.token)])
    first, second = FailureDetector(0, 0), FailureDetector(1, 0)
    assert first._try_connect("127.0.0.1", hub.port, hub.token)
    first.start()
    assert second.connect(lambda: next(addresses), 1.0) == hub.token
    for detector in (first, second):
        detector._connection.sendall(b'{"bye": true}\n')
    first.join(10)
    second.join(10)
    assert not (first.is_alive() or second.is_alive())


def test_a_hub_that_does_not_exist_is_named():
    with pytest.raises(RankError, match="--distributed-timeout-minutes 0.005: rank 0 did not connect"):
        FailureDetector(1, 0).connect(lambda: ("127.0.0.1", 1, ""), 0.005)


# ---------------------------------------------------------------------------- variables of the launcher

VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def set_variables():
    """Return a function that replaces all variables of launchers; they are restored after the test."""

    def replace(**variables):
        for name in [name for name in os.environ if name.startswith("SLURM_")] + [*VARIABLES, "LOCAL_RANK"]:
            os.environ.pop(name, None)
        os.environ.update(variables)

    with mock.patch.dict(os.environ):
        yield replace


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_variables_are_refused(name, set_variables):
    set_variables(**{key: value for key, value in VARIABLES.items() if key != name})
    with pytest.raises(ConfigurationError, match=f"WORLD_SIZE=2: needs {name}, which is not set; start ranks with"):
        join()


def test_invalid_variables_are_refused(set_variables):
    set_variables(**VARIABLES | {"RANK": "2"})
    with pytest.raises(ConfigurationError, match="RANK=2: is not below WORLD_SIZE=2"):
        join()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        set_variables(**VARIABLES | {name: "one"})
        with pytest.raises(ConfigurationError, match=f"{name}=one: is not a whole number"):
            join(0.005) if name != "LOCAL_RANK" else local_rank()


def test_a_port_in_use_is_named(set_variables):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        set_variables(**VARIABLES | {"RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(ConfigurationError, match=f"MASTER_PORT={port}: .*it is in use.*choose another"):
            join()
    set_variables(**VARIABLES | {"RANK": "0", "MASTER_PORT": "70000"})
    with pytest.raises(ConfigurationError, match="MASTER_PORT=70000: cannot listen on this port"):
        join()


def test_a_rank_0_that_does_not_listen_is_named(set_variables):
    set_variables(**VARIABLES)
    with pytest.raises(
        RankError, match="0.005: rank 0 did not connect.*MASTER_ADDR=127.0.0.1 MASTER_PORT=1: .*refused"
    ):
        join(0.005)


@pytest.mark.parametrize("local, visible, index", [("3", 1, 0), ("3", 4, 3), ("0", 8, 0)])
def test_each_rank_uses_its_own_gpu(local, visible, index, set_variables, gpus):
    set_variables(**VARIABLES, LOCAL_RANK=local)
    assert gpus(visible) == [index]


def test_more_ranks_than_gpus_are_refused(set_variables, gpus):
    set_variables(**VARIABLES, LOCAL_RANK="2")
    with pytest.raises(ConfigurationError, match="LOCAL_RANK=2: has no GPU, 2 are visible; start at most 2 ranks"):
        gpus(2)


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that makes `visible` GPUs visible to torch and returns those that this rank uses."""

    def used_gpus(visible: int) -> list[int]:
        indices = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: indices.append(device.index))
        device()
        return indices

    return used_gpus


def test_plain_srun_sets_rank_and_world_size(set_variables):
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    set_variables(**slurm)
    adopt_launcher()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    set_variables(**slurm, RANK="0", WORLD_SIZE="2")  # torchrun, itself started by srun
    adopt_launcher()
    assert os.environ["WORLD_SIZE"] == "2" and "LOCAL_RANK" not in os.environ
    set_variables(SLURM_PROCID="0", SLURM_NTASKS="8")  # a batch script that runs one process
    adopt_launcher()
    assert "RANK" not in os.environ and not dist.is_initialized()
