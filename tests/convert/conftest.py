"""Trained runs that are converted, and the command that converts them."""

import json
import shutil
import subprocess
import sys

import pytest

from megatron.training.main import main
from tests.conftest import ROOT, environment


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """Runs of the objectives that have stock classes, trained one after another in this process."""
    root = tmp_path_factory.mktemp("runs")
    main("ar", [*tiny, "--ema-decay", "0.8", "--token-dropout", "0.1", "--save", str(root / "ar")])
    main("mdm", [*tiny, "--untie-embeddings-and-output-weights", "--save", str(root / "mdm")])
    main("ar", [*tiny, "--objective", "dual", "--save", str(root / "dual")])
    return root


def convert(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    """Run tools/convert_checkpoint.py in a process of its own."""
    words = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *arguments]
    surroundings = environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, words)), env=surroundings, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def changed(source, target, **sections):
    """Copy a run, and change what its config.json says."""
    shutil.copytree(source, target)
    recorded = json.loads((target / "config.json").read_text())
    for name, values in sections.items():
        recorded[name] = recorded[name] | values if isinstance(values, dict) else values
    (target / "config.json").write_text(json.dumps(recorded))
    return str(target)
