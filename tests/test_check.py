"""The check of a machine: what is there is named, and what is planted as missing fails with the remedy."""

import os
import re
import subprocess
import sys
import time

import pytest

from megatron import check
from tests.conftest import ROOT, environment

SURROUNDINGS = {name: value for name, value in environment().items() if not name.endswith("_SOCKET_IFNAME")}


def run(**variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron.check"]
    return subprocess.run(command, cwd=ROOT, env=SURROUNDINGS | variables, capture_output=True, text=True, timeout=150)


def failures(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("FAILED")]


def alive(word: str) -> list[str]:
    """Return the processes that have `word` in their command line."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if word in line]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in set(os.environ) - set(SURROUNDINGS):
        monkeypatch.delenv(name)


def test_a_sound_machine_passes():
    done = run()
    assert done.returncode == 0 and not failures(done.stdout), done.stdout + done.stderr
    named = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"python", *check.CORE, *check.OPTIONAL, "CPU", "C++ compiler", "host name"} <= set(named)
    assert re.search(r"^gloo +2 processes, all-reduce and broadcast ok in [\d.]+ s$", done.stdout, re.MULTILINE)


def test_an_unusable_interface_is_named_with_the_remedy():
    done = run(GLOO_SOCKET_IFNAME="none0")
    (line,) = failures(done.stdout)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "GLOO_SOCKET_IFNAME=none0 is no interface with an address: unset it, or name one of lo" in line


def test_a_device_that_torch_cannot_use_is_told(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 999.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = list(check.devices())
    assert check.Finding("NVIDIA driver", "999.1") in found
    (failure,) = [finding for finding in found if finding.failed]
    assert failure.name == "CUDA" and "torch finds no device" in failure.said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which hides it on purpose
    assert not any(finding.failed for finding in check.devices())


def test_what_torchrun_left_is_named():
    done = run(RANK="0", WORLD_SIZE="2")
    (line,) = failures(done.stdout)
    assert done.returncode == 1 and "unset RANK WORLD_SIZE" in line


def test_a_missing_peer_is_named_after_the_limit_and_leaves_no_process(tmp_path, monkeypatch):
    peer = tmp_path / "one_is_missing.py"
    peer.write_text(
        "import os, time\nfrom megatron.check import main\nmain() if os.environ['RANK'] == '0' else time.sleep(100)\n"
    )
    monkeypatch.setattr(check, "MEMBER", (str(peer),))
    start = time.monotonic()
    found = check.collective("gloo", 2, 20, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert found.failed and 20 < time.monotonic() - start < 40
    assert (
        "no answer within 20 s (process 0 is waiting for the others to join, process 1 has not started)" in found.said
    )
    assert alive(str(peer)) == []


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise SystemExit('as planted')", "ended early: "),
        ("import torch.distributed as d; d.broadcast = lambda *a, **k: None; main()", "broadcast on cpu gave 6"),
        ("import torch.distributed as d; d.all_reduce = lambda *a, **k: None; main()", "all-reduce on cpu gave"),
    ],
)
def test_a_wrong_answer_and_none_are_told(code, said, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"from megatron.check import main\n{code}\n")
    monkeypatch.setattr(check, "MEMBER", (str(tmp_path / "planted.py"),))
    found = check.collective("gloo", 2, 60, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert found.failed and said in found.said and "\n" not in found.said


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere.invalid", "nowhere.invalid has no address: torchrun would wait for ever; add the line `127.0.1.1 "),
        ("192.0.2.254", "192.0.2.254 is said to be at 192.0.2.254, which is not this machine"),
    ],
)
def test_a_host_name_that_leads_nowhere_is_told(name, said, monkeypatch):
    monkeypatch.setattr(check.socket, "getfqdn", lambda: name)
    (found,) = [finding for finding in check.network_findings() if finding.failed]
    assert said in found.said and found.said.endswith("--local-addr localhost")


def test_a_package_that_is_missing_or_old_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    monkeypatch.setattr(check, "TORCH", (99, 0))
    tokenizers, torch = [f"{found}" for found in check.findings(60) if found.failed][::-1]
    assert re.match(r"FAILED  tokenizers .*; run: bash install.sh$", tokenizers)
    assert re.match(r"FAILED  torch .* is too old; install 99.0 or newer$", torch)


def test_packages_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text()
    assert f'"torch>={check.TORCH[0]}.{check.TORCH[1]}"' in setup
    needed = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1]
    assert {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.*?)"', needed)} == set(check.CORE)
    for name, extra in check.OPTIONAL.items():
        assert f'"{name}' in re.search(rf'"{extra}": \[(.*)\],\n', setup)[1]
