"""Archives of records: what they hold, and that runs restored from them count as finished."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.errors import ConfigurationError
from megatron.sweeps import commands
from megatron.sweeps.archive import restore, write_archive
from megatron.sweeps.points import read_plan
from megatron.sweeps.results import collect
from megatron.sweeps.states import run_state
from tests.sweeps.files import forked_runs, held, toy, write

TUNING = {"trials": 2, "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2}}}


def options(sweep, folder, file=None) -> Namespace:
    settings = {"stages": None, "slots": 1, "retries": 0, "retry_failed": False, "hang_minutes": 30.0}
    return Namespace(sweep=sweep, output=folder, file=file, **settings)


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory):
    """Return a sweep file of two stages, the second with the best trial of the first, and its folder after all runs."""
    folder = tmp_path_factory.mktemp("tuned")
    content = toy(corpus)
    del content["flags"]["lr"]
    stages = {"tune": {"seeds": [1], "tuning": TUNING}, "final": {"best_of": "tune", "seeds": [1]}}
    changes = {"parameters": {"train-epochs": [4]}, "variants": {"ar": {"flags": {"objective": "ar"}}}}
    path = write(folder, content, stages=stages, **changes)
    with forked_runs():
        assert commands.run(options(path, folder / "sweep")) == 0
    return path, folder / "sweep"


def test_restored_runs_are_finished_and_collected_as_before(tuned, tmp_path):
    path, folder = tuned
    points = read_plan(folder)
    assert {point.stage for point in points} == {"tune", "final"}
    archive, copy = tmp_path / "records.jsonl", tmp_path / "copy"
    commands.archive(options(path, folder, archive))
    assert str(folder) not in archive.read_text()
    commands.restore(options(path, copy, archive))
    assert read_plan(copy) == points  # of both stages: the choice of the best trial is that of the restored runs
    assert all(run_state(point.folder(copy)).name == "finished" for point in points)
    assert collect(copy, points).equals(collect(folder, points))
    before = sorted(copy.rglob("*"))
    assert commands.run(options(path, copy)) == 0
    trained = [file for file in copy.rglob("*") if file not in before and "runs" in file.parts]
    assert not trained
    again = tmp_path / "again.jsonl"
    commands.archive(options(path, copy, again))
    assert again.read_bytes() == archive.read_bytes()


def test_an_archive_names_trunks_and_teachers_without_the_folder_of_the_sweep(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("sweep")
    commands.plan(options(write(tmp_path, toy(corpus), variants=None, parameters={"train-epochs": [4]}), folder))
    (point,) = read_plan(folder)
    trunk, teacher = "runs/a/checkpoints/iter_0000012", "runs/b/checkpoints/iter_0000024"
    config = {
        "checkpoint": {"save": str(point.folder(folder)), "load": f"{folder}/{trunk}"},
        "branched_from": f"{folder}/{trunk}",
        "distillation": {"teacher": [f"{folder}/runs/b"]},
        "teachers": [{"checkpoint": str((folder / teacher).resolve()), "iteration": 24}],
    }
    point.folder(folder).mkdir(parents=True)
    for name, value in {"config": config, "status": {"state": "finished"}}.items():
        (point.folder(folder) / f"{name}.json").write_text(json.dumps(value))
    archive = tmp_path / "records.jsonl"
    write_archive(archive, folder, [point])
    line = json.loads(archive.read_text())
    assert line["config"].pop("command").startswith(point.script)
    assert line["config"] == {
        "checkpoint": {"save": None, "load": trunk},
        "branched_from": trunk,
        "distillation": {"teacher": ["runs/b"]},
        "teachers": [{"checkpoint": teacher, "iteration": 24}],
    }


def test_runs_that_exist_and_those_of_other_sweeps_are_left_alone(tuned, tmp_path):
    path, folder = tuned
    archive = tmp_path / "records.jsonl"
    commands.archive(options(path, folder, archive))
    points = read_plan(folder)
    before = [(point.folder(folder) / "config.json").read_bytes() for point in points]
    assert restore(archive, folder, points) == (0, 0)
    assert [(point.folder(folder) / "config.json").read_bytes() for point in points] == before
    assert restore(archive, tmp_path / "new", points[:1]) == (1, 0)
    assert [run.name for run in (tmp_path / "new" / "runs").iterdir()] == [points[0].id]


def test_the_folder_of_a_run_that_starts_is_left_alone(corpus, tmp_path):
    """It holds the lock, and has no config.json yet."""
    folder = tmp_path / "sweep"
    commands.plan(options(write(tmp_path, toy(corpus)), folder))
    point = read_plan(folder)[0]
    archive = tmp_path / "records.jsonl"
    archive.write_text(json.dumps({"id": point.id, "config": CONFIG, "records": [RECORD]}) + "\n")
    point.folder(folder).mkdir(parents=True)
    with held(point.folder(folder) / "lock"):
        assert restore(archive, folder, [point]) == (0, 0)
    assert (point.folder(folder) / "lock").exists()


def test_runs_of_another_corpus_are_left_out(tuned, tmp_path, capsys):
    path, folder = tuned
    archive, copy = tmp_path / "records.jsonl", tmp_path / "copy"
    commands.archive(options(path, folder, archive))
    archive.write_text(archive.read_text().replace('"corpus_hash":"', '"corpus_hash":"0'))
    commands.restore(options(path, copy, archive))
    assert "2 runs were left out: the data on this machine are of another corpus" in capsys.readouterr().out
    assert not (copy / "runs").exists()


CONFIG, RECORD = {"corpus_hash": "a"}, {"iteration": 1, "consumed_samples": 1}
DAMAGED = {
    "text": "not JSON",
    "a list": "[1]",
    "no records": json.dumps({"id": "a", "config": CONFIG, "records": []}),
    "no step": json.dumps({"id": "a", "config": CONFIG, "records": [{"loss": 1}]}),
    "no corpus": json.dumps({"id": "a", "config": {}, "records": [RECORD]}),
    "an id of numbers": json.dumps({"id": 1, "config": CONFIG, "records": [RECORD]}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_archive_makes_nothing(tuned, tmp_path, name):
    path, folder = tuned
    archive = tmp_path / "records.jsonl"
    commands.archive(options(path, folder, archive))
    archive.write_text(archive.read_text() + DAMAGED[name] + "\n")
    last = len(archive.read_text().splitlines())
    with pytest.raises(ConfigurationError, match=rf"records.jsonl: line {last} is damaged \(.*; name a file of"):
        restore(archive, tmp_path / "new", read_plan(folder))
    assert not (tmp_path / "new").exists()


def test_missing_archives_and_unfinished_sweeps_are_one_line(corpus, tmp_path):
    path = write(tmp_path, toy(corpus))
    commands.plan(options(path, tmp_path / "planned"))
    with pytest.raises(ConfigurationError, match="no run has finished yet; see"):
        commands.archive(options(path, tmp_path / "planned", tmp_path / "records.jsonl"))
    with pytest.raises(ConfigurationError, match=r"none.jsonl: cannot be read \(.*; name a file of tools/sweep.py"):
        commands.restore(options(path, tmp_path / "planned", tmp_path / "none.jsonl"))
