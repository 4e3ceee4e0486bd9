"""install.sh on machines that lack a requirement. tests/run.sh covers a real installation."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT


def install(folder, *flags, version="3.11", venv=True, tools="", **variables):
    """Run install.sh in a folder of its own with a fake interpreter that only answers its checks.

    The environment that it makes has no packages and logs what it runs in `log`; torch appears with pip. `tools` are
    fake programs of a CUDA machine, space-separated: nvidia-smi, nvcc (of CUDA 13.0).
    """
    for name in ("install.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    minor = int(version.split(".")[1])
    program(
        folder / "made",
        """echo "APEX_CUDA_EXT=${APEX_CUDA_EXT:-} $*" >> log
case "$*" in
    *"import torch, amp_C"*) exit 1 ;;
    *"import torch"*) [ -e torch ] && cat torch ;;
    *whl/cpu*torch) echo None > torch ;;
    *constraints.txt*torch) echo 13.0 > torch ;;
esac""",
    )
    program(
        folder / "python",
        f"""case "$*" in
    *"import venv"*) exit {0 if venv else 1} ;;
    *"print"*) echo {version} ;;
    *"(3, 10)"*) exit {int(minor < 10)} ;;
    *"-m venv"*) mkdir -p .venv/bin && cp made .venv/bin/python ;;
esac""",
    )
    (folder / "bin").mkdir(exist_ok=True)
    for tool in tools.split():
        program(folder / "bin" / tool, "echo Cuda compilation tools, release 13.0, V13.0.88")
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHON": str(folder / "python"), "PATH": path, "CUDA_HOME": ""} | variables
    return subprocess.run(["bash", folder / "install.sh", *flags], env=env, capture_output=True, text=True)


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def pip_commands(folder) -> list[str]:
    """Return what pip was called with, by install.sh."""
    lines = (folder / "log").read_text().splitlines()
    return [line for line in lines if " -m pip install " in line]


without_driver = pytest.mark.skipif(
    bool(shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")), reason="this machine has a driver"
)
without_nvcc = pytest.mark.skipif(
    bool(shutil.which("nvcc") or os.path.exists("/usr/local/cuda")), reason="this machine has the CUDA toolkit"
)


@pytest.mark.parametrize(
    "flags, machine, message",
    [
        (["--fast"], {}, "install.sh --fast: unknown flag; --help lists them"),
        (["--with-apexx"], {}, "install.sh --with-apexx: unknown extra; give one of test, eval, datasets,"),
        (["--cpu", "--cuda"], {}, "install.sh --cuda: excludes --cpu; drop one"),
        (["--with-apex", "--cpu"], {}, "install.sh --with-apex: excludes --cpu, apex is for CUDA; drop one"),
        ([], {"version": "3.9"}, "is Python 3.9; this needs 3.10 or newer"),
        (
            [],
            {"venv": False},
            "has no venv module; install its package (Debian, Ubuntu: apt-get install python3.11-venv)",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_line(flags, machine, message, tmp_path):
    result = install(tmp_path, *flags, **machine)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        pytest.param(
            ["--with-apex"],
            "is for CUDA, and this machine has no NVIDIA driver; drop it, or add --cuda",
            marks=without_driver,
        ),
        pytest.param(
            ["--with-apex", "--cuda"],
            "nvcc: not found; install the CUDA toolkit, or set CUDA_HOME",
            marks=without_nvcc,
        ),
    ],
)
def test_apex_is_refused_without_cuda_before_anything_is_installed(flags, message, tmp_path):
    result = install(tmp_path, *flags)
    assert (result.returncode, result.stderr) == (2, f"error: install.sh --with-apex: {message}\n")
    assert not (tmp_path / ".venv").exists()


CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu torch"


@pytest.mark.parametrize(
    "flags, tools, build",
    [
        pytest.param([], "", "cpu", marks=without_driver),
        (["--cpu"], "nvidia-smi", "cpu"),
        (["--cuda"], "", "cuda"),
        ([], "nvidia-smi", "cuda"),
    ],
)
def test_the_build_of_torch_follows_the_flag_or_the_driver(flags, tools, build, tmp_path):
    result = install(tmp_path, *flags, tools=tools)
    assert result.returncode == 0, result.stderr
    torch, package = pip_commands(tmp_path)
    assert (
        torch.endswith(CPU_INDEX) == (build == "cpu") and torch.endswith(" torch") and package.endswith("--editable .")
    )
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("-m megatron.check")
    assert install(tmp_path, *flags, tools=tools).stdout == ""  # nothing is installed twice


def test_another_version_of_torch_that_is_there_is_kept(tmp_path):
    install(tmp_path)
    (tmp_path / ".venv" / "installed").unlink()
    assert install(tmp_path, "--with-wandb").returncode == 0
    package = pip_commands(tmp_path)[-1]
    assert package.endswith("--constraint .venv/constraints.txt --editable .[wandb]")
    constraints = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    without_torch = (tmp_path / ".venv" / "constraints.txt").read_text().splitlines(keepends=True)
    assert without_torch == [line for line in constraints if not line.startswith("torch==")] != constraints


def test_another_build_than_the_installed_one_is_refused(tmp_path):
    install(tmp_path, "--cpu")
    result = install(tmp_path, "--cuda")
    assert result.returncode == 2
    assert result.stderr == "error: install.sh --cuda: .venv has torch for the CPU; remove .venv, and run this again\n"


def test_apex_is_built_from_the_source_of_nvidia(tmp_path):
    """The commands; that they build apex was not tested: it needs CUDA's compiler."""
    result = install(tmp_path, "--with-apex", "--with-wandb", tools="nvidia-smi nvcc")
    assert result.returncode == 0, result.stderr
    _, package, tools, apex = pip_commands(tmp_path)
    assert package.endswith("--editable .[wandb]") and tools.endswith("ninja packaging setuptools wheel")
    assert apex.startswith("APEX_CUDA_EXT=1 ") and "--no-build-isolation git+https://github.com/NVIDIA/apex@" in apex
    assert (tmp_path / ".venv" / "installed").read_text().splitlines()[1] == "3.11 [wandb,apex]"


def test_apex_needs_the_compiler_of_the_cuda_version_of_torch(tmp_path):
    (tmp_path / "torch").write_text("12.8\n")
    result = install(tmp_path, "--with-apex", tools="nvidia-smi nvcc")
    assert result.returncode == 2 and "nvcc is CUDA 13.0, and torch's 12.8; set CUDA_HOME" in result.stderr


def test_extras_are_installed_together_and_installed_ones_are_kept(tmp_path):
    result = install(tmp_path, "--with-wandb", "--with-test")
    assert "this package[test,wandb], into .venv" in result.stdout
    (tmp_path / ".venv" / "installed").write_text("what it was made from  -\n3.11 [wandb,of-old]\n")
    assert "this package[tensorboard,wandb], into .venv" in install(tmp_path, "--with-tensorboard").stdout


def test_nothing_is_installed_twice():
    """tests/run.sh has just installed this environment."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("this environment was not made by install.sh")
    before = (ROOT / ".venv" / "installed").stat().st_mtime_ns
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    result = subprocess.run(["bash", "install.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == ""
    assert (ROOT / ".venv" / "installed").stat().st_mtime_ns == before
