"""Trained runs to convert, and a function that runs the conversion tool."""

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from warnings import catch_warnings

import pytest

from megatron.training.launcher import main
from tests.conftest import ROOT, run_python


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """Runs of the objectives that stock classes support, trained one after another in this process."""
    root = tmp_path_factory.mktemp("runs")
    main("ar", [*tiny, "--ema-decay", "0.8", "--token-dropout", "0.1", "--save", str(root / "ar")])
    main("mdm", [*tiny, "--untie-embeddings-and-output-weights", "--save", str(root / "mdm")])
    main("ar", [*tiny, "--objective", "dual", "--save", str(root / "dual")])
    return root


TOOL = ROOT / "tools" / "convert_checkpoint.py"


def convert(*arguments, process: bool = False, check: bool = True) -> subprocess.CompletedProcess:
    """Run tools/convert_checkpoint.py in this process, or in a process of its own, which takes seconds."""
    words = list(map(str, arguments))
    if process:
        result = run_python(TOOL, *words, HF_HUB_OFFLINE="1")
    else:
        result = subprocess.CompletedProcess(words, 0)
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), catch_warnings():
            patch.setattr(sys, "argv", [str(TOOL), *words])
            patch.setattr(sys, "path", [*sys.path])
            try:
                runpy.run_path(str(TOOL), run_name="__main__")
            except SystemExit as exit_request:
                result.returncode = exit_request.code
        result.stdout, result.stderr = out.getvalue(), err.getvalue()
    assert not check or result.returncode == 0, result.stderr
    return result
