"""Runs of a sweep in the trackers: one group, readable names, a restart continues the same run."""

import json

import pytest

from megatron.sweeps.launch import training_command
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.sweep_file import read_sweep
from tests.conftest import environment
from tests.forked import run_script
from tests.sweeps.files import toy, write
from tests.training.test_trackers import find_entry, offline_runs


@pytest.fixture
def planned(corpus, tmp_path):
    """Return a function that plans the toy sweep, named demo, with changed flags."""

    def plan(**flags):
        path = write(tmp_path, toy(corpus), name="demo", flags=toy(corpus)["flags"] | flags)
        return plan_sweep(read_sweep(path), tmp_path / "demo").points

    return plan


def test_runs_share_a_group_and_have_readable_names_in_weights_and_biases(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    points = planned(**{"wandb-project": "tests"})
    point = points[2]
    command = training_command(point, tmp_path / "demo")[1:]
    for extra in (["--exit-interval", "3"], []):
        assert run_script([*command, *extra], environment(), 300).returncode == 0
    first, second = offline_runs(point.folder(tmp_path / "demo"))
    recorded = json.loads((point.folder(tmp_path / "demo") / "wandb.json").read_text())
    for log in (first, second):
        run = find_entry(log, "run")
        assert (run.project, run.run_group, run.display_name) == ("tests", "demo", "mdm, train-epochs 4, seed 1234")
        assert run.run_id == recorded["id"]


def test_trackers_do_not_change_ids_and_names_of_the_file_win(planned):
    plain = planned()
    assert not any("--wandb-group" in point.arguments for point in plain)
    own = planned(**{"wandb-project": "tests", "wandb-group": "mine", "tensorboard-dir": "boards"})
    assert [point.id for point in own] == [point.id for point in plain]
    for point in own:
        flags = dict(zip(point.arguments, point.arguments[1:]))
        assert flags["--wandb-group"] == "mine" and flags["--wandb-exp-name"] == point.label
        assert flags["--tensorboard-dir"] == f"boards/demo/{point.id}"  # event files of two runs must not mix
