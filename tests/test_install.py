"""install.sh on machines that lack a requirement. tests/run.sh covers a real installation."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT


def install(folder, *flags, version="3.11", venv=True):
    """Run install.sh in a folder of its own with a fake interpreter that only answers its checks."""
    for name in ("install.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / "python"
    minor = int(version.split(".")[1])
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *"import venv"*) exit {0 if venv else 1} ;;
    *"print"*) echo {version} ;;
    *"(3, 10)"*) exit {int(minor < 10)} ;;
    *"-m venv"*) echo making >&2; exit 7 ;;
esac
"""
    )
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python)}
    return subprocess.run(["bash", folder / "install.sh", *flags], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "flags, machine, message",
    [
        (["--fast"], {}, "install.sh --fast: unknown flag; --help lists them"),
        (["--with-apex"], {}, "install.sh --with-apex: unknown extra; give one of test, eval, deepspeed,"),
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


def test_a_sound_machine_reaches_the_creation_of_the_environment(tmp_path):
    result = install(tmp_path)
    assert result.returncode == 7 and "making" in result.stderr


def test_extras_are_installed_together_and_installed_ones_are_kept(tmp_path):
    result = install(tmp_path, "--with-wandb", "--with-test")
    assert "this package[test,wandb], into .venv" in result.stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").write_text("what it was made from  -\n3.11 [wandb,of-old]\n")
    assert "this package[tensorboard,wandb], into .venv" in install(tmp_path, "--with-tensorboard").stdout


def test_nothing_is_installed_twice():
    """tests/run.sh has just installed this environment."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("this environment was not made by install.sh")
    before = (ROOT / ".venv" / "installed").stat().st_mtime_ns
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    for flags in ([], ["--with-test"]):
        command = ["bash", "install.sh", *flags]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout == ""
    assert (ROOT / ".venv" / "installed").stat().st_mtime_ns == before
