"""megatron.check: a sound machine passes, and planted faults are reported with a remedy."""

import os
import re
import subprocess
import sys
import time

import pytest

from megatron import check
from tests.conftest import ROOT, environment
from tests.forked import run_script

VARIABLES = {name: value for name, value in environment().items() if not name.endswith("_SOCKET_IFNAME")}


def run(**variables) -> subprocess.CompletedProcess:
    """Run megatron.check with further environment variables."""
    return run_script(["-m", "megatron.check"], VARIABLES | variables, 150)


def failures(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("FAILED")]


def alive(word: str) -> list[str]:
    """Return the command lines of running processes that contain `word`."""
    output = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if word in line]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in set(os.environ) - set(VARIABLES):
        monkeypatch.delenv(name)


def test_a_sound_machine_passes():
    result = run()
    assert result.returncode == 0 and not failures(result.stdout), result.stdout + result.stderr
    names = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert {"python", *check.CORE, *check.OPTIONAL, "CPU", "C++ compiler", "host name"} <= set(names)
    assert re.search(r"^gloo +2 ranks, all-reduce and broadcast ok in [\d.]+ s$", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_an_unusable_interface_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    finding = check.collective("gloo", 1, 60, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert finding.failed and "Traceback" not in finding.text and "\n" not in finding.text
    assert "GLOO_SOCKET_IFNAME=none0 is not an interface with an address: unset it, or use one of lo" in finding.text


def test_a_device_that_torch_cannot_use_is_reported(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 999.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    findings = list(check.devices())
    assert check.Finding("NVIDIA driver", "999.1") in findings
    (failure,) = [finding for finding in findings if finding.failed]
    assert failure.name == "CUDA" and "torch finds no device" in failure.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the device on purpose
    assert not any(finding.failed for finding in check.devices())


def test_left_over_variables_of_torchrun_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (failure,) = [finding for finding in check.network_findings() if finding.name == "environment"]
    assert failure.failed and failure.text.endswith("unset RANK WORLD_SIZE")


def test_ranks_that_have_not_finished_are_named_with_their_stages(tmp_path):
    (tmp_path / "0").write_text("is waiting for other ranks to join")
    text = check._fault(tmp_path, 2, 20.0)
    assert text.startswith(
        "not finished within 20 s (rank 0 is waiting for other ranks to join, rank 1 has not started); a firewall or"
    )
    (tmp_path / "output").write_text("first\nlast\n")
    assert check._fault(tmp_path, 2, None).startswith("ended early: last; ")


@pytest.mark.slow
def test_a_missing_rank_is_named_after_the_limit_and_no_process_is_left(tmp_path, monkeypatch):
    program = tmp_path / "rank_1_sleeps.py"
    program.write_text(
        "import os, time\nfrom megatron.check import main\nmain() if os.environ['RANK'] == '0' else time.sleep(100)\n"
    )
    monkeypatch.setattr(check, "RANK_PROGRAM", (str(program),))
    start = time.monotonic()
    finding = check.collective("gloo", 2, 20, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert finding.failed and 20 < time.monotonic() - start < 40
    assert (
        "not finished within 20 s (rank 0 is waiting for other ranks to join, rank 1 has not started)" in finding.text
    )
    assert alive(str(program)) == []


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise SystemExit('as planted')", "ended early: "),
        pytest.param(
            "import torch.distributed as d; d.broadcast = lambda *a, **k: None; main()",
            "broadcast on cpu gave 6",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import torch.distributed as d; d.all_reduce = lambda *a, **k: None; main()",
            "all-reduce on cpu gave",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_result_and_an_early_end_are_reported(code, message, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"from megatron.check import main\n{code}\n")
    monkeypatch.setattr(check, "RANK_PROGRAM", (str(tmp_path / "planted.py"),))
    finding = check.collective("gloo", 2, 60, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert finding.failed and message in finding.text and "\n" not in finding.text


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.invalid", "nowhere.invalid has no address: torchrun would hang; add the line `127.0.1.1 "),
        ("192.0.2.254", "192.0.2.254 resolves to 192.0.2.254, which is not this machine"),
    ],
)
def test_a_host_name_that_does_not_resolve_to_this_machine_is_reported(name, message, monkeypatch):
    monkeypatch.setattr(check.socket, "getfqdn", lambda: name)
    (failure,) = [finding for finding in check.network_findings() if finding.failed]
    assert message in failure.text and failure.text.endswith("--local-addr localhost")


def test_a_package_that_is_missing_or_old_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # simulates a missing package
    monkeypatch.setattr(check, "TORCH", (99, 0))
    tokenizers, torch = [str(finding) for finding in check.core_packages() if finding.failed][::-1]
    assert re.match(r"FAILED  tokenizers .*; run: bash install.sh$", tokenizers)
    assert re.match(r"FAILED  torch .* is too old; install 99.0 or newer, below 2.16$", torch)


def test_a_torch_that_is_too_new_is_reported(monkeypatch):
    monkeypatch.setattr(check, "TORCH_BELOW", (2, 11))
    (torch,) = [str(finding) for finding in check.core_packages() if finding.failed]
    assert re.match(r"FAILED  torch .* is too new; install 2.11 or newer, below 2.11$", torch)


def test_packages_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text()
    (oldest, below) = (".".join(map(str, limit)) for limit in (check.TORCH, check.TORCH_BELOW))
    assert f'"torch>={oldest},<{below}"' in setup
    requirements = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1]
    assert {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.*?)"', requirements)} == set(check.CORE)
    for name, extra in check.OPTIONAL.items():
        assert f'"{name}' in re.search(rf'"{extra}": \[(.*)\],\n', setup)[1]
