"""Which checkpoints a run keeps, what a checkpoint contains, and branches."""

import json
import random
import shutil

import pytest

from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.saver import folder_name
from tests.conftest import records, run

EPOCHS = [*"--train-unique-tokens 400 --save-interval 2 --eval-interval 2 --keep-every-epochs 2".split()]


@pytest.fixture(scope="module")
def kept_run(tiny, tmp_path_factory):
    """Twelve steps of 0.64 epochs, a checkpoint every second step, stopped after the fifth step and resumed."""
    folder = tmp_path_factory.mktemp("kept")
    run("ar", *tiny, *EPOCHS, "--save", folder, "--exit-interval", 5)
    run("ar", *tiny, *EPOCHS, "--save", folder)
    return folder


def test_the_last_two_the_best_and_every_second_epochs_first_are_kept(kept_run):
    best = json.loads((kept_run / "checkpoints" / "best.json").read_text())
    tuning = [record for record in records(kept_run, "valid") if record["set"] == "tuning"]
    lowest = min(tuning, key=lambda record: record["loss"])
    assert (best["iteration"], best["loss"], best["set"]) == (lowest["iteration"], lowest["loss"], "tuning")
    steps = {int(path.name[5:]) for path in (kept_run / "checkpoints").glob("iter_*")}
    # epochs 2.56, 5.12 and 6.4 are the first saved ones beyond 2, 4 and 6
    assert steps == {4, 8, 10, 12} | {lowest["iteration"]}
    assert json.loads((kept_run / "checkpoints" / "latest.json").read_text())["iteration"] == 12


def test_a_checkpoint_carries_the_configuration_and_nothing_but_safetensors_and_json(kept_run):
    folder = kept_run / "checkpoints" / "iter_0000012"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["config"] == json.loads((kept_run / "config.json").read_text())
    assert meta["consumed_samples"] == 93


def test_a_run_is_evaluated_from_its_folder_alone(kept_run):
    """Flags of model, data and tokenizer need not be given again, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in kept_run.rglob("*")}
    done = run("ar", "--skip-train", "--load", kept_run)
    evaluated = [json.loads(line) for line in done.stdout.splitlines()]
    last = {record["set"]: record for record in records(kept_run, "valid") if record["iteration"] == 12}
    assert {record["set"]: record["loss"] for record in evaluated} == {name: last[name]["loss"] for name in last}
    assert {path: path.stat().st_mtime_ns for path in kept_run.rglob("*")} == before


def test_wsd_decays_from_any_checkpoint(tiny, kept_run, tmp_path):
    """A branch from step 12 decays over four more steps; the trunk's records are copied."""
    longer = [flag if flag != "93" else "128" for flag in tiny] + EPOCHS
    shape = "--lr-decay-style WSD --lr-wsd-decay-samples 32 --min-lr 0".split()
    run("ar", *longer, *shape, "--load", kept_run, "--save", tmp_path)
    branched, trunk = records(tmp_path, "train"), records(kept_run, "train")
    assert branched[: len(trunk)] == trunk
    rates = [record["learning_rate"] for record in branched[len(trunk) :]]
    # from sample 93 in steps of 8: 101, 109, 117, 125, 128 of 128, linear over the last 32
    assert rates == pytest.approx([1e-2 * (128 - samples) / 32 for samples in (101, 109, 117, 125, 128)])
    origin = json.loads((tmp_path / "config.json").read_text())["branched_from"]
    assert origin.endswith("iter_0000012")
    run("ar", *longer, *shape, "--load", kept_run, "--save", tmp_path)  # a finished branch resumes as itself
    assert json.loads((tmp_path / "config.json").read_text())["branched_from"] == origin


def test_other_data_under_the_same_name_is_refused(tiny, kept_run, corpus, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"train{suffix}").write_bytes((corpus / f"train{suffix}").read_bytes())
    moved = [flag if flag != f"{corpus}/train" else f"{tmp_path}/train" for flag in tiny]
    assert "finished" in run("ar", *moved, *EPOCHS, "--save", kept_run).stderr  # the same data under another path
    ids = bytearray((tmp_path / "train.bin").read_bytes())
    ids[0] ^= 1
    (tmp_path / "train.bin").write_bytes(ids)
    held_out = [flag if flag != f"tuning={corpus}/tuning" else f"tuning={corpus}/validation" for flag in tiny]
    for flags, named in ((moved, "--train-data-path"), (held_out, "--valid-data-path tuning=")):
        refused = run("ar", *flags, *EPOCHS, "--save", kept_run, check=False)
        assert refused.returncode == 2 and f"{named}: has other tokens" in refused.stderr
        assert "or branch: --load" in refused.stderr


def test_another_precision_is_refused_on_resume(tiny, kept_run):
    flags = [flag if flag != "--fp32" else "--bf16" for flag in tiny]
    refused = run("ar", *flags, *EPOCHS, "--save", kept_run, check=False)
    assert refused.returncode == 2 and "give --fp32, or branch" in refused.stderr


