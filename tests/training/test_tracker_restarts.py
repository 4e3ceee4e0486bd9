"""Trackers over restarts: other projects and folders, failures in between. None of their curves has a gap."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import wandb

from megatron.training.command_line import parse
from megatron.training.run_folder import LockError, RunFolder
from megatron.training.trackers.base import TrackedRun
from megatron.training.trackers.mlflow import absolute_uri
from megatron.training.trackers.registry import start_trackers
from tests.training.test_trackers import RECORD, expected, find_entry, history, nobody_is_logged_in, offline_runs, shown

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 100 --global-batch-size 8"
REQUIRED = [*MODEL.split(), "--train-samples", "93", "--train-data-path", "data"]
logged_out = nobody_is_logged_in  # a fixture that every test uses


def some(*iterations: int) -> list[dict]:
    """Return records of some iterations; x axes and loss differ between iterations."""
    axes = ("iteration", "consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")
    return [RECORD | dict.fromkeys(axes, i) | {"flops": i * 1e9, "loss": 1 / i} for i in iterations]


def train(folder: Path, past: list[dict], new: list[dict], *flags, failing=None, repaired=None) -> None:
    """Start trackers after `past` records, record `new` ones and stop.

    `failing` is called before the second new record, `repaired` after the last.
    """
    run = TrackedRun(RunFolder(str(folder)), {"model": {"num_layers": 2}}, past)
    with start_trackers(parse("ar", [*REQUIRED, *map(str, flags)]), run) as trackers:
        for index, record in enumerate(new):
            if failing and index == 1:
                failing()
            trackers.record(record)
        if repaired:
            repaired()
    if "--tensorboard-dir" in flags:
        order_event_files(flags[1])


def order_event_files(board: Path) -> None:
    """Rename event files to the order of their starts: TensorBoard names them by second, then by an unpadded number."""
    for folder in board.iterdir():
        for index, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
            path.rename(folder / f"events.out.tfevents.{index:04}")


# ------------------------------------------------------------------------------------------------- TensorBoard


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_gets_the_records_after_a_failure_at_the_next_start(tmp_path, caplog):
    board, flags = tmp_path / "board", ("--tensorboard-dir", tmp_path / "board")
    train(
        tmp_path / "run",
        [],
        some(1, 2, 3, 4),
        *flags,
        failing=lambda: board.rename(tmp_path / "away"),
        repaired=lambda: (tmp_path / "away").rename(board),
    )
    assert [record.getMessage() for record in caplog.records if "is disabled" in record.getMessage()]
    assert len(shown(board)["iterations", "train/loss vs iterations"]) < 4
    train(tmp_path / "run", some(1, 2, 3, 4), some(5), *flags)
    assert shown(board) == expected(some(1, 2, 3, 4, 5))
    before = len(shown(board, hide=False)["iterations", "train/loss vs iterations"])
    train(tmp_path / "run", some(1, 2, 3, 4, 5), some(6), *flags)
    assert shown(board) == expected(some(1, 2, 3, 4, 5, 6))
    assert len(shown(board, hide=False)["iterations", "train/loss vs iterations"]) == before + 2  # 5 again, and 6


def test_tensorboard_gets_the_records_of_a_start_without_it(tmp_path):
    flags = ("--tensorboard-dir", tmp_path / "board")
    train(tmp_path / "run", [], some(1, 2), *flags)
    train(tmp_path / "run", some(1, 2), some(3, 4))
    train(tmp_path / "run", some(1, 2, 3, 4), some(5))
    train(tmp_path / "run", some(1, 2, 3, 4, 5), some(6), *flags)
    assert shown(tmp_path / "board") == expected(some(1, 2, 3, 4, 5, 6))


def test_tensorboard_in_another_folder_and_of_an_older_run_gets_all_records(tmp_path):
    train(tmp_path / "run", [], some(1, 2), "--tensorboard-dir", tmp_path / "first")
    train(tmp_path / "run", some(1, 2), some(3), "--tensorboard-dir", tmp_path / "second")
    train(tmp_path / "run", some(1, 2, 3), some(4), "--tensorboard-dir", tmp_path / "first")
    assert shown(tmp_path / "second") == expected(some(1, 2, 3))
    assert shown(tmp_path / "first") == expected(some(1, 2, 3, 4))
    (tmp_path / "run" / "tensorboard.json").unlink()  # older versions wrote none
    train(tmp_path / "run", some(1, 2, 3, 4), some(5), "--tensorboard-dir", tmp_path / "first")
    assert shown(tmp_path / "first") == expected(some(1, 2, 3, 4, 5))


def test_a_process_that_lost_the_lock_leaves_the_state_of_trackers_to_the_new_one(tmp_path):
    run = TrackedRun(RunFolder(str(tmp_path)), {}, some(1))
    run.save_identity("wandb", {"id": "mine"})
    (tmp_path / "lock").write_text("other process-1 job-none")
    for change in (lambda: run.save_missing("wandb"), lambda: run.save_identity("wandb", {"id": "other"})):
        with pytest.raises(LockError):
            change()
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "mine"}


# ------------------------------------------------------------------------------------------- Weights & Biases


@pytest.fixture
def entity(monkeypatch):
    """Return a function that sets WANDB_ENTITY for the next start of wandb, which reads it only once a process."""

    def choose(name: str) -> None:
        wandb.teardown()
        monkeypatch.setenv("WANDB_ENTITY", name)

    wandb.teardown()
    yield choose
    wandb.teardown()


def wandb_curves(folder: Path) -> list[tuple]:
    """Return (project, id, iterations) of every start, in their order."""
    wandb.teardown()  # its process writes the end of the files
    logs = [(find_entry(log, "run"), history(log)) for log in offline_runs(folder)]
    curves = [(run.project, run.run_id, [row["iteration"] for row in rows]) for run, rows in logs]
    return sorted(curves, key=lambda curve: curve[-1][-1])  # folders are named by the second


def test_another_project_or_entity_of_weights_and_biases_begins_with_the_past_records(tmp_path, entity):
    folder, first = tmp_path / "run", ("--wandb-project", "first")
    train(folder, [], some(1, 2), *first)
    train(folder, some(1, 2), some(3), "--wandb-project", "second")
    train(folder, some(1, 2, 3), some(4), "--wandb-project", "second")
    entity("team")
    train(folder, some(1, 2, 3, 4), some(5), "--wandb-project", "second")
    projects, ids, iterations = zip(*wandb_curves(folder))
    assert projects == ("first", "second", "second", "second")
    assert iterations == ([1, 2], [1, 2, 3], [4], [1, 2, 3, 4, 5])
    assert ids[1] == ids[2] and len(set(ids)) == 3
    recorded = json.loads((folder / "wandb.json").read_text())
    assert (recorded["id"], recorded["project"], recorded["entity"]) == (ids[3], "second", "team")


def test_weights_and_biases_gets_the_records_of_starts_without_it(tmp_path, entity, monkeypatch, caplog):
    folder, flags = tmp_path / "run", ("--wandb-project", "tests")
    train(folder, [], some(1, 2), *flags)
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    train(folder, some(1, 2), some(3), *flags)
    assert any("--wandb-project tests: is disabled" in record.getMessage() for record in caplog.records)
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    train(folder, some(1, 2, 3), some(4))
    train(folder, some(1, 2, 3, 4), some(5), *flags)
    (_, first, before), (_, second, after) = wandb_curves(folder)
    assert first == second and before == [1, 2] and after == [3, 4, 5]


def test_a_run_that_recorded_only_an_id_is_resumed(tmp_path, entity):
    folder = tmp_path / "run"
    train(folder, [], some(1, 2), "--wandb-project", "tests")
    recorded = json.loads((folder / "wandb.json").read_text())
    (folder / "wandb.json").write_text(json.dumps({"id": recorded["id"]}))
    train(folder, some(1, 2), some(3), "--wandb-project", "tests")
    assert [iterations for *_, iterations in wandb_curves(folder)] == [[1, 2], [3]]
    assert json.loads((folder / "wandb.json").read_text()) == recorded


# ---------------------------------------------------------------------------------------- MLflow and Trackio


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """An SQLite database with MLflow's tables, whose creation takes seconds."""
    for package in ("mlflow", "sqlalchemy"):
        pytest.importorskip(package, reason=f"{package} is not installed: bash install.sh --with-mlflow")
    folder = tmp_path_factory.mktemp("database")
    train(
        folder / "run", [], [], "--mlflow-experiment", "none", "--mlflow-tracking-uri", f"sqlite:///{folder}/empty.db"
    )
    return folder / "empty.db"


