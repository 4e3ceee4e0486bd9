"""A run that was stopped or killed and started again equals one that was not."""

import json
import signal

import pytest

from tests.conftest import records, run
from tests.training.runs import Run, status

TEACHER = "the run of the variant mdm"
VARIANTS = {
    "ar": ("ar", []),
    "ar-regularised": (
        "ar",
        [
            *("--token-dropout-max", "0.5", "--mlp-dropout", "0.2", "--hidden-dropout", "0.1"),
            *("--meta-gradient-norm", "0.1", "--meta-gradient-style", "lr"),
            *("--weight-decay-incr-style", "linear", "--start-weight-decay", "0", "--end-weight-decay", "0.93"),
        ],
    ),
    "ar-averaged": ("ar", ["--ema-decay", "0.9"]),
    "ar-completep": (
        "ar",
        [
            *("--parametrization", "completep", "--base-hidden-size", "8", "--base-num-layers", "1"),
            *("--weight-decay-scaling", "sqrt-width"),
        ],
    ),
    "mdm": ("mdm", []),
    # the run stops at 40 samples, before the average starts
    "mdm-muon-averaged": ("mdm", ["--optimizer", "muon", "--average-from-samples", "60"]),
    "ar-cyclic": ("ar", ["--lr-decay-style", "cyclic", "--lr-cycles", "3", "--save-interval", "5"]),
    "mdm-window": ("mdm", ["--mask-time-distribution", "window", "--low-noise-samples", "60"]),
    "dual": ("ar", ["--objective", "dual"]),
    "block-diffusion": ("mdm", ["--objective", "block-diffusion", "--diffusion-block-size", "4"]),
    "ar-noise": (
        "ar",
        [
            *("--masked-input-weight", "0.4", "--randmask-ratio", "0.5", "--random-replacement", "0.1"),
            *("--stochastic-depth", "0.5", "--target-offset-max", "3", "--target-positions"),
        ],
    ),
    "mdm-distilled": ("mdm", ["--teacher", TEACHER, "--distill-temperature", "2"]),
    "ar-loops": (
        "ar",
        ["--num-loops", "3", "--loop-layers", "1-1", "--stochastic-depth", "0.5", "--mlp-dropout", "0.2"],
    ),
    "mdm-dropout": ("mdm", ["--mlp-dropout", "0.2", "--attention-dropout", "0.1", "--embedding-dropout", "0.1"]),
}


