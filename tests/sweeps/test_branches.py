"""WSD branches: what shares a trunk, what it saves, and runs that equal full runs to the last bit."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron.sweeps.branches import needs_trunk
from megatron.sweeps.launch import training_command
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import read_plan
from megatron.sweeps.status import run_progress
from megatron.sweeps.sweep_file import read_sweep
from megatron.training.command_line import parse
from tests.conftest import ROOT, environment, records
from tests.forked import run_script
from tests.sweeps.files import held, toy, write
from tests.sweeps.test_local_queue import finish

FINISHED = {"state": "finished", "reason": "", "iteration": 24, "consumed_samples": 192}
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
        assert longest.keep_iterations == [*(point.trunk_iteration for point in short), 57]  # 57: for longer ones
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
            "their weight decay depends on the budget",
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


def test_a_branch_spends_only_the_time_of_its_own_samples(corpus, tmp_path):
    """Its records begin with those of its trunk."""
    branch, _ = planned(sweep(corpus, tmp_path, (16, 64), variants=None), tmp_path).points
    folder = branch.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"branched_from": "trunk"}')
    for own_samples in (0, 8):
        consumed = branch.trunk_samples + own_samples
        record = {"kind": "train", "consumed_samples": consumed, "seconds": 2.0 * consumed, "loss": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "status.json").write_text('{"state": "stopped"}')
        progress = run_progress(branch, tmp_path)
        assert progress.seconds == pytest.approx(2.0 * own_samples)
        assert progress.share == own_samples / (branch.train_samples - branch.trunk_samples)


@pytest.mark.parametrize(
    "budgets, mdm_budgets",
    [((2, 4, 8, 12, 24), ()), pytest.param((2, 4, 8, 12, 16, 24), (4, 12), marks=pytest.mark.slow)],
)
def test_branches_equal_full_runs_to_the_last_bit_also_of_budgets_that_are_added_later(
    budgets, mdm_budgets, corpus, tmp_path
):
    """AR with budgets 4 and 12 is stopped in the constant part of 12; shorter, longer and middle budgets are added."""
    flags = {"hidden-dropout": 0.1, "ema-decay": 0.9}
    folder = tmp_path / "branched"
    path = sweep(corpus, tmp_path, epochs=(4, 12), flags=flags, variants={"ar": {"flags": {"objective": "ar"}}})
    *_, trunk = planned(path, folder).points
    assert trunk.keep_iterations == [7, 21]
    command = [*training_command(trunk, folder)[1:], "--exit-interval", "10"]
    assert run_script(command, environment(), 300).returncode == 0
    mdm = {"flags": {"objective": "mdm", "hidden-dropout": 0}, "parameters": {"train-epochs": list(mdm_budgets)}}
    variants = {"ar": {}} | ({"mdm": mdm} if mdm_budgets else {})
    grown = sweep(corpus, tmp_path, epochs=budgets, flags=flags, variants=variants)
    plan = planned(grown, folder)
    ar = {point.axes["train-epochs"]: point for point in plan.points if point.variant == "ar"}
    assert ar[12].id == trunk.id
    starts = {epochs: (point.trunk, point.trunk_iteration) for epochs, point in ar.items()}
    expected = {
        2: (None, 0),  # the trunk has passed its last step before the decay, 3
        4: (trunk.id, 7),
        8: (trunk.id, 14),
        12: (None, 0),
        16: (ar[24].id, 28),
        24: (trunk.id, 21),
    }
    assert starts == {epochs: expected[epochs] for epochs in budgets}
    assert ar[12].keep_iterations == [7, 14, 21] and ar[24].keep_iterations == [28] * (16 in budgets) + [43]
    assert plan.notes == ["1 WSD points are trained in full: no checkpoint is left on their constant part"]
    number = len(budgets) + len(mdm_budgets)
    assert f"{number} runs: {number} finished" in finish("run", grown, folder, "--slots", 2)
    for point in read_plan(folder):
        full = tmp_path / "full" / point.id
        command = [str(ROOT / point.script), *point.arguments, "--save", str(full)]
        assert run_script(command, environment(), 300).returncode == 0
        assert weights(point.folder(folder)) == weights(full)
        assert records(point.folder(folder)) == records(full)
        log = (folder / "logs" / f"{point.id}.log").read_text()
        assert ("continuing from" in log) == (point.trunk is not None or point.id == trunk.id)
    again = planned(grown, folder)
    assert again.points == plan.points and again.notes == []  # what has been trained has been trained


def test_a_trunk_that_is_lost_or_damaged_is_no_source(corpus, tmp_path):
    folder = tmp_path / "lost"
    path = sweep(corpus, tmp_path, epochs=(4, 12), variants=None)
    short, trunk = planned(path, folder).points
    checkpoint = short.trunk_checkpoint(folder)
    assert needs_trunk(short, folder) and not needs_trunk(trunk, folder)
    own = short.folder(folder) / "checkpoints" / "iter_0000008"
    own.mkdir(parents=True)
    assert not needs_trunk(short, folder)  # it resumes from its own
    shutil.rmtree(short.folder(folder))
    checkpoint.mkdir(parents=True)
    assert not needs_trunk(short, folder)
    status = {"state": "failed", "reason": "step 9: loss is not finite", "iteration": 8, "consumed_samples": 64}
    (trunk.folder(folder) / "status.json").write_text(json.dumps(status))
    assert planned(path, folder).points[0].trunk is None  # no meta.json, and nothing more will come
    (checkpoint / "meta.json").write_text(json.dumps({"iteration": 7, "permanent": True, "files": {}}))
    assert planned(path, folder).points == [short, trunk]
    (checkpoint / "meta.json").write_text(json.dumps({"iteration": 7, "permanent": False, "files": {}}))
    (trunk.folder(folder) / "status.json").write_text(json.dumps(status | {"reason": "disk full"}))
    assert planned(path, folder).points[0].trunk is None  # it may be pruned, and the run has passed it


def test_a_checkpoint_behind_the_newest_of_a_running_trunk_will_never_be_saved(corpus, tmp_path):
    folder = tmp_path / "running"
    path = sweep(corpus, tmp_path, epochs=(4, 12), variants=None)
    short, trunk = planned(path, folder).points
    newest = trunk.folder(folder) / "checkpoints" / "iter_0000010"
    newest.mkdir(parents=True)
    (newest / "meta.json").write_text(json.dumps({"iteration": 10, "permanent": False}))
    (trunk.folder(folder) / "config.json").write_text(json.dumps({"checkpoint": {"keep_iterations": [7, 21]}}))
    with held(trunk.folder(folder) / "lock"):
        assert planned(path, folder).points[0].trunk is None
        newest.rename(newest.with_name("iter_0000006"))
        (newest.with_name("iter_0000006") / "meta.json").write_text(json.dumps({"iteration": 6, "permanent": False}))
        assert planned(path, folder).points[0] == short


def test_a_damaged_checkpoint_of_a_trunk_is_not_loaded(corpus, tmp_path, caplog):
    folder = tmp_path / "damaged"
    short, _ = planned(sweep(corpus, tmp_path, epochs=(4, 12), variants=None), folder).points
    checkpoint = short.trunk_checkpoint(folder)
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"iteration": 7, "permanent": True, "files": {}}))
    assert training_command(short, folder)[-3:] == ["--load", str(checkpoint), "--exact-branch"]
    (checkpoint / "meta.json").write_text(json.dumps({"files": {"model.safetensors": [9, 9]}}))
    assert "--load" not in training_command(short, folder)
    assert "model.safetensors is missing); trains in full" in caplog.text
    caplog.clear()
    short.checkpoint(folder, 9).mkdir(parents=True)  # its own, from which it resumes
    assert "--load" not in training_command(short, folder) and not caplog.text


def save(point, folder, step: int, content: bytes) -> Path:
    """Write a permanent checkpoint of a run; return its file of weights."""
    path = point.checkpoint(folder, step) / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    meta = {"iteration": step, "permanent": True, "files": {path.name: [len(content), zlib.crc32(content)]}}
    path.with_name("meta.json").write_text(json.dumps(meta))
    return path


@pytest.mark.parametrize("fault", ["a flipped bit", "a cut file"])
def test_no_run_branches_from_a_damaged_checkpoint(fault, corpus, tmp_path, caplog):
    """The latest checkpoint before the decay of a finished trunk is damaged: an earlier one is taken, then none."""
    folder = tmp_path / fault
    path = sweep(corpus, tmp_path, epochs=(4, 12), variants=None)
    short, trunk = planned(path, folder).points
    files = [save(trunk, folder, step, bytes(1000)) for step in (5, short.trunk_iteration)]
    (trunk.folder(folder) / "status.json").write_text(json.dumps(FINISHED))
    assert planned(path, folder).points[0] == short and not caplog.text
    for file, remaining in ((files[1], 5), (files[0], 0)):
        file.write_bytes(bytes(999) + b"1" if fault == "a flipped bit" else bytes(999))
        caplog.clear()
        plan = planned(path, folder)
        assert plan.points[0].trunk_iteration == remaining
        reason = "does not match its checksum" if fault == "a flipped bit" else "has 999 bytes of 1000"
        assert f"{file.parent} is damaged (model.safetensors {reason}); no run branches from it" in caplog.text
    assert plan.points[0].trunk is None
    assert plan.notes == ["1 WSD points are trained in full: no checkpoint is left on their constant part"]


def test_a_trunk_keeps_the_checkpoints_of_its_own_flags_too(corpus, tmp_path):
    flags = {"keep-iterations": [5, 9]}
    short, trunk = planned(sweep(corpus, tmp_path, epochs=(4, 12), flags=flags, variants=None), tmp_path).points
    script, *words = training_command(trunk, tmp_path)[1:]
    assert script.endswith("pretrain_gpt.py")
    assert parse("ar", words).checkpoint.keep_iterations == (5, 7, 9, 21)  # 7: where the other decays; 21: for longer
    assert short.trunk == trunk.id and short.trunk_iteration == 7


def test_a_restored_run_without_checkpoints_is_no_trunk(corpus, tmp_path):
    folder = tmp_path / "restored"
    path = sweep(corpus, tmp_path, epochs=(4, 12), variants=None)
    _, trunk = planned(path, folder).points
    trunk.folder(folder).mkdir(parents=True)
    (trunk.folder(folder) / "status.json").write_text(json.dumps(FINISHED))
    (trunk.folder(folder) / "config.json").write_text(json.dumps({"branched_from": None}))
    plan = planned(path, folder)
    assert [(point.trunk, point.own_share) for point in plan.points] == [(None, 1), (None, 1)]
    assert plan.notes == ["1 WSD points are trained in full: no checkpoint is left on their constant part"]


def weights(run) -> dict[str, bytes]:
    """Return the bytes of every tensor in the newest checkpoint of a run."""
    newest = max((run / "checkpoints").glob("iter_*"))
    tensors = {}
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            tensors |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return tensors
