"""TensorBoard and Weights & Biases mirror metrics.jsonl over restarts and branches, and their failures end no run."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from megatron.config.sections import TrackingConfig
from megatron.training.launcher import main
from megatron.training.run_folder import RunFolder
from megatron.training.trackers.base import TrackedRun
from megatron.training.trackers.registry import Trackers
from megatron.training.trackers.tensorboard import TensorBoard
from tests.conftest import environment, records, run
from tests.training.runs import Run

AXES = {
    "iterations": lambda record: record["iteration"],
    "samples": lambda record: record["consumed_samples"],
    "tokens": lambda record: record["consumed_tokens"],
    "epochs": lambda record: round(1000 * record["epoch"]),
    "flops": lambda record: round(record["flops"] / 1e9),
}
TEXT = ("kind", "set", "alignment", "likelihood", "bound")
RECORD = {"kind": "train", "iteration": 1, "consumed_samples": 8, "consumed_tokens": 256, "epoch": 0.1, "flops": 1e9}
RECORD |= {"seconds": 1.0, "loss": 2.0}
VOLATILE = ("seconds", "tokens_per_second", "mfu", "memory_bytes")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)


def boards(folder):
    """Return the flags of both trackers, with a TensorBoard folder inside the run's."""
    return ["--save", folder, "--tensorboard-dir", folder / "board", "--wandb-project", "tests"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An uninterrupted run with a board per axis, and Weights & Biases without a login."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        done = run("mdm", *tiny, *boards(folder))
    (message,) = [line for line in done.stderr.splitlines() if "wandb" in line]
    assert "--wandb-project tests: offline" in message and f"wandb sync {folder}/wandb/offline-run-" in message
    return folder


def shown(board, hide=True) -> dict[str, list[tuple]]:
    """Return the points (step, value) of every curve on a board, by axis and tag."""
    points = {}
    for axis in AXES:
        events = EventAccumulator(str(board / axis), {"scalars": 0}, purge_orphaned_data=hide).Reload()
        for tag in events.Tags()["scalars"]:
            points[axis, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return points


def expected(metrics: list[dict]) -> dict[str, list[tuple]]:
    """Return the points that a board must show of some records."""
    points = {}
    for record in metrics:
        group = "train" if record["kind"] == "train" else f"valid/{record['set']}"
        values = {name: value for name, value in record.items() if name not in TEXT and value is not None}
        values.pop("iteration")
        if record["kind"] == "valid":
            values = {name: value for name, value in values.items() if name not in ("seconds", "epoch", "flops")}
            values = {name: value for name, value in values.items() if not name.startswith("consumed")}
            values["perplexity"] = math.exp(record["loss"])
        for axis, step in AXES.items():
            for name, value in values.items():
                if axis == "iterations" or name in ("loss", "perplexity"):
                    value = struct.unpack("f", struct.pack("f", value))[0]
                    points.setdefault((axis, f"{group}/{name} vs {axis}"), []).append((step(record), value))
    return points


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steady(curves: dict) -> dict:
    """Return curves without those that differ between equal runs."""
    return {(axis, tag): points for (axis, tag), points in curves.items() if not any(name in tag for name in VOLATILE)}


def offline_runs(folder) -> list[list[Record]]:
    """Return the Weights & Biases log of each start; its records may be split at 32 kB blocks."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, position, buffer, entries = path.read_bytes(), 7, b"", []
        while position + 7 <= len(data):
            remaining = 32768 - position % 32768
            if remaining < 7:
                position += remaining
                continue
            _, size, kind = struct.unpack_from("<IHB", data, position)
            buffer += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # a whole record, or its last fragment
                entries.append(Record.FromString(buffer))
                buffer = b""
        runs.append(entries)
    return runs


def history(log: list[Record]) -> list[dict]:
    """Return the rows of a log, without the fields that it adds."""
    rows = [record.history.item for record in log if record.WhichOneof("record_type") == "history"]
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def find_entry(log: list[Record], kind: str):
    return next(getattr(record, kind) for record in log if record.WhichOneof("record_type") == kind)


def test_a_board_shows_the_records_on_every_axis(whole):
    metrics = read_metrics(whole)
    assert shown(whole / "board") == expected(metrics)
    curves = {("tokens", "train/loss vs tokens"), ("flops", "valid/tuning/perplexity vs flops")}
    assert curves <= expected(metrics).keys()


def test_weights_and_biases_has_every_record_with_its_clocks(whole):
    (log,) = offline_runs(whole)
    for row, record in zip(history(log), read_metrics(whole), strict=True):
        group = "train" if record["kind"] == "train" else f"valid/{record['set']}"
        assert row["consumed_samples"] == record["consumed_samples"] and row["flops"] == record["flops"]
        assert row["iteration"] == record["iteration"] and row["epoch"] == record["epoch"]
        assert row["consumed_tokens"] == record["consumed_tokens"] and row[f"{group}/loss"] == record["loss"]
    begun = find_entry(log, "run")
    assert begun.project == "tests" and begun.display_name == whole.name
    assert begun.run_id == json.loads((whole / "wandb.json").read_text())["id"]
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["model"]["num_layers"] == 2 and settings["tracking"]["wandb_project"] == "tests"
    metrics = [record.metric for record in log if record.WhichOneof("record_type") == "metric"]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics][-1] == ("*", "iteration")


def test_after_a_kill_the_board_equals_that_of_an_uninterrupted_run(whole, tiny, tmp_path):
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "iter_0000004"
    with Run("mdm", [*tiny, *boards(tmp_path)], tmp_path / "output") as training:
        training.wait_until((tmp_path / "board").exists)
        training.wait_until(lambda: '"iteration": 6,' in metrics.read_text())
        training.wait_until(saved.exists)  # it is written while the run continues
        training.signal("SIGKILL")
        assert training.codes() == [-signal.SIGKILL]
    wandb_id = (tmp_path / "wandb.json").read_text()
    run("mdm", *tiny, *boards(tmp_path))
    assert shown(tmp_path / "board") == expected(read_metrics(tmp_path))
    assert steady(shown(tmp_path / "board")) == steady(shown(whole / "board"))
    everything = shown(tmp_path / "board", hide=False)["iterations", "train/loss vs iterations"]
    assert len(everything) > len(shown(whole / "board")["iterations", "train/loss vs iterations"])  # some was dropped
    assert (tmp_path / "wandb.json").read_text() == wandb_id
    killed, resumed = offline_runs(tmp_path)
    begun = [record.run.run_id for log in (killed, resumed) for record in log if record.HasField("run")]
    assert set(begun) == {json.loads(wandb_id)["id"]}  # wandb may not have written even the id before the kill
    assert history(resumed)[-1]["iteration"] == 12 and find_entry(resumed, "exit").exit_code == 0
    assert history(resumed)[0]["iteration"] == 5  # earlier records are in the first log


@pytest.mark.slow
def test_a_kill_loses_no_record_that_is_older_than_a_second(tmp_path):
    """Both the run and the wandb process that writes the file are killed."""
    code = f"""
import time
from megatron.config.sections import TrackingConfig
from megatron.training.trackers.base import TrackedRun
from megatron.training.trackers.wandb import WeightsAndBiases
settings = TrackingConfig(wandb_project="tests", wandb_save_dir={str(tmp_path)!r})
tracker = WeightsAndBiases(settings, TrackedRun(None, {{}}, []))
for iteration in range(300):
    tracker.record({RECORD!r} | {{"iteration": iteration}})
print("recorded", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "recorded\n"
    time.sleep(2)
    (writer,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (int(writer), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    (log,) = offline_runs(tmp_path)
    assert [row["iteration"] for row in history(log)] == list(range(300))


def test_a_branch_begins_with_the_records_of_its_origin(whole, tiny, tmp_path):
    longer = [flag if flag != "93" else "120" for flag in tiny]
    run("mdm", *longer, "--load", whole, *boards(tmp_path))
    metrics = read_metrics(tmp_path)
    assert metrics[: len(read_metrics(whole))] == read_metrics(whole) and metrics[-1]["consumed_samples"] == 120
    assert shown(tmp_path / "board") == expected(metrics)
    assert (tmp_path / "wandb.json").read_text() != (whole / "wandb.json").read_text()
    assert [row["iteration"] for row in history(*offline_runs(tmp_path))] == [row["iteration"] for row in metrics]


@pytest.mark.slow
def test_a_run_older_than_its_trackers_is_resumed_and_evaluated(whole, tiny, tmp_path):
    shutil.copytree(whole, tmp_path / "old", ignore=shutil.ignore_patterns("board", "wandb*"))
    for path in (tmp_path / "old").rglob("*.json"):
        value = json.loads(path.read_text())
        for settings in (value, value.get("config", {})):
            settings.pop("tracking", None)
        path.write_text(json.dumps(value))
    run("mdm", "--skip-train", "--load", tmp_path / "old")
    run("mdm", *tiny, *boards(tmp_path / "old"))
    assert shown(tmp_path / "old" / "board") == expected(read_metrics(whole))


def test_an_evaluation_touches_no_tracker(whole):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    done = run("mdm", "--skip-train", "--load", whole)
    assert len(done.stdout.splitlines()) == 2 and "wandb" not in done.stderr
    evaluated = run("mdm", "--skip-train", "--load", whole, "--tensorboard-dir", whole / "other")
    assert f"--tensorboard-dir {whole}/other: has no effect, an evaluation is printed" in evaluated.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before


def test_two_processes_have_one_board_and_a_failed_run_closes_it(tiny, tmp_path):
    flags = [*tiny, "--lr", "1e30", "--clip-grad", 0, "--eval-interval", 100, *boards(tmp_path)]
    assert run("ar", *flags, processes=2, check=False).returncode != 0
    assert all(len(list((tmp_path / "board" / axis).iterdir())) == 1 for axis in AXES)
    assert shown(tmp_path / "board") == expected(read_metrics(tmp_path)) and len(records(tmp_path)) == 1
    (log,) = offline_runs(tmp_path)
    assert len(history(log)) == 1 and find_entry(log, "exit").exit_code == 1


# -------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "flag, value, package",
    [
        ("--tensorboard-dir", "board", "tensorboard"),
        ("--wandb-project", "tests", "wandb"),
        ("--trackio-project", "tests", "trackio"),
        ("--mlflow-experiment", "tests", "mlflow"),
    ],
)
def test_a_missing_package_is_reported_before_anything_is_written(
    flag, value, package, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(SystemExit) as caught:
        main("ar", [*tiny, "--save", str(tmp_path / "run"), flag, value])
    stderr = capsys.readouterr().err
    assert caught.value.code == 2 and len(stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert stderr.startswith(f"error: {flag} {value}: needs the package {package}; bash install.sh --with-{package}")


def test_trackers_that_cannot_start_are_disabled_with_a_line_each(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    flags = ["--save", tmp_path / "run", "--tensorboard-dir", tmp_path / "file", "--wandb-project", "tests"]
    done = run("ar", *tiny, *flags)
    warnings = [line for line in done.stderr.splitlines() if "is disabled" in line]
    assert len(warnings) == 2 and "Traceback" not in done.stderr
    assert f"--tensorboard-dir {tmp_path / 'file'}:" in warnings[0] and "--wandb-project tests:" in warnings[1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_fails_later_is_disabled_and_the_other_continues(tmp_path, caplog):
    boards = {name: TrackingConfig(tensorboard_dir=str(tmp_path / name)) for name in ("lost", "kept")}
    trackers = Trackers(
        {name: lambda board=board: TensorBoard(board, TrackedRun(None, {}, [])) for name, board in boards.items()}
    )
    with trackers:
        trackers.record(RECORD)
        shutil.rmtree(tmp_path / "lost")
        for iteration in (2, 3):
            trackers.record(RECORD | {"iteration": iteration})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("lost: is disabled") and "the run continues" in warning and "\n" not in warning
    curve = shown(tmp_path / "kept")["iterations", "train/loss vs iterations"]
    assert curve == [(1, 2.0), (2, 2.0), (3, 2.0)] and not (tmp_path / "lost").exists()


def test_a_step_that_rounding_shares_is_neither_lost_nor_doubled(tmp_path):
    """On the axes of epochs and FLOPs several records share a step; a resume drops some of them."""
    board = TrackingConfig(tensorboard_dir=str(tmp_path / "board"))
    folder = RunFolder(str(tmp_path / "run"))
    all_records = [
        RECORD | {"iteration": i, "epoch": i / 3000, "flops": i * 4e8, "loss": float(i)} for i in range(1, 12)
    ]
    with Trackers({"": lambda: TensorBoard(board, TrackedRun(folder, {}, []))}) as trackers:
        for record in all_records[:8]:
            trackers.record(record)
    with Trackers({"": lambda: TensorBoard(board, TrackedRun(folder, {}, all_records[:4]))}) as trackers:
        for record in all_records[4:]:
            trackers.record(record)
    assert shown(tmp_path / "board") == expected(all_records)


def test_a_run_started_again_hides_the_events_of_the_last_attempt(tmp_path):
    board = TrackingConfig(tensorboard_dir=str(tmp_path))
    for loss in (1.0, 2.0):
        with Trackers({"": lambda: TensorBoard(board, TrackedRun(None, {}, []))}) as trackers:
            trackers.record(RECORD | {"loss": loss})
    assert shown(tmp_path) == expected([RECORD | {"loss": 2.0}])
