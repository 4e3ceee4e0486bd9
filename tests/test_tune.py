"""The tool that finds the fastest settings: what it tries, what it chooses, what it prints."""

import json
import sys

import pytest

from megatron.config.sections import Vocabulary
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
    """Return a function that searches for flags; how fast a configuration is, a formula says, or that it fails."""

    def search(flags: str, speed) -> Tuner:
        def attempt(config, vocabulary, steps):
            found = speed(
                config.training.micro_batch_size, config.parallel.recompute_granularity, config.training.compile
            )
            seconds = config.training.global_batch_size * config.data.seq_length / found if found else 0.0
            return Trial(seconds, found, 40.0 if config.training.compile else 1.0, 2**30, 5.0, 1.0) if found else "none"

        monkeypatch.setattr(tune, "attempt", attempt)
        monkeypatch.setattr(tune, "cpp_compiler", lambda: "c++")
        with joined():
            tuner = Tuner(*parse_with(Options, "", f"{TRAINING} {flags}".split(), ()))
            tuner.search()
        return tuner

    return search


def tried(tuner: Tuner, **fixed) -> list[int]:
    return [each.micro_batch for each in tuner.trials if all(getattr(each, name) == v for name, v in fixed.items())]


def test_micro_batches_grow_while_that_gains(tuner):
    found = tuner("--micro-batch-max 64", lambda size, recompute, compile: 100.0 * min(size, 8) * (1 + compile / 4))
    assert tried(found, compile=False, recompute=None) == [8, 1, 2, 4, 16]  # 8 as typed; 16 gains nothing more
    assert set(tried(found, compile=True, recompute=None)) == {4, 8, 16}
    assert found.best == Choice(8, None, True)
    assert "--micro-batch-size 8 --compile  (1.25 times --micro-batch-size 8 --no-compile)" in verdict(found)


def test_what_compiling_pays_for_is_told_of_the_steps_that_are_trained(tuner):
    found = tuner("--micro-batch-max 8 --global-batch-size 64", lambda size, recompute, compile: 800.0 * (1 + compile))
    # 64 samples of 32 tokens: 2.56 s and 1.28 s
    assert verdict(found).endswith("saves 1.28 s of a step of 64 samples: it pays after 30 steps")


def test_recomputation_is_tried_where_a_micro_batch_fits_only_with_it(tuner):
    def speed(size, recompute, compile):
        return 0 if size > 2 and not recompute else size * (70.0 if recompute else 100.0)

    found = tuner("--micro-batch-max 4", speed)
    assert found.best == Choice(4, "selective", False) or found.best == Choice(4, "selective", True)
    assert found.trials[Choice(4, None, False)] == "none"
    nothing = tuner("--micro-batch-max 4", lambda size, recompute, compile: size * 9.0 if recompute == "full" else 0)
    assert nothing.best.recompute == "full"
    assert "nothing fits" in verdict(tuner("--micro-batch-max 4", lambda *_: 0))


@pytest.mark.parametrize("batch, most, expected", [(256, 64, [1, 2, 4, 8, 16, 32, 64]), (48, 32, [1, 2, 4, 8, 24])])
def test_pieces_divide_the_step(tuner, batch, most, expected):
    found = tuner(f"--global-batch-size {batch} --micro-batch-max {most}", lambda size, *_: 2.0**size)
    assert found.sizes() == expected and found.samples == expected[-1]


def test_what_the_formula_refuses_is_not_started(tuner, monkeypatch):
    monkeypatch.setattr(tune, "device_memory", lambda device: 1)
    found = tuner("", lambda *_: pytest.fail("it was started"))
    assert found.best is None and all("does not fit: " in failed for failed in found.trials.values())


def test_a_small_network_is_tuned(tmp_path):
    flags = f"{TRAINING} --objective mdm --global-batch-size 4 --micro-batch-max 2 --trial-steps 1".split()
    command = [str(ROOT / "tools" / "tune.py"), *flags, "--output", str(tmp_path / "tune.json")]
    done = run_script(command, environment() | {"PATH": "/nowhere"}, timeout=120)  # no compiler: nothing compiles
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tune.json").read_text())
    assert len(report["trials"]) == 4 and all(trial["tokens_per_second"] > 0 for trial in report["trials"])
    # cut otherwise or computed again, the same steps are taken
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
        ("--output none/tune.json", "--output none/tune.json: none is no folder"),
        ("--cpu-offload", "--cpu-offload: moves states between a GPU and the host, and there is no GPU"),
        ("--trial-step 3", "unknown flag --trial-step; did you mean --trial-steps?"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, flags, expected):
    monkeypatch.setattr(sys, "argv", ["tune.py", *TRAINING.split(), *flags.split()])
    with pytest.raises(SystemExit) as left:
        tune.main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith(f"error: {expected}") and told.count("\n") == 1
