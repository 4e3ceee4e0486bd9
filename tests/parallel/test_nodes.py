"""Two nodes: two launchers with one rendezvous on one machine, and in network namespaces if they can be created."""

import json
import os
import shutil
import subprocess
import time

import pytest

from tests.conftest import entry, run
from tests.training.jobs import LAYOUTS, Job, free_port, lines
from tests.training.kill_processes import difference

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(tiny):
    return [entry("mdm"), *tiny, "--num-layers", "4", "--micro-batch-size", "2"]


@pytest.fixture
def long(flags):
    return [*flags, "--train-samples", "100000", "--eval-interval", "100000"]


def rendezvous(kind: str, node: int, port: int, address: str = "127.0.0.1") -> tuple:
    if kind == "static":
        return "--nnodes=2", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"
    return "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", "--rdzv-id=job"


def nodes(arguments: list, folder, kind: str = "c10d", size: int = 2) -> list[Job]:
    """Start two launchers with `size` ranks each."""
    port = free_port()
    return [Job(arguments, folder / f"log{n}", size, launcher=rendezvous(kind, n, port)) for n in range(2)]


def end(jobs: list[Job], timeout: float = 120) -> list[int]:
    """Return the exit codes of the launchers."""
    try:
        return [job.wait(timeout)[1][0] for job in jobs]
    finally:
        for job in jobs:
            job.end()


@pytest.mark.parametrize("kind, layout", [("c10d", "tp2 x pp2"), ("static", "pp2 x dp2")])
def test_two_launchers_train_as_one_rank_does(kind, layout, flags, tmp_path):
    jobs = nodes([*flags, *LAYOUTS[layout], "--save", tmp_path / "two"], tmp_path, kind)
    assert end(jobs) == [0, 0], jobs[0].text()[-3000:] + jobs[1].text()[-3000:]
    run("mdm", *flags[1:], "--save", tmp_path / "one")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.parametrize("kind", ["c10d", "static"])
def test_a_killed_rank_ends_both_nodes_and_each_names_it(kind, long, tmp_path):
    folder = tmp_path / "two"
    jobs = nodes([*long, *LAYOUTS["tp2 x pp2"], "--save", folder], tmp_path, kind)
    assert jobs[0].wait_until(lambda: lines(folder) > 5)
    victim = 3
    # torchrun numbers the nodes in the order in which they connect
    assert any(job.kill(victim) for job in jobs)
    start = time.monotonic()
    assert end(jobs, 60) == [1, 1] and time.monotonic() - start < 30
    for job in jobs:
        (line,) = job.errors()
        assert f"rank {victim}" in line and "is gone" in line
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_torchrun_restarts_both_nodes(flags, tmp_path):
    port, folder = free_port(), tmp_path / "two"
    arguments = [*flags, *LAYOUTS["tp2 x dp2"], "--save-interval", "2", "--save", folder]
    jobs = [
        Job(arguments, tmp_path / f"log{n}", 2, launcher=(*rendezvous("c10d", n, port), "--max-restarts=2"))
        for n in range(2)
    ]
    assert jobs[0].wait_until(lambda: lines(folder) > 4)
    assert any(job.kill(1) for job in jobs)
    assert end(jobs, 180) == [0, 0], jobs[0].text()[-3000:] + jobs[1].text()[-3000:]
    run("mdm", *flags[1:], "--save", tmp_path / "one")
    assert difference(tmp_path / "one", folder) < 1e-4


def test_a_wrong_world_size_is_reported_once_per_node(flags, tmp_path):
    jobs = nodes([*flags, *LAYOUTS["tp2 x pp2"], "--save", tmp_path / "two"], tmp_path, size=1)
    assert end(jobs, 60) == [1, 1]
    for job in jobs:
        (line,) = job.errors()
        assert "makes groups of 4 ranks" in line and "and 2 were started" in line
        assert "exitcode  : 2" in job.text()


def test_a_rank_that_does_not_connect_is_named(flags, tmp_path):
    """As with srun if a node does not start; torchrun itself waits for its nodes."""
    arguments = [*flags, "--distributed-timeout-minutes", "0.2", "--save", tmp_path / "run"]
    job = Job(arguments, tmp_path / "log", by_hand=True)
    job.kill(3)
    assert sorted(job.wait(90)[1]) == [-9, 1, 1, 1]
    (line,) = job.errors()
    assert "--distributed-timeout-minutes 0.2: rank 3 of 4 did not connect" in line


@pytest.fixture
def namespaces():
    """Two network namespaces with a veth pair between them, 10.77.0.1 and 10.77.0.2; also the names of its ends."""
    names = [f"mt{os.getpid()}{end}" for end in "ab"]

    def ip(*words, check=True):
        return subprocess.run(["ip", *words], check=check, capture_output=True)

    if not shutil.which("ip") or ip("netns", "add", names[0], check=False).returncode:
        pytest.skip("network namespaces need the command ip and root")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def in_namespaces(arguments: list, folder, names: list[str]) -> list[Job]:
    """Start two launchers with two ranks each, one per namespace."""
    port, jobs = free_port(), []
    for node, name in enumerate(names):
        # torchrun compares the address with the host name, which both nodes share
        launcher = (*rendezvous("c10d", node, port, "10.77.0.1"), f"--local-addr=10.77.0.{node + 1}")
        launcher += (f"--rdzv-conf=is_host={'false' if node else 'true'}",)
        prefix = ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}")
        jobs.append(Job(arguments, folder / f"log{node}", 2, launcher=launcher, prefix=prefix))
        time.sleep(2)  # the first one to connect is the first node
    return jobs


def test_nodes_in_two_network_namespaces_train_together(flags, namespaces, tmp_path):
    jobs = in_namespaces([*flags, *LAYOUTS["tp2 x pp2"], "--save", tmp_path / "two"], tmp_path, namespaces)
    assert end(jobs) == [0, 0], jobs[0].text()[-3000:] + jobs[1].text()[-3000:]
    run("mdm", *flags[1:], "--save", tmp_path / "one")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


def test_a_lost_network_ends_both_nodes(long, namespaces, tmp_path):
    """No process died and no connection was closed: TCP keep-alive notices."""
    folder = tmp_path / "two"
    jobs = in_namespaces([*long, *LAYOUTS["tp2 x dp2"], "--save", folder], tmp_path, namespaces)
    try:
        assert jobs[0].wait_until(lambda: lines(folder) > 5)
        subprocess.run(["ip", "-n", namespaces[1], "link", "set", namespaces[1], "down"], check=True)
        start = time.monotonic()
        # torchrun itself waits for its own store for minutes
        while any(job.pid(rank) for job in jobs for rank in range(4)):
            assert time.monotonic() - start < 60
            time.sleep(0.1)
        for job in jobs:
            (line,) = job.errors()
            assert "cannot be reached" in line
        assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    finally:
        for job in jobs:
            job.end()