@pytest.fixture
def database(empty_database, tmp_path) -> Path:
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


def mlflow_curves(database: Path) -> dict[str, list[list[int]]]:
    """Return the iterations of every run by experiment, each run's in the order of their writing."""
    query = """SELECT experiments.name, run_uuid, step FROM metrics JOIN runs USING (run_uuid)
        JOIN experiments USING (experiment_id) WHERE key = 'train/loss' ORDER BY runs.start_time, metrics.rowid"""
    runs: dict[tuple, list[int]] = {}
    with closing(sqlite3.connect(database)) as connection:
        for experiment, run, step in connection.execute(query):
            runs.setdefault((experiment, run), []).append(step)
    curves: dict[str, list[list[int]]] = {}
    for (experiment, _), steps in runs.items():
        curves.setdefault(experiment, []).append(steps)
    return curves


def execute(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
        connection.commit()


def test_another_experiment_of_mlflow_begins_with_the_past_records(database, tmp_path):
    def restart(experiment: str, past: list[dict], new: list[dict]) -> None:
        uri = f"sqlite:///{database}"
        train(tmp_path / "run", past, new, "--mlflow-experiment", experiment, "--mlflow-tracking-uri", uri)

    restart("first", [], some(1, 2))
    restart("second", some(1, 2), some(3))
    restart("second", some(1, 2, 3), some(4))
    assert mlflow_curves(database) == {"first": [[1, 2]], "second": [[1, 2, 3, 4]]}


def test_mlflow_gets_the_records_after_a_failure_at_the_next_start(database, tmp_path, caplog):
    flags = ("--mlflow-experiment", "tests", "--mlflow-tracking-uri", f"sqlite:///{database}")
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'no space left'); END"
    train(
        tmp_path / "run",
        [],
        some(1, 2, 3, 4),
        *flags,
        failing=lambda: execute(database, refuse),
        repaired=lambda: execute(database, "DROP TRIGGER refuse"),
    )
    assert any("no space left" in record.getMessage() for record in caplog.records)
    assert mlflow_curves(database) == {"tests": [[1]]}
    train(tmp_path / "run", some(1, 2, 3), some(4), *flags)  # 4 was after the checkpoint
    train(tmp_path / "run", some(1, 2, 3, 4), some(5), *flags)
    assert mlflow_curves(database) == {"tests": [[1, 2, 3, 4, 5]]}


