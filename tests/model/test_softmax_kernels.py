"""The kernels of the head's loss, interpreted on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_head_with_kernels_passes_the_tests_of_the_head():
    """In a separate process: Triton decides at import whether it interprets or compiles."""
    tests = str(Path(__file__).with_name("test_linear_cross_entropy.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernels", tests]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
