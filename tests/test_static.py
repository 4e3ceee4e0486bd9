"""Style, formatting and types: ruff on every file, pyright on the package; both are configured in pyproject.toml."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PYRIGHT = f"pyright --project pyproject.toml --pythonpath {sys.executable}"


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", PYRIGHT])
def test_nothing_is_found(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
