"""What a run keeps, what a checkpoint holds, and branches."""

import json
import random
import shutil

import pytest

from megatron.training import checkpoint
from tests.conftest import records, run

EPOCHS = [*"--train-unique-tokens 400 --save-interval 2 --eval-interval 2 --keep-every-epochs 2".split()]


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """Twelve steps of 0.64 epochs, a checkpoint every second step, stopped after the fifth step and resumed."""
    folder = tmp_path_factory.mktemp("kept")
    run("ar", *tiny, *EPOCHS, "--save", folder, "--exit-interval", 5)
    run("ar", *tiny, *EPOCHS, "--save", folder)
    return folder


def test_the_last_two_the_best_and_every_second_epochs_first_are_kept(kept):
    best = json.loads((kept / "checkpoints" / "best.json").read_text())
    tuning = [record for record in records(kept, "valid") if record["set"] == "tuning"]
    lowest = min(tuning, key=lambda record: record["loss"])
    assert (best["iteration"], best["loss"], best["set"]) == (lowest["iteration"], lowest["loss"], "tuning")
    steps = {int(path.name[5:]) for path in (kept / "checkpoints").glob("iter_*")}
    # epochs 2.56, 5.12 and 6.4 are the first saved ones beyond 2, 4 and 6
    assert steps == {4, 8, 10, 12} | {lowest["iteration"]}
    assert json.loads((kept / "checkpoints" / "latest.json").read_text())["iteration"] == 12


def test_a_checkpoint_carries_the_configuration_and_nothing_but_safetensors_and_json(kept):
    folder = kept / "checkpoints" / "iter_0000012"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["config"] == json.loads((kept / "config.json").read_text())
    assert meta["consumed_samples"] == 93


def test_a_run_is_evaluated_from_its_folder_alone(kept):
    """No flag of the network, the data or the tokenizer is given again, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    done = run("ar", "--skip-train", "--load", kept)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    last = {record["set"]: record for record in records(kept, "valid") if record["iteration"] == 12}
    assert {record["set"]: record["loss"] for record in found} == {name: last[name]["loss"] for name in last}
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before


def test_wsd_decays_from_any_checkpoint(tiny, kept, tmp_path):
    """A branch from step 12 spends four more steps on the way down; the trunk's records come along."""
    longer = [flag if flag != "93" else "128" for flag in tiny] + EPOCHS
    shape = "--lr-decay-style WSD --lr-wsd-decay-samples 32 --min-lr 0".split()
    run("ar", *longer, *shape, "--load", kept, "--save", tmp_path)
    branched, trunk = records(tmp_path, "train"), records(kept, "train")
    assert branched[: len(trunk)] == trunk
    rates = [record["learning_rate"] for record in branched[len(trunk) :]]
    # from sample 93 in steps of 8: 101, 109, 117, 125, 128 of 128, linear over the last 32
    assert rates == pytest.approx([1e-2 * (128 - samples) / 32 for samples in (101, 109, 117, 125, 128)])
    origin = json.loads((tmp_path / "config.json").read_text())["branched_from"]
    assert origin.endswith("iter_0000012")
    run("ar", *longer, *shape, "--load", kept, "--save", tmp_path)  # a finished branch resumes as itself
    assert json.loads((tmp_path / "config.json").read_text())["branched_from"] == origin


def test_other_data_under_the_same_name_is_refused(tiny, kept, corpus, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"train{suffix}").write_bytes((corpus / f"train{suffix}").read_bytes())
    moved = [flag if flag != f"{corpus}/train" else f"{tmp_path}/train" for flag in tiny]
    assert "finished" in run("ar", *moved, *EPOCHS, "--save", kept).stderr  # the same data elsewhere is no other data
    ids = bytearray((tmp_path / "train.bin").read_bytes())
    ids[0] ^= 1
    (tmp_path / "train.bin").write_bytes(ids)
    held_out = [flag if flag != f"tuning={corpus}/tuning" else f"tuning={corpus}/validation" for flag in tiny]
    for flags, named in ((moved, "--train-data-path"), (held_out, "--valid-data-path tuning=")):
        refused = run("ar", *flags, *EPOCHS, "--save", kept, check=False)
        assert refused.returncode == 2 and f"{named}: holds other tokens" in refused.stderr
        assert "or branch: --load" in refused.stderr


def test_another_precision_is_refused_on_resume(tiny, kept):
    flags = [flag if flag != "--fp32" else "--bf16" for flag in tiny]
    refused = run("ar", *flags, *EPOCHS, "--save", kept, check=False)
    assert refused.returncode == 2 and "give --fp32, or branch" in refused.stderr


