"""What a resume and a branch must keep of the recorded configuration."""

import json
from dataclasses import asdict
from functools import partial

import pytest

from megatron.config.resolve import resolve
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse
from megatron.training.resume_checks import check_resume

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 100 --global-batch-size 8".split()
VOCABULARY = Vocabulary(257)
BEGUN = "--train-samples 93 --train-data-path data --save run"


def config(line: str):
    return parse("ar", [*MODEL, *line.split()])


def plan(line: str, unique_tokens: int = 12_345):
    return resolve(config(line), VOCABULARY, unique_tokens, capabilities(config(line).objective.objective))


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigurationError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recorded(line: str = BEGUN, objective: str = "ar", unique_tokens: int = 12_345) -> dict:
    """Return the content of config.json that a resume reads."""
    names = {"objective_name": objective, "vocabulary_size": VOCABULARY.size}
    return json.loads(json.dumps(names | asdict(config(line)) | {"plan": asdict(plan(line, unique_tokens))}))


def resume(line: str, *, branch: bool = False, objective: str = "ar", before: dict | None = None, unique: int = 12_345):
    check_resume(before or recorded(), config(line), plan(line, unique), objective=objective, branch=branch)


@pytest.mark.parametrize(
    "free",
    [
        "--num-workers 2",
        "--micro-batch-size 2",
        "--compile",
        "--log-interval 3",
        "--eval-interval 9",
        "--save-interval 9",
        "--keep-every-epochs 3",
        "--exit-interval 5",
        "--exit-duration-in-mins 3",
        "--kill-switch-file stop",
        "--valid-data-path v",
        "--train-data-path moved",
        "--load run",
    ],
)
def test_what_changes_no_weight_is_free_on_resume(free):
    resume(f"{BEGUN} {free}")


def test_one_budget_may_be_written_as_another():
    resume("--train-samples 96 --save run", before=recorded("--train-iters 12 --save run"))


REFUSED_ON_RESUME = {
    "--train-samples 94": "--train-samples 94 makes train samples 94, and the run in run was started with 93",
    "--optimizer muon": "--optimizer muon: the run in run was started with --optimizer adamw",
    "--ema-decay 0.9": "--ema-decay 0.9: the run in run was started with no --ema-decay",
    "--weight-decay-parameters all": "--weight-decay-parameters all: the run in run was started with "
    "--weight-decay-parameters matrices",
    "--lr 0.1": "--lr 0.1: the run in run was started with --lr 0.0002",
    "--lr-decay-samples 50": "--lr-decay-samples 50: the run in run was started with no --lr-decay-samples",
    "--lr-warmup-samples 5": "--lr-warmup-samples 5: the run in run was started with no --lr-warmup-samples",
    "--no-swiglu": "--no-swiglu: the run in run was started with --swiglu",
    "--global-batch-size 16": "--global-batch-size 16: the run in run was started with --global-batch-size 8",
    "--seed 1": "--seed 1: the run in run was started with --seed 1234",
    "--num-mc 8": "--num-mc 8: the run in run was started with --num-mc 4",
    "--mask-times iid": "--mask-times iid: the run in run was started with --mask-times stratified",
    "--epoch-order windows": "--epoch-order windows: the run in run was started with --epoch-order documents",
    "--blend-order megatron": "--blend-order megatron: the run in run was started with --blend-order due-time",
}


@pytest.mark.parametrize("changed", REFUSED_ON_RESUME)
def test_a_change_is_refused_and_the_remedy_is_a_branch(changed):
    message = refusal(resume, f"{BEGUN} {changed}")
    assert message == REFUSED_ON_RESUME[changed] + "; resume with that, or branch: --load run --save ANOTHER_DIR"


def test_other_data_is_named_by_the_flag_that_chose_it():
    message = refusal(lambda: resume(BEGUN, unique=999))
    assert message.startswith(
        "--train-data-path data makes unique tokens 999, and the run in run was started with 12345"
    )
    before = recorded("--train-epochs 2 --save run")
    message = refusal(lambda: resume("--train-epochs 3 --save run", before=before))
    assert message.startswith("--train-epochs 3.0 makes train samples 370, and the run in run was started with 246")


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_another_objective_is_never_continued(objective):
    other = {"ar": "mdm", "mdm": "ar"}[objective]
    for branch, line in ((False, BEGUN), (True, f"{BEGUN} --load other")):
        folder = "--load other" if branch else "--save run"
        before = recorded(objective=objective)
        message = refusal(partial(resume, line, branch=branch, objective=other, before=before))
        assert message.startswith(
            f"{folder}: holds a run of objective {objective}, not {other}; give --objective {objective} "
        )


def test_a_branch_may_change_all_but_the_network():
    line = "--load run --save branch --train-samples 500 --lr 0.1 --seed 5 --lr-decay-style WSD --global-batch-size 16"
    resume(line, branch=True)
    message = refusal(lambda: resume(f"{line} --num-layers 3", branch=True))
    assert message.startswith(
        "--num-layers 3: the run in run was started with --num-layers 2; a branch keeps the model"
    )
    message = refusal(lambda: resume(f"{line} --optimizer muon", branch=True))
    assert message == (
        "--optimizer muon: the run in run was started with --optimizer adamw, whose moments a branch continues "
        "with; keep it"
    )
