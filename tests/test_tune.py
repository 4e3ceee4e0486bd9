"""tools/tune.py: which settings it tries, which it chooses, what it prints."""

import json
import sys

import pytest

from megatron.config.vocabulary import Vocabulary
from megatron.training.command_line import parse_with
from megatron.training.step_benchmark import Trial, attempt
from tests.conftest import ROOT, environment
from tests.distributed import joined
from tests.forked import run_script
from tools import tune
from tools.tune import Choice, Options, Tuner, verdict

TRAINING = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --vocabulary-size 300 --fp32 --lr 1e-3"
)


@pytest.fixture
def tuner(monkeypatch):
    """Return a function that tunes flags; `speed` gives the tokens per second of a configuration, 0 if it fails."""

    def search(flags: str, speed) -> Tuner:
        def attempt(config, vocabulary, steps):
            tokens_per_second = speed(
                config.training.micro_batch_size, config.parallel.recompute_granularity, config.training.compile
            )
            if not tokens_per_second:
                return "none"
            seconds = config.training.global_batch_size * config.data.seq_length / tokens_per_second
            return Trial(seconds, tokens_per_second, 40.0 if config.training.compile else 1.0, 2**30, 5.0, 1.0)

        monkeypatch.setattr(tune, "attempt", attempt)
        monkeypatch.setattr(tune, "cpp_compiler", lambda: "c++")
        with joined():
            tuner = Tuner(*parse_with(Options, "", f"{TRAINING} {flags}".split(), ()))
            tuner.search()
        return tuner

    return search


def tried(tuner: Tuner, **fixed) -> list[int]:
    return [
        choice.micro_batch
        for choice in tuner.trials
        if all(getattr(choice, name) == value for name, value in fixed.items())
    ]


def test_micro_batches_grow_while_that_gains(tuner):
    tuned = tuner("--micro-batch-max 64", lambda size, recompute, compile: 100.0 * min(size, 8) * (1 + compile / 4))
    assert tried(tuned, compile=False, recompute=None) == [8, 1, 2, 4, 16]  # 8 as typed; 16 is no faster
    assert set(tried(tuned, compile=True, recompute=None)) == {4, 8, 16}
    assert tuned.best == Choice(8, None, True)
    assert "--micro-batch-size 8 --compile  (1.25 times --micro-batch-size 8 --no-compile)" in verdict(tuned)


def test_what_compiling_pays_for_is_told_of_the_steps_that_are_trained(tuner):
    tuned = tuner("--micro-batch-max 8 --global-batch-size 64", lambda size, recompute, compile: 800.0 * (1 + compile))
    # 64 samples of 32 tokens: 2.56 s and 1.28 s
    assert verdict(tuned).endswith("saves 1.28 s of a step of 64 samples: it pays after 30 steps")


def test_recomputation_is_tried_where_a_micro_batch_fits_only_with_it(tuner):
    def speed(size, recompute, compile):
        return 0 if size > 2 and not recompute else size * (70.0 if recompute else 100.0)

    tuned = tuner("--micro-batch-max 4", speed)
    assert tuned.best == Choice(4, "selective", False) or tuned.best == Choice(4, "selective", True)
    assert tuned.trials[Choice(4, None, False)] == "none"
    full_only = tuner("--micro-batch-max 4", lambda size, recompute, compile: size * 9.0 if recompute == "full" else 0)
    assert full_only.best.recompute == "full"
    assert "nothing fits" in verdict(tuner("--micro-batch-max 4", lambda *_: 0))


@pytest.mark.parametrize("batch, largest, expected", [(256, 64, [1, 2, 4, 8, 16, 32, 64]), (48, 32, [1, 2, 4, 8, 24])])
def test_pieces_divide_the_step(tuner, batch, largest, expected):
    tuned = tuner(f"--global-batch-size {batch} --micro-batch-max {largest}", lambda size, *_: 2.0**size)
    assert tuned.sizes() == expected and tuned.samples == expected[-1]


def test_what_the_formula_refuses_is_not_started(tuner, monkeypatch):
    monkeypatch.setattr(tune, "device_memory", lambda device: 1)
    tuned = tuner("", lambda *_: pytest.fail("it was started"))
    assert tuned.best is None and all("does not fit: " in failed for failed in tuned.trials.values())


def test_a_small_network_is_tuned(tmp_path):
    flags = f"{TRAINING} --objective mdm --global-batch-size 4 --micro-batch-max 2 --trial-steps 1".split()
    command = [str(ROOT / "tools" / "tune.py"), *flags, "--output", str(tmp_path / "tune.json")]
    done = run_script(
        command, environment() | {"PATH": "/nowhere"}, timeout=120
    )  # no C++ compiler, so no compiled trials
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tune.json").read_text())
    assert len(report["trials"]) == 4 and all(trial["tokens_per_second"] > 0 for trial in report["trials"])
    # other micro-batch sizes and recomputed activations give the same losses
    losses = [trial["loss"] for trial in report["trials"]]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert report["config"]["objective"]["objective"] == "mdm"
    assert done.stdout.splitlines()[-1].startswith("fastest: --micro-batch-size ")


def test_a_trial_sees_documents_where_that_is_asked_for():
    losses = []
    with joined():
        for flags in ("", "--reset-attention-mask"):
            options, config = parse_with(Options, "", f"{TRAINING} --vocabulary-size 9 {flags}".split(), ())
            losses.append(attempt(config, Vocabulary(options.vocabulary_size), 1).loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--trial-steps 0", "--trial-steps 0: must be at least 1"),
        ("--output none/tune.json", "--output none/tune.json: none is not a folder"),
        ("--cpu-offload", "--cpu-offload: moves states between a GPU and the host, and there is no GPU"),
        ("--trial-step 3", "unknown flag --trial-step; did you mean --trial-steps?"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, flags, expected):
    monkeypatch.setattr(sys, "argv", ["tune.py", *TRAINING.split(), *flags.split()])
    with pytest.raises(SystemExit) as caught:
        tune.main()
    stderr = capsys.readouterr().err
    assert caught.value.code == 2 and stderr.startswith(f"error: {expected}") and stderr.count("\n") == 1