def test_a_relative_database_of_mlflow_is_that_of_the_working_directory(database, tmp_path, monkeypatch, caplog):
    def restart(uri: str, past: list[dict], new: list[dict]) -> None:
        train(tmp_path / "run", past, new, "--mlflow-experiment", "tests", "--mlflow-tracking-uri", uri)

    (tmp_path / "other").mkdir()
    shutil.copy(database, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    restart("sqlite:///mlflow.db", [], some(1, 2))
    assert json.loads((tmp_path / "run" / "mlflow.json").read_text())["tracking_uri"] == f"sqlite:///{database}"
    monkeypatch.chdir(tmp_path / "other")
    restart(f"sqlite:///{database}", some(1, 2), some(3))
    restart("sqlite:///mlflow.db", some(1, 2, 3), some(4))
    assert mlflow_curves(database) == {"tests": [[1, 2, 3]]}
    assert mlflow_curves(tmp_path / "other" / "mlflow.db") == {"tests": [[1, 2, 3, 4]]}
    assert not [record for record in caplog.records if "is disabled" in record.getMessage()]


def test_only_paths_of_databases_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/../a.db?timeout=9") == f"sqlite:///{tmp_path}/a.db?timeout=9"
    for uri in (
        "sqlite:////data/a.db",
        "sqlite:///:memory:",
        "http://host:1",
        "file:///data",
        "databricks",
        "sqlite://",
    ):
        assert absolute_uri(uri) == uri
