"""WSD branches: what shares a trunk, what it saves, and runs that equal full runs to the last bit."""

import shutil

import pytest
from safetensors import safe_open

from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import read_plan
from megatron.sweeps.sweep_file import read_sweep
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish, results

WSD = {"lr-decay-style": "WSD", "lr-warmup-samples": 16}


def sweep(corpus, folder, epochs=(2, 4, 8, 16, 32), flags=(), **changes):
    """Write a sweep over budgets; its axis is the only difference between the points of a variant."""
    content = toy(corpus)
    content["flags"] |= WSD | dict(flags)
    return write(folder, content, parameters={"train-epochs": list(epochs)}, **changes)


def planned(path, folder):
    return plan_sweep(read_sweep(path), folder)


def test_shorter_budgets_continue_where_their_decay_begins(corpus, tmp_path):
    plan = planned(sweep(corpus, tmp_path), tmp_path)
    for variant in ("ar", "mdm"):
        *short, longest = [point for point in plan.points if point.variant == variant]
        assert longest.trunk is None and longest.own_share == 1
        for point in short:
            samples = point.train_samples
            assert (point.trunk, point.trunk_samples) == (longest.id, (samples - samples // 10) // 8 * 8)
            assert point.trunk_iteration == point.trunk_samples // 8
        assert longest.keep_iterations == [point.trunk_iteration for point in short]
        cost = sum(point.own_flops for point in (*short, longest)) / longest.flops
        assert 1.1 < cost < 1.25
    assert plan.notes == []


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({"lr-warmup-samples": None}, "give lr-warmup-samples"),
        ({"eval-interval": None}, "give eval-interval"),
        ({"epoch-order": "megatron"}, "--epoch-order megatron depends on the budget"),
        (
            {"weight-decay-incr-style": "linear", "start-weight-decay": 0, "end-weight-decay": 1},
            "or weight decay differs",
        ),
    ],
)
def test_what_depends_on_the_budget_is_trained_in_full_and_named(flags, reason, corpus, tmp_path):
    plan = planned(sweep(corpus, tmp_path, epochs=(16, 64), flags=flags), tmp_path)
    assert not any(point.trunk or point.keep_iterations for point in plan.points)
    (note,) = plan.notes
    assert note.startswith("2 WSD points are trained in full: ") and reason in note


def test_branches_do_not_change_ids_and_can_be_switched_off(corpus, tmp_path):
    path = sweep(corpus, tmp_path)
    with_branches = [point.id for point in planned(path, tmp_path).points]
    plain = planned(sweep(corpus, tmp_path, wsd_branches=False), tmp_path)
    assert [point.id for point in plain.points] == with_branches and not any(point.trunk for point in plain.points)
    cosine = planned(sweep(corpus, tmp_path, flags={"lr-decay-style": "cosine"}), tmp_path)
    assert not any(point.trunk for point in cosine.points) and cosine.notes == []


def test_a_branch_never_starts_after_the_end_of_its_own_budget(corpus, tmp_path):
    flags = {"lr-decay-samples": 512}  # of the trunk; the shorter run stops within the constant rate
    short, trunk = planned(sweep(corpus, tmp_path, (4, 32), flags, variants=None), tmp_path).points
    assert short.trunk == trunk.id and short.trunk_samples == 56 < short.train_samples == 64
    assert 0 < short.own_share < 1


def weights(run) -> dict[str, bytes]:
    """Return the bytes of every tensor in the newest checkpoint of a run."""
    newest = max((run / "checkpoints").glob("iter_*"))
    tensors = {}
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            tensors |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return tensors


def test_branches_equal_full_runs_to_the_last_bit(corpus, tmp_path):
    flags = {"hidden-dropout": 0.1, "ema-decay": 0.9}
    variants = {"ar": {"flags": {"objective": "ar"}}, "mdm": {"flags": {"objective": "mdm", "hidden-dropout": 0}}}
    branched = sweep(corpus, tmp_path, epochs=(4, 12), flags=flags, variants=variants)
    assert "4 runs: 4 finished" in finish("run", branched, tmp_path / "branched", "--slots", 2)
    (tmp_path / "plain").mkdir()
    plain = sweep(corpus, tmp_path / "plain", epochs=(4, 12), flags=flags, variants=variants, wsd_branches=False)
    assert "4 runs: 4 finished" in finish("run", plain, tmp_path / "full", "--slots", 2)
    assert results(tmp_path / "branched") == results(tmp_path / "full")
    points = read_plan(tmp_path / "branched")
    assert sum(point.trunk is not None for point in points) == 2
    for point in points:
        assert weights(point.folder(tmp_path / "branched")) == weights(point.folder(tmp_path / "full"))
    log = next(point.id for point in points if point.trunk)
    assert "continuing from" in (tmp_path / "branched" / "logs" / f"{log}.log").read_text()


@pytest.mark.slow
def test_a_budget_that_is_added_after_its_trunk_has_finished_is_trained_in_full(corpus, tmp_path):
    variants = {"ar": {"flags": {"objective": "ar"}}}
    first = sweep(corpus, tmp_path, epochs=(12,), variants=variants)
    finish("run", first, tmp_path / "grown", "--slots", 1)
    grown = sweep(corpus, tmp_path, epochs=(4, 12), variants=variants)
    assert "2 runs: 2 finished" in finish("run", grown, tmp_path / "grown", "--slots", 1)
    shutil.rmtree(tmp_path / "grown" / "runs" / read_plan(tmp_path / "grown")[1].id)
    log = (tmp_path / "grown" / "logs" / f"{read_plan(tmp_path / 'grown')[0].id}.log").read_text()
    assert "continuing from" not in log and "finished at step" in log