@pytest.mark.parametrize(
    "old, new, message",
    [("--fp32", "--bf16", "give --fp32, or leave out --exact-branch"),
     ("{corpus}/train", "{corpus}/tuning", "--train-data-path: has other tokens")],
)  # fmt: skip
def test_an_exact_branch_keeps_data_and_precision(old, new, message, tiny, kept_run, corpus, tmp_path):
    flags = [flag if flag != old.format(corpus=corpus) else new.format(corpus=corpus) for flag in tiny]
    branch = [*flags, *EPOCHS, "--train-samples", 128, "--load", kept_run, "--save", tmp_path / "run", "--exact-branch"]
    refused = run("ar", *branch, check=False)
    assert refused.returncode == 2 and message in refused.stderr and not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_is_only_read_is_not_repaired(tiny, kept_run, tmp_path):
    """A damaged checkpoint is skipped; only the run that owns it renames its folder."""
    source = tmp_path / "source"
    shutil.copytree(kept_run, source)
    newest = source / "checkpoints" / "iter_0000012"
    next(newest.glob("*.safetensors")).write_bytes(b"cut")
    done = run("ar", "--skip-train", "--load", source)
    assert "falling back" in done.stderr and newest.exists()
    assert json.loads(done.stdout.splitlines()[0])["iteration"] == 10


