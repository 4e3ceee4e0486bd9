"""The commands in one process: what they refuse, each with one line."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.sweeps.run import Options, measure
from megatron.errors import ConfigurationError
from megatron.sweeps import commands
from megatron.sweeps.local_queue import LocalQueue, Outcome
from megatron.sweeps.points import read_plan
from tests.sweeps.files import held, toy, write


def options(sweep, folder=None, **more) -> Namespace:
    return Namespace(sweep=sweep, output=folder, **more)


QUEUE = {"stages": None, "slots": 1, "retries": 2, "retry_failed": False, "hang_minutes": 30.0}


def refused(command, *arguments, **more) -> str:
    with pytest.raises(ConfigurationError) as caught:
        command(options(*arguments, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_is_running_may_not_leave_the_plan(corpus, tmp_path):
    folder = tmp_path / "changed"
    commands.plan(options(write(tmp_path, toy(corpus)), folder))
    point = read_plan(folder)[-1]
    point.folder(folder).mkdir(parents=True)
    changed = write(tmp_path, toy(corpus), parameters={"train-epochs": [4]})
    with held(point.folder(folder) / "lock"):
        message = refused(commands.plan, changed, folder)
        assert message == (
            f"{changed}: the run {point.id} (mdm, train-epochs 8, seed 1234) is running, and the changed file no "
            "longer has it; stop it first, or put it back"
        )
        assert point in read_plan(folder)
        more = write(tmp_path, toy(corpus), parameters={"train-epochs": [4, 8, 16]})
        assert commands.plan(options(more, folder)) == 0  # adding is always possible
    write(tmp_path, toy(corpus), parameters={"train-epochs": [4]})
    assert commands.plan(options(changed, folder)) == 0 and len(read_plan(folder)) == 2


def test_a_folder_without_a_plan_and_a_missing_file_are_named(corpus, tmp_path):
    path = write(tmp_path, toy(corpus))
    for command in (commands.status, commands.collect, commands.resubmit, commands.plan):
        more = {"site": None, "dry_run": True, "stages": None}
        assert "holds no sweep (no plan.jsonl); name a folder" in refused(command, tmp_path, **more)
    assert "holds no sweep" in refused(commands.status, path, tmp_path / "not planned")
    assert "nothing.yaml: cannot be read (No such file" in refused(commands.plan, tmp_path / "nothing.yaml")
    commands.plan(options(path, tmp_path / "planned"))
    assert "no run was validated yet" in refused(commands.collect, tmp_path / "planned")
    (tmp_path / "planned" / "sweep.yaml").unlink()
    assert "sweep.yaml: cannot be read" in refused(commands.plan, tmp_path / "planned")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: could not be written \(File exists\)"):
        commands.plan(options(path, tmp_path / "file"))


def test_a_damaged_plan_is_replaced_from_its_file_only(corpus, tmp_path):
    path, folder = write(tmp_path, toy(corpus)), tmp_path / "old"
    commands.plan(options(path, folder))
    (folder / "plan.jsonl").write_text('{"id": 1}\n')
    assert "is damaged" in refused(commands.plan, folder)
    assert commands.plan(options(path, folder)) == 0 and len(read_plan(folder)) == 4
    assert "is a sweep folder already; leave out --output" in refused(commands.plan, folder, tmp_path / "new")


def test_branches_wait_only_for_checkpoints_that_are_not_there(corpus, tmp_path, capsys):
    flags = toy(corpus)["flags"] | {"lr-decay-style": "WSD", "lr-warmup-samples": 16}
    parameters = {"train-epochs": [4, 8, 16]}
    path = write(tmp_path, toy(corpus), flags=flags, parameters=parameters, variants=None)
    folder = tmp_path / "wsd"

    def arrays(command, **more) -> list[list[str]]:
        return submitted(command, options(path, folder, **more), capsys)

    first = arrays(commands.submit, stages=None)
    short, middle, trunk = read_plan(folder)
    assert first == [[trunk.id], [middle.id, short.id]]
    checkpoint = short.trunk_checkpoint(folder)
    checkpoint.mkdir(parents=True)
    meta = {"iteration": short.trunk_iteration, "permanent": True, "files": {}}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    assert arrays(commands.resubmit, stages=None) == [[trunk.id], [short.id], [middle.id]]


def test_a_changed_file_is_submitted_again_with_its_changes(corpus, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert commands.plan(options(write(tmp_path, toy(corpus), resources={"minutes": 60}), folder)) == 0
    longer = options(write(tmp_path, toy(corpus), resources={"minutes": 240}), folder, stages=None)
    submitted(commands.resubmit, longer, capsys)
    assert {point.minutes for point in read_plan(folder)} == {240}


def submitted(command, options: Namespace, capsys) -> list[list[str]]:
    """Return the runs of each array in the order of submission."""
    capsys.readouterr()
    assert command(Namespace(**vars(options), site=None, dry_run=True)) == 0
    scripts = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" tasks")]
    return [Path(script).with_suffix(".tasks").read_text().split() for script in scripts]


def test_some_stages_are_submitted_with_the_trunks_of_others(corpus, tmp_path, capsys):
    flags = toy(corpus)["flags"] | {"lr-decay-style": "WSD", "lr-warmup-samples": 16, "train-epochs": 8}
    stages = {
        "tune": {"tuning": {"trials": 2, "parameters": {"lr": {"min": 1e-3, "max": 1e-2}}}},
        "final": {"best_of": "tune"},
        "short": {"flags": {"train-epochs": 4}},
        "long": {"flags": {"train-epochs": 16}},
    }
    path = write(tmp_path, toy(corpus), flags=flags, parameters=None, variants=None, stages=stages)
    folder = tmp_path / "stages"
    assert refused(commands.submit, path, folder, stages=["shrot"], site=None) == (
        "--stages shrot: is no stage of the sweep; it has tune, short, long, final"
    )
    runs = {point.stage: point for point in read_plan(folder)}
    assert runs["short"].trunk == runs["long"].id
    of_stages = submitted(commands.submit, options(path, folder, stages=["short", "final"]), capsys)
    assert of_stages == [[runs["long"].id], [runs["short"].id]]
    commands.submit(options(path, folder, stages=["final"], site=None, dry_run=True))
    assert capsys.readouterr().out.startswith("stage final: waits for 2 of 2 points of stage tune; submit again then")


@pytest.mark.parametrize(
    "flag, message",
    [
        ({"slots": 0}, "--slots 0: must be at least 1"),
        ({"retries": -1}, "--retries -1: must not be negative"),
        ({"hang_minutes": 0.0}, "--hang-minutes 0.0: must be positive"),
    ],
)
def test_impossible_settings_of_a_queue_are_refused_before_anything_is_written(flag, message, corpus, tmp_path):
    path = write(tmp_path, toy(corpus))
    assert message in refused(commands.run, path, tmp_path / "queue", **(QUEUE | flag))
    assert not (tmp_path / "queue").exists()


def test_failed_and_stopped_runs_are_not_started_again_for_every_stage(corpus, tmp_path, monkeypatch):
    started = []

    class Queue(LocalQueue):
        def run(self):
            started.append([job.point.id for job in self.waiting])
            failed, stopped, *_ = started[0]
            return Outcome({failed: "step 3: loss is not finite"}, {stopped: "--kill-switch-file stop"})

    monkeypatch.setattr(commands, "LocalQueue", Queue)
    stages = {"tune": {"tuning": {"trials": 2, "parameters": {"lr": {"min": 1e-3, "max": 1e-2}}}}}
    path = write(tmp_path, toy(corpus), stages=stages | {"final": {"best_of": "tune"}}, variants=None)
    assert commands.run(options(path, tmp_path / "queue", **(QUEUE | {"retry_failed": True}))) == 1
    first, second = started
    assert len(first) == 4 and second == first[2:]


@pytest.mark.slow
def test_a_large_sweep_is_planned_collected_and_reported_in_seconds(tmp_path):
    options = Options(points=2000, runs=100, records=50, validations=5, rounds=1)
    seconds = {row["command"]: row["seconds"][0] for row in measure(options, tmp_path)}
    assert list(seconds) == ["plan", "plan, WSD", "status", "collect", "report"]
    assert seconds.pop("report") < 20  # of CPU time, with its imports; measured: 6
    assert max(seconds.values()) < 10  # measured: 2.5
    assert len((tmp_path / "small" / "results.csv").read_text().splitlines()) == 1 + 100 * 5 * 2
    assert (tmp_path / "report" / "report.html").stat().st_size > 1e6
