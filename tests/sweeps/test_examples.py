"""The example sweeps: each is planned, and says how many runs and GPU-hours it takes."""

import re

import pytest

from megatron.config.subsets import DATA_VALUE_EPOCHS
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import unique_runs
from megatron.sweeps.sweep_file import read_sweep
from tests.conftest import ROOT

FILES = sorted(path for path in (ROOT / "examples_scaling" / "sweeps").glob("*.yaml") if path.name != "site.yaml")


def planned(name, tmp_path):
    return plan_sweep(read_sweep(ROOT / "examples_scaling" / "sweeps" / f"{name}.yaml"), tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_planned_and_states_its_cost(path, tmp_path):
    plan = planned(path.stem, tmp_path)
    runs = unique_runs(plan.points)
    stated = re.search(
        r"^# (\d+) runs, ([\d,]+) GPU-hours of H100 at 40% of the peak, by arithmetic.$", path.read_text(), re.M
    )
    assert len(runs) == len(plan.points) and plan.notes == []
    if path.stem == "epochs":
        assert len(runs) == 9
        return
    assert stated, path
    hours = sum(point.own_seconds * point.world_size for point in runs) / 3600
    assert int(stated[1]) == len(runs) and float(stated[2].replace(",", "")) == pytest.approx(hours, rel=0.01)
    assert all(point.memory_bytes < 76 * 2**30 for point in runs)  # an H100 has 80 GB


def test_the_data_value_runs_read_their_tokens_as_often_as_published(tmp_path):
    points = planned("data_value", tmp_path).points
    for variant in ("ar", "mdm"):
        epochs = [point.epochs for point in points if point.variant == variant]
        assert epochs == pytest.approx(DATA_VALUE_EPOCHS, rel=0.01)


def test_branches_make_an_epochs_axis_cost_little_more_than_its_longest_run(tmp_path):
    points = planned("wsd_epochs", tmp_path).points
    for size in ("90M", "140M", "217M"):
        family = [point for point in points if point.variant == "ar" and point.axes["model-size"] == size]
        assert sum(point.own_flops for point in family) < 1.25 * max(point.flops for point in family)