def test_a_run_that_is_only_read_is_not_mended(tiny, kept, tmp_path):
    """A damaged checkpoint is passed over; its folder is renamed only by the run that owns it."""
    source = tmp_path / "source"
    shutil.copytree(kept, source)
    newest = source / "checkpoints" / "iter_0000012"
    next(newest.glob("*.safetensors")).write_bytes(b"cut")
    done = run("ar", "--skip-train", "--load", source)
    assert "falling back" in done.stderr and newest.exists()
    assert json.loads(done.stdout.splitlines()[0])["iteration"] == 10


def test_an_older_checkpoint_is_branched_from_and_evaluated_by_its_folder(tiny, kept, tmp_path):
    """WSD decays from any checkpoint that is kept, here step 8; the branch can be compared with its trunk."""
    folder = kept / "checkpoints" / "iter_0000008"
    shape = "--lr-decay-style WSD --lr-wsd-decay-samples 16 --min-lr 0".split()
    run("ar", *[flag if flag != "93" else "80" for flag in tiny], *EPOCHS, *shape, "--load", folder, "--save", tmp_path)
    steps = [record["iteration"] for record in records(tmp_path, "train")]
    assert steps == [*range(1, 11)] and records(tmp_path, "train")[-1]["learning_rate"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["branched_from"] == str(folder)
    for record in records(tmp_path, "valid"):
        assert (tmp_path / "validation" / record["set"] / f"{record['iteration']}.npz").exists()
    evaluated = [json.loads(line) for line in run("ar", "--skip-train", "--load", folder).stdout.splitlines()]
    assert [record["loss"] for record in evaluated] == [
        record["loss"] for record in records(kept, "valid") if record["iteration"] == 8
    ]


@pytest.mark.parametrize(
    "changed, rule",
    [(["--train-samples", "40"], "has seen 93 samples, and the budget of the branch is 40"),
     (["--seq-length", "16", "--train-samples", "200"], "--seq-length 16: the run in")],
)  # fmt: skip
def test_a_branch_whose_clock_would_lie_is_refused(changed, rule, tiny, kept, tmp_path):
    refused = run("ar", *tiny, *EPOCHS, *changed, "--load", kept, "--save", tmp_path, check=False)
    assert refused.returncode == 2 and rule in refused.stderr


def test_what_points_at_checkpoints_is_put_right_after_a_kill(tiny, kept, tmp_path):
    """As if killed after the last checkpoint was renamed, and within the removal of an old one."""
    shutil.copytree(kept, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    right = {name: (root / name).read_text() for name in ("latest.json", "best.json")}
    (root / "latest.json").write_text((root / "best.json").read_text().replace("12", "4"))
    (root / "best.json").unlink()
    (root / "iter_0000002.removed").mkdir()
    run("ar", *tiny, *EPOCHS, "--save", tmp_path / "run")
    assert {name: (root / name).read_text() for name in right} == right
    assert not (root / "iter_0000002.removed").exists()


def test_flags_without_effect_are_said_to_have_none(tiny):
    said = run("ar", *tiny, "--num-mc", 8, "--save-interval", 2, "--exit-interval", 1).stderr
    assert "--num-mc 8: has no effect, an exact likelihood" in said
    assert "--save-interval 2: has no effect, no --save" in said


EIGHT_DIGITS = [9, 9_999_990, 9_999_995, 10_000_000, 10_000_005, 123_456_789]


def written(root, steps):
    """Write complete checkpoints without tensors, in a random order."""
    for step in random.Random(0).sample(steps, len(steps)):
        folder = root / checkpoint.folder_name(step)
        folder.mkdir()
        (folder / "meta.json").write_text(json.dumps({"iteration": step, "files": {}, "permanent": False}))


@pytest.mark.parametrize("count", range(2, len(EIGHT_DIGITS) + 1))
def test_checkpoints_are_ordered_by_number_whatever_their_digits(tmp_path, count):
    steps = EIGHT_DIGITS[:count]
    written(tmp_path, steps)
    for name in ("iter_12345678.partial", "iter_99999999.damaged", "iter_x"):
        (tmp_path / name).mkdir()
    assert [int(folder.name[5:]) for folder in checkpoint.complete(tmp_path)] == steps
    assert checkpoint.newest(tmp_path, mend=False)[1]["iteration"] == steps[-1]


def test_pruning_removes_the_oldest_by_number(tmp_path):
    written(tmp_path, EIGHT_DIGITS)
    checkpoint.prune(tmp_path, keep={9_999_995})
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == {9_999_995, 10_000_005, 123_456_789}