def test_an_older_checkpoint_is_branched_from_and_evaluated_by_its_folder(tiny, kept_run, tmp_path):
    """WSD decays from any checkpoint, here step 8; the branch can be compared with its trunk."""
    folder = kept_run / "checkpoints" / "iter_0000008"
    shape = "--lr-decay-style WSD --lr-wsd-decay-samples 16 --min-lr 0".split()
    run("ar", *[flag if flag != "93" else "80" for flag in tiny], *EPOCHS, *shape, "--load", folder, "--save", tmp_path)
    steps = [record["iteration"] for record in records(tmp_path, "train")]
    assert steps == [*range(1, 11)] and records(tmp_path, "train")[-1]["learning_rate"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["branched_from"] == str(folder)
    for record in records(tmp_path, "valid"):
        assert (tmp_path / "validation" / record["set"] / f"{record['iteration']}.npz").exists()
    evaluated = [json.loads(line) for line in run("ar", "--skip-train", "--load", folder).stdout.splitlines()]
    assert [record["loss"] for record in evaluated] == [
        record["loss"] for record in records(kept_run, "valid") if record["iteration"] == 8
    ]


def test_a_branch_resumes_when_the_checkpoint_that_it_started_from_was_pruned(tiny, kept_run, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(kept_run, origin)
    shape = "--lr-decay-style WSD --lr-wsd-decay-samples 16 --min-lr 0".split()
    folder, flags = origin / "checkpoints" / "iter_0000008", [*tiny, *EPOCHS, *shape, "--save", tmp_path / "branch"]
    run("ar", *flags, "--load", folder, "--exit-interval", "10")
    shutil.rmtree(folder)
    assert "iter_0000010 at step 10" in run("ar", *flags, "--load", folder).stderr
    assert records(tmp_path / "branch", "train")[-1]["iteration"] == 12


def test_a_run_without_its_sums_by_document_is_branched_from(tiny, kept_run, tmp_path):
    archived, branch = tmp_path / "archived", tmp_path / "branch"
    shutil.copytree(kept_run, archived, ignore=shutil.ignore_patterns("*.npz"))
    run("ar", *tiny, *EPOCHS, "--train-samples", 109, "--load", archived, "--save", branch)
    assert [*branch.glob("validation/tuning/*.npz")] == [branch / "validation" / "tuning" / "14.npz"]


def test_a_run_that_started_from_nothing_or_another_run_is_not_resumed_under_load(tiny, kept_run, tmp_path):
    """Otherwise an older checkpoint of the run itself, or another run, would be named and not read."""
    folders = {name: tmp_path / name for name in ("own", "other", "branch")}
    for name in ("own", "other"):
        shutil.copytree(kept_run, folders[name])
    flags = [*tiny, *EPOCHS, "--save", folders["own"]]
    for load in (folders["own"] / "checkpoints" / "iter_0000008", folders["other"]):
        refused = run("ar", *flags, "--load", load, check=False)
        assert refused.returncode == 2 and f"--load {load}: the run in" in refused.stderr
        assert "started from no other run" in refused.stderr
    flags = [*tiny, *EPOCHS, "--train-samples", 109, "--save", folders["branch"]]
    run("ar", *flags, "--load", folders["own"])
    refused = run("ar", *flags, "--load", folders["other"], check=False)
    assert refused.returncode == 2 and f"started from {folders['own']}/checkpoints/iter_" in refused.stderr
    shutil.move(folders["own"], tmp_path / "moved")  # with its branch, whose record has the old path
    assert "iter_0000014 at step 14" in run("ar", *flags, "--load", tmp_path / "moved").stderr


def test_a_branch_says_what_it_changes(tiny, kept_run, tmp_path):
    """Another seed reads the samples of the current epoch in another order, some of them again."""
    flags = [*tiny, *EPOCHS, "--train-samples", 109, "--seed", 7, "--load", kept_run, "--save", tmp_path]
    line = f"settings that are not those of {kept_run}: --seed 7 (--seed 1234 there)"
    assert line in run("ar", *flags).stderr
    assert "settings that are not those" not in run("ar", *flags).stderr


def test_an_evaluation_reads_load_and_not_save(tiny, kept_run, tmp_path):
    run("ar", *tiny, "--train-samples", 40, "--save", tmp_path)
    done = run("ar", "--skip-train", "--load", kept_run, "--save", tmp_path)
    assert json.loads(done.stdout.splitlines()[0])["iteration"] == 12


@pytest.mark.parametrize(
    "changed, message",
    [(["--train-samples", "40"], "has trained on 93 samples, and the branch has a total budget of 40"),
     (["--seq-length", "16", "--train-samples", "200"], "--seq-length 16: the run in")],
)  # fmt: skip
def test_a_branch_with_a_wrong_sample_count_is_refused(changed, message, tiny, kept_run, tmp_path):
    refused = run("ar", *tiny, *EPOCHS, *changed, "--load", kept_run, "--save", tmp_path, check=False)
    assert refused.returncode == 2 and message in refused.stderr


def test_what_points_at_checkpoints_is_put_right_after_a_kill(tiny, kept_run, tmp_path):
    """As if killed after the last checkpoint was renamed, and while an old one was being removed."""
    shutil.copytree(kept_run, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    right = {name: (root / name).read_text() for name in ("latest.json", "best.json")}
    (root / "latest.json").write_text((root / "best.json").read_text().replace("12", "4"))
    (root / "best.json").unlink()
    (root / "iter_0000002.removed").mkdir()
    run("ar", *tiny, *EPOCHS, "--save", tmp_path / "run")
    assert {name: (root / name).read_text() for name in right} == right
    assert not (root / "iter_0000002.removed").exists()


def test_flags_without_effect_are_logged(tiny):
    stderr = run("ar", *tiny, "--num-mc", 8, "--save-interval", 2, "--exit-interval", 1).stderr
    assert "--num-mc 8: has no effect, an exact likelihood" in stderr
    assert "--save-interval 2: has no effect, no --save" in stderr


def test_steps_to_keep_after_the_end_are_logged(tiny, tmp_path):
    flags = [*tiny, "--save", tmp_path, "--keep-iterations", 2, 12, 13, 500, "--exit-interval"]
    for step in (1, 3):
        assert "--keep-iterations 13 500: has no effect, the run ends at step 12" in run("ar", *flags, step).stderr


EIGHT_DIGITS = [9, 9_999_990, 9_999_995, 10_000_000, 10_000_005, 123_456_789]


def write_checkpoints(root, steps):
    """Write complete checkpoints without tensors, in a random order."""
    for step in random.Random(0).sample(steps, len(steps)):
        folder = root / folder_name(step)
        folder.mkdir()
        meta = {"iteration": step, "consumed_samples": 8 * step, "files": {}, "permanent": False}
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("count", range(2, len(EIGHT_DIGITS) + 1))
def test_checkpoints_are_ordered_by_number_whatever_their_digits(tmp_path, count):
    steps = EIGHT_DIGITS[:count]
    write_checkpoints(tmp_path, steps)
    for name in ("iter_12345678.partial", "iter_99999999.damaged", "iter_x"):
        (tmp_path / name).mkdir()
    assert [int(folder.name[5:]) for folder in CheckpointStore(tmp_path).complete()] == steps
    assert CheckpointStore(tmp_path).newest().name == folder_name(steps[-1])


def test_pruning_removes_the_oldest_by_number(tmp_path):
    write_checkpoints(tmp_path, EIGHT_DIGITS)
    CheckpointStore(tmp_path).prune(keep={9_999_995})
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == {9_999_995, 10_000_005, 123_456_789}


def test_the_best_checkpoint_stays_until_another_set_has_a_loss(tmp_path):
    """A run may resume with other validation sets, or with none."""
    write_checkpoints(tmp_path, range(1, 6))
    store = CheckpointStore(tmp_path)
    store.update_pointers({1: 2.0, 4: 3.0}, "tuning")
    for losses, validation_set, best in (({}, None, 1), ({}, "validation", 1), ({5: 4.0}, "validation", 5)):
        store.update_pointers(losses, validation_set)
        assert store.best() == tmp_path / folder_name(best) and store.best().exists()
    assert store.complete() == [tmp_path / folder_name(step) for step in (4, 5)]


def test_a_checkpoint_that_cannot_be_removed_is_left_to_the_next_time(tmp_path, monkeypatch, caplog):
    """NFS keeps a folder whose files another process reads."""
    write_checkpoints(tmp_path, EIGHT_DIGITS)
    oldest, rmtree = folder_name(EIGHT_DIGITS[0]), shutil.rmtree

    def busy(path):
        if path.stem == oldest:
            raise OSError(39, "Directory not empty")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    CheckpointStore(tmp_path).prune(keep=set())
    assert f"{oldest}.removed: could not be removed (Directory not empty)" in caplog.text
    monkeypatch.undo()
    CheckpointStore(tmp_path).prune(keep=set())
    assert {path.name for path in tmp_path.iterdir()} == {folder_name(step) for step in EIGHT_DIGITS[-2:]}
