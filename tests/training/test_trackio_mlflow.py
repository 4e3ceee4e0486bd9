"""Trackio and MLflow, offline in SQLite databases: every record, one run over restarts and kills, no failed run.

They are no requirement of the test extra; without them these tests are skipped:
bash install.sh --with-trackio --with-mlflow
"""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from megatron.training.trackers.base import with_axes
from tests.conftest import entry, environment, run
from tests.training.test_trackers import read_metrics

for package in ("trackio", "mlflow", "sqlalchemy"):
    pytest.importorskip(package, reason=f"{package} is not installed")

PROJECT = "tests"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A machine that is logged in nowhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def flags(tmp_path, name: str = "mine") -> list:
    """Return the flags of both trackers."""
    database = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["--trackio-project", PROJECT, "--mlflow-experiment", PROJECT, "--mlflow-tracking-uri", database]
    return ["--save", tmp_path / name, *words]


def rows(path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def trackio_history(tmp_path) -> dict[str, list[dict]]:
    """Return the records of every run of the project by its name, in the order of their writing."""
    table = rows(tmp_path / "trackio" / f"{PROJECT}.db", "SELECT run_name, step, metrics FROM metrics ORDER BY id")
    histories: dict[str, list[dict]] = {}
    for name, step, metrics in table:
        histories.setdefault(name, []).append(json.loads(metrics) | {"iteration": step})
    return histories


def mlflow_history(tmp_path) -> dict[str, list[tuple]]:
    """Return the (name, step, value) of all metrics of every run by its name."""
    query = "SELECT name, key, step, value FROM metrics JOIN runs USING (run_uuid)"
    histories: dict[str, list[tuple]] = {}
    for name, *point in rows(tmp_path / "mlflow.db", query):
        histories.setdefault(name, []).append(tuple(point))
    return histories


def expected(metrics) -> list[dict]:
    return [with_axes(record) for record in metrics]


def points(metrics: list[dict]) -> set[tuple]:
    """Return the (name, step, value) that MLflow must have of some records."""
    axes = ("consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")
    return {
        (name, record["iteration"], value)
        for record in metrics
        for name, value in with_axes(record).items()
        if name in axes * (record["kind"] == "train") or "/" in name
    }


def test_both_have_every_record_and_a_resumed_run_continues(tiny, tmp_path):
    first = run("mdm", *tiny, *flags(tmp_path), "--exit-interval", 4, check=False)
    assert f"--trackio-project {PROJECT}: run mine" in first.stderr and "* " not in first.stdout + first.stderr
    assert f"--mlflow-experiment {PROJECT}: run " in first.stderr and "disabled" not in first.stderr
    identity = json.loads((tmp_path / "mine" / "mlflow.json").read_text())
    run("mdm", *tiny, *flags(tmp_path))
    metrics = read_metrics(tmp_path / "mine")
    assert metrics[-1]["iteration"] == 12
    assert trackio_history(tmp_path) == {"mine": expected(metrics)}
    history = mlflow_history(tmp_path)
    assert set(history) == {"mine"} and set(history["mine"]) == points(metrics)
    assert len(history["mine"]) == len(points(metrics))
    ((status, number),) = rows(tmp_path / "mlflow.db", "SELECT status, run_uuid FROM runs")
    assert status == "FINISHED" and number == identity["run_id"]
    parameters = dict(rows(tmp_path / "mlflow.db", "SELECT key, value FROM params"))
    assert parameters["model.num_layers"] == "2" and parameters["objective_name"] == "mdm"


@pytest.mark.slow
def test_a_killed_run_continues_and_a_branch_has_the_records_of_its_origin(tiny, tmp_path):
    command = [sys.executable, entry("mdm"), *tiny, *map(str, flags(tmp_path))]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "mine" / "checkpoints" / "iter_0000004").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run("mdm", *tiny, *flags(tmp_path))
    metrics = read_metrics(tmp_path / "mine")
    history = trackio_history(tmp_path)
    assert set(history) == {"mine"}
    since = expected(record for record in metrics if record["iteration"] > 4)  # the checkpoint
    assert history["mine"][-len(since) :] == since
    assert points(metrics) <= set(mlflow_history(tmp_path)["mine"]) and len(mlflow_history(tmp_path)) == 1
    longer = [flag if flag != "93" else "120" for flag in tiny]
    (tmp_path / "other").mkdir()
    run("mdm", *longer, "--load", tmp_path / "mine", *flags(tmp_path, "other/mine"))
    branch = read_metrics(tmp_path / "other" / "mine")
    assert trackio_history(tmp_path)["mine-2"] == expected(branch)
    assert len(rows(tmp_path / "mlflow.db", "SELECT run_uuid FROM runs")) == 2
    run("mdm", *longer, *flags(tmp_path, "other/mine"))  # finished: nothing is added to either
    assert trackio_history(tmp_path)["mine-2"] == expected(branch)


@pytest.mark.slow
def test_a_server_that_does_not_answer_and_a_folder_that_cannot_be_written_end_no_run(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file"))
    words = ["--trackio-project", PROJECT, "--mlflow-experiment", PROJECT, "--mlflow-tracking-uri"]
    begin = time.monotonic()
    done = run("ar", *tiny, "--save", tmp_path / "mine", *words, "http://127.0.0.1:9")
    assert time.monotonic() - begin < 120
    warnings = [line for line in done.stderr.splitlines() if "is disabled" in line]
    assert len(warnings) == 1 and "--mlflow-experiment tests: is disabled" in warnings[0], done.stderr
    assert "trackio failed to flush" in done.stderr and "Traceback" not in done.stderr  # it reports that itself
    assert json.loads((tmp_path / "mine" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_failed_run_is_marked_as_failed(tiny, tmp_path):
    diverging = [*tiny, "--lr", "1e30", "--clip-grad", 0, "--eval-interval", 100]
    assert run("ar", *diverging, *flags(tmp_path), processes=2, check=False).returncode != 0
    assert rows(tmp_path / "mlflow.db", "SELECT status FROM runs") == [("FAILED",)]
    assert trackio_history(tmp_path) == {"mine": expected(read_metrics(tmp_path / "mine"))}
