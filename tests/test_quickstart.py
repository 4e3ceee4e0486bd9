"""The main job as a user runs it: at toy size in the fast tier, whole in the slow one."""

import json
import os
import subprocess
import time

import pytest

from megatron.scaling.runs import best_point, curve, load_run, paired_difference
from tests.conftest import ROOT, environment, records

SCRIPT = "examples_scaling/quickstart/run.sh"
LONG = ("ar", "mdm", "ar_regularised")
RUNS = (*LONG, "ar_short")


def quickstart(folder, *flags):
    """Run the script with its output in `folder`, as a user of two cores would, and return what it printed."""
    surroundings = {
        name: value for name, value in environment().items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")
    }
    surroundings |= {"OUT": str(folder / "runs"), "DATA": str(folder / "data")}
    command = ["bash", SCRIPT, *flags]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_main_job_runs_from_end_to_end_and_resumes(tmp_path):
    small = ["--train-epochs", "1", "--eval-samples", "4", "--eval-interval", "6"]
    first = quickstart(tmp_path, *small)
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "source code of Python" in page and "stand in the training split too" in page
    for name in RUNS:
        status = json.loads((tmp_path / "runs" / name / "status.json").read_text())
        assert (status["state"], status["consumed_samples"]) == ("finished", 390)
        assert name in first
    before = {name: records(tmp_path / "runs" / name) for name in RUNS}
    assert "holds this corpus already" in quickstart(tmp_path, *small)
    assert {name: records(tmp_path / "runs" / name) for name in RUNS} == before


def test_dry_run_prints_commands_and_does_nothing(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, "--seed", "2"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"DRY_RUN": "1", "OUT": str(tmp_path / "runs"), "DATA": str(tmp_path / "data")},
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 6 and done.stdout.count("--seed 2") == 4
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_repetition_hurts_the_autoregressive_model(tmp_path):
    """Within 15 minutes, AR's last validation loss lies 0.05 nats and 5 paired standard errors above its best."""
    began = time.monotonic()
    quickstart(tmp_path)
    assert time.monotonic() - began < 15 * 60
    runs = {name: load_run(tmp_path / "runs" / name) for name in RUNS}
    assert len({runs[name].valid["validation"][-1]["flops"] for name in LONG}) == 1
    ar = runs["ar"]
    gap = paired_difference((ar, curve(ar, "validation")[-1]), (ar, best_point(ar, "tuning", "validation")))
    assert gap.nats > 0.05 and gap.ratio > 5