def command(variant, folder):
    """Return objective and flags of a variant; `folder(variant)` is the run folder of another one."""
    objective, flags = VARIANTS[variant]
    return objective, [str(folder("mdm")) if flag == TEACHER else flag for flag in flags]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folders = {}

    def folder(variant):
        if variant not in folders:
            objective, flags = command(variant, folder)
            folders[variant] = tmp_path_factory.mktemp(variant)
            run(objective, *tiny, *flags, "--save", folders[variant])
        return folders[variant]

    return folder


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ar-averaged"])  # it is killed below
def test_stopped_and_resumed_equals_uninterrupted(variant, uninterrupted, tiny, tmp_path):
    objective, flags = command(variant, uninterrupted)
    run(objective, *tiny, *flags, "--save", tmp_path, "--exit-interval", 5)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    run(objective, *tiny, *flags, "--save", tmp_path, "--num-workers", 2)
    assert records(tmp_path) == records(uninterrupted(variant))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_one_command_that_saves_and_loads_begins_and_resumes(uninterrupted, tiny, tmp_path):
    command = [*tiny, "--save", tmp_path / "run", "--load", f"{tmp_path}/./run/"]  # like Megatron's scripts
    run("ar", *command, "--exit-interval", 5)
    run("ar", *command, "--exit-on-missing-checkpoint")
    assert records(tmp_path / "run") == records(uninterrupted("ar"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["branched_from"] is None


@pytest.mark.parametrize("variant", ["ar-averaged", "mdm-dropout"])
def test_killed_and_resumed_equals_uninterrupted(variant, uninterrupted, tiny, tmp_path):
    objective, flags = VARIANTS[variant]
    folder = tmp_path / "run"
    metrics, saved = folder / "metrics.jsonl", folder / "checkpoints" / "iter_0000004"
    with Run(objective, [*tiny, *flags, "--save", folder], tmp_path) as training:
        training.wait_until(lambda: saved.exists() and '"iteration": 6,' in metrics.read_text())
        training.signal("SIGKILL")
        assert training.codes() == [-signal.SIGKILL]
    run(objective, *tiny, *flags, "--save", folder)
    assert records(folder) == records(uninterrupted(variant))


def test_a_changing_weight_decay_is_recorded(uninterrupted):
    for record in records(uninterrupted("ar-regularised"), "train"):
        assert record["weight_decay"] == pytest.approx(record["consumed_samples"] / 100)


@pytest.mark.parametrize("variant", ["ar", "mdm"])
def test_two_processes_give_the_losses_of_one(variant, uninterrupted, tiny, tmp_path):
    objective, flags = VARIANTS[variant]
    run(objective, *tiny, *flags, "--save", tmp_path, processes=2)
    for expected, actual in zip(records(uninterrupted(variant)), records(tmp_path), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6 if expected["iteration"] == 1 else 1e-4)
        assert actual["consumed_samples"] == expected["consumed_samples"]


def test_micro_batch_and_workers_change_nothing(uninterrupted, tiny, tmp_path):
    run("mdm", *tiny, "--save", tmp_path, "--micro-batch-size", 2, "--num-workers", 1, "--eval-batch-size", 4)
    for expected, actual in zip(records(uninterrupted("mdm")), records(tmp_path), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_dual_run_resumes_only_if_every_micro_batch_is_of_one_kind(uninterrupted, tiny, tmp_path):
    branch = [*tiny, "--objective", "dual", "--load", uninterrupted("dual"), "--save", tmp_path, "--train-samples", 109]
    refused = run("ar", *branch, check=False)  # 93 samples are consumed, and 4 of every 8 are causal
    assert refused.returncode == 2 and "--micro-batch-size 4: the run in" in refused.stderr
    assert "has trained on 93 samples" in refused.stderr and "give 1 or" in refused.stderr
    run("ar", *branch, "--micro-batch-size", 1)
    assert records(tmp_path, "train")[-1]["consumed_samples"] == 109


def test_averages_are_evaluated_with_the_weights_and_change_nothing_else(uninterrupted):
    plain, averaged = records(uninterrupted("ar")), records(uninterrupted("ar-averaged"))
    extra = [record for record in averaged if record.get("set", "").endswith(".average")]
    assert [record for record in averaged if record not in extra] == plain
    assert [(record["iteration"], record["set"]) for record in extra] == [
        (iteration, f"{name}.average") for iteration in (4, 8, 12) for name in ("tuning", "validation")
    ]
    assert all(
        (uninterrupted("ar-averaged") / "validation" / r["set"] / f"{r['iteration']}.npz").exists() for r in extra
    )
    best = [json.loads((uninterrupted(v) / "checkpoints" / "best.json").read_text()) for v in ("ar", "ar-averaged")]
    assert best[0] == best[1]  # the model weights decide
    late = [record for record in records(uninterrupted("mdm-muon-averaged")) if ".average" in record.get("set", "")]
    assert {record["iteration"] for record in late} == {8, 12}


def test_an_evaluation_alone_reads_the_average_too(uninterrupted):
    folder = uninterrupted("mdm-muon-averaged")
    done = run("mdm", "--skip-train", "--load", folder)
    losses = {record["set"]: record["loss"] for record in map(json.loads, done.stdout.splitlines())}
    assert losses == {record["set"]: record["loss"] for record in records(folder, "valid") if record["iteration"] == 12}
    assert len(losses) == 4


def test_muon_and_an_average_move_between_layouts(uninterrupted, tiny, tmp_path):
    command = ["mdm", *tiny, *VARIANTS["mdm-muon-averaged"][1], "--save", tmp_path]
    run(*command, "--exit-interval", 9, "--tensor-model-parallel-size", 2, processes=2)
    run(*command)
    for expected, actual in zip(records(uninterrupted("mdm-muon-averaged")), records(tmp_path), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_checkpoint_of_two_processes_resumes_on_one(uninterrupted, tiny, tmp_path):
    run("mdm", *tiny, "--save", tmp_path, "--exit-interval", 5, processes=2)
    run("mdm", *tiny, "--save", tmp_path)
    for expected, actual in zip(records(uninterrupted("mdm")), records(tmp_path), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_resume_says_when_dropout_masks_or_trial_moves_change(tiny, tmp_path):
    dropout = [*tiny, "--hidden-dropout", 0.1, "--save", tmp_path / "dropout"]
    run("ar", *dropout, "--exit-interval", 4)
    assert "dropout masks differ" not in run("ar", *dropout, "--exit-interval", 4).stderr
    assert "dropout masks differ" in run("ar", *dropout, "--micro-batch-size", 2).stderr
    assert "dropout masks differ" not in run("ar", "--skip-train", *dropout, "--micro-batch-size", 8).stderr
    moves = [*tiny, "--meta-gradient-norm", 0.5, "--save", tmp_path / "moves"]
    run("ar", *moves, "--exit-interval", 4)
    assert "trial moves" not in run("ar", *moves, "--exit-interval", 4, "--micro-batch-size", 2).stderr
    stderr = run("ar", *moves, "--micro-batch-size", 2, processes=2).stderr
    assert "the trial moves of --meta-gradient-norm 0.5 follow the gradients of other samples" in stderr


def test_a_run_killed_with_loader_workers_restarts_at_once(tiny, tmp_path):
    """Workers outlive a killed run by seconds; they must not hold its lock."""
    folder = tmp_path / "run"
    longer = [flag if flag != "93" else "100000" for flag in tiny] + ["--num-workers", "2", "--save", folder]
    with Run("mdm", longer, tmp_path) as training:
        training.wait_until((folder / "checkpoints" / "latest.json").exists)
        training.signal("SIGKILL")
        assert training.codes() == [-signal.SIGKILL]
    run("mdm", *longer, "--exit-interval", 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_and_leaves_cleanly(name, tiny, tmp_path):
    longer = [flag if flag != "93" else "100000" for flag in tiny]
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    with Run("ar", [*longer, "--eval-interval", "100000", "--save", folder], tmp_path) as training:
        training.wait_until(lambda: metrics.exists() and "train" in metrics.read_text())
        training.signal(name)
        assert training.codes() == [0]
    state = status(folder)
    assert state["state"] == "stopped" and state["reason"] == f"signal {name}"
    assert json.loads((folder / "checkpoints" / "latest.json").read_text())["iteration"] == state["iteration"]


def test_a_changed_budget_is_refused_and_a_branch_is_the_remedy(uninterrupted, tiny, tmp_path):
    folder = uninterrupted("ar")
    longer = [flag if flag != "93" else "120" for flag in tiny]
    refused = run("ar", *longer, "--save", folder, check=False)
    assert refused.returncode == 2 and "120" in refused.stderr and "--load" in refused.stderr
    run("ar", *longer, "--load", folder, "--save", tmp_path)
    branched = records(tmp_path, "train")
    assert branched[:12] == records(folder, "train") and branched[-1]["consumed_samples"] == 120
    assert json.loads((tmp_path / "config.json").read_text())["branched_from"].startswith(str(folder))
