"""Reports name what distinguishes runs: regularisers, techniques and options of the objective."""

from dataclasses import asdict

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.objectives.registry import OBJECTIVES
from megatron.reporting.groups import group_runs
from megatron.reporting.methods import method_words
from megatron.reporting.runs import Run, TrainingCurve
from megatron.training.command_line import parse
from tests.objectives.combinations import MODEL_FLAGS, OPTIONS

# what changes the layout of a run or adds an average of its weights trains the same model
SAME_MODEL = ("--deepspeed", "--ema-decay", "--average-from-samples", "--objective")


def recorded(flags: str) -> dict | None:
    """Return the configuration of flags as a run records it; None where they are refused."""
    try:
        return asdict(parse("ar", f"{MODEL_FLAGS} {flags}".split()))
    except ConfigurationError:
        return None


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith(SAME_MODEL)])
def test_every_option_of_training_is_named(option):
    pairs = [
        (recorded(f"--objective {name}"), changed)
        for name in OBJECTIVES
        if (changed := recorded(f"--objective {name} {option}"))
    ]
    assert pairs and all(method_words(changed) != method_words(plain) for plain, changed in pairs)


@pytest.mark.parametrize("flags, text", [
    ("", ""),
    ("--num-loops 4", "4 loops of all blocks, "),
    ("--num-loops 2 --loop-layers 0-1 --mlp-dropout 0.2", "MLP dropout 0.2, 2 loops of blocks 0-1, "),
    ("--objective mdm --mask-time-distribution bell", "times 0.5 ± 0.2, "),
    ("--objective mdm --mask-time-distribution window --mask-time-weighting none --ar-ratio 0.5",
     "unweighted times in [0.25, 0.75], --ar-ratio 0.5, "),
    ("--objective mdm --mdm-loss simple", "unweighted cross-entropy, "),
    ("--meta-gradient-norm 0.5 --optimizer muon", "meta-gradient 0.5, Muon, "),
    ("--meta-gradient-norm 0.5 --meta-gradient-style lr --meta-gradient-parameters mlp",
     "meta-gradient 0.5 times the learning rate's share of MLPs, "),
    ("--teacher a b --distill-temperature 2", "2 teachers at weight 0.5 and temperature 2.0, "),
    ("--lr-decay-style cyclic --lr-cycles 3", "3 cycles, "),
    ("--parametrization completep --base-hidden-size 8 --base-num-layers 1", "CompleteP of width 8 and 1 layers, "),
])  # fmt: skip
def test_words_of_a_run(flags, text):
    assert method_words(recorded(flags)) == f"{text}weight decay 0.1"


def test_an_older_configuration_lacks_newer_flags():
    config = {"model": {"mlp_dropout": 0.1}, "objective": {}, "optimizer": {"weight_decay": 0.3}}
    assert method_words(config) == "MLP dropout 0.1, weight decay 0.3"


def test_students_of_other_teachers_are_no_seeds_of_a_run():
    """Students of one ensemble that differ in their seed are a group, those without teachers or of others are not."""

    def run(seed: int, teachers: tuple[str, ...], weight: float = 0.5) -> Run:
        flags = f"--teacher {' '.join(teachers)} --distill-weight {weight}" if teachers else ""
        config = recorded(f"--seed {seed} {flags}") | {"objective_name": "ar", "train_samples": 32}
        config |= {"teachers": [{"checkpoint": f"elsewhere/{name}", "weights": name} for name in teachers]}
        curve = TrainingCurve(np.zeros(0), np.zeros(0))
        return Run(name=str(seed), folder=None, config=config, train=curve, valid={}, consumed_samples=32)

    runs = [run(1, ()), run(2, ("a", "b")), run(3, ("a", "b")), run(4, ("a",)), run(5, ("a", "b"), 0.9)]
    groups = group_runs(runs)
    assert [[member.name for member in group.runs] for group in groups] == [["1"], ["2", "3"], ["4"], ["5"]]
    assert len({group.method for group in groups}) == 4
