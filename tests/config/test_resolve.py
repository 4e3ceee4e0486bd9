"""Budgets, derived numbers, parameter counts, and the checks between sections."""

import json
from dataclasses import asdict
from fractions import Fraction
from functools import partial

import pytest

from megatron.config.resolve import check_batch, check_layout, check_resume, resolve
from megatron.config.sections import ModelConfig, Vocabulary
from megatron.config.sizes import parameter_count
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 100 --global-batch-size 8".split()
VOCABULARY = Vocabulary(257)


def config(line: str):
    return parse("ar", [*MODEL, *line.split()])


def plan(line: str, unique_tokens: int = 12_345):
    return resolve(config(line), VOCABULARY, unique_tokens, capabilities(config(line).objective.objective))


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigurationError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("epochs", ["1", "0.5", "0.29", "3.7", "100", "1e3", "7.000001"])
@pytest.mark.parametrize("unique", [12_345, 1_000, 99_999_999_999])
def test_epochs_are_floor_of_tokens_times_epochs_over_the_sample(epochs, unique):
    assert plan(f"--train-epochs {epochs}", unique).train_samples == Fraction(epochs) * unique // 100


def test_the_floor_is_of_the_number_as_written():
    assert int(700 * 2.3 / 10) == 160  # in floating point
    assert plan("--seq-length 10 --train-epochs 2.3", 700).train_samples == 161


def test_samples_and_steps():
    run_plan = plan("--train-samples 93")
    assert (run_plan.train_samples, run_plan.steps) == (93, 12)  # the last step is short
    assert (plan("--train-samples 96").steps, plan("--train-samples 97").steps) == (12, 13)
    run_plan = plan("--train-iters 5")
    assert (run_plan.train_samples, run_plan.steps) == (40, 5)


def test_flops_are_six_n_d():
    parameters = parameter_count(config("--train-iters 1").model, VOCABULARY)
    for samples in (1, 7, 1000):
        assert plan(f"--train-flops {6 * parameters * 100 * samples}").train_samples == samples
        assert plan(f"--train-flops {6 * parameters * 100 * samples + 5}").train_samples == samples
    run_plan = plan("--train-samples 50")
    assert run_plan.flops(50, 100) == 6 * parameters * 5000 and run_plan.tokens(50, 100) == 5000
    assert run_plan.parameters == parameters and run_plan.vocabulary_size == 257 and run_plan.unique_tokens == 12_345


def test_defaults_follow_from_the_budget():
    run_plan = plan("--train-samples 1000 --lr-decay-style WSD")
    assert (run_plan.lr_warmup_samples, run_plan.lr_decay_samples, run_plan.lr_wsd_decay_samples) == (10, 1000, 100)
    assert (run_plan.eval_interval, run_plan.save_interval) == (125 // 20, 125 // 20)
    run_plan = plan("--train-samples 50")
    assert (run_plan.lr_warmup_samples, run_plan.eval_interval) == (0, 1)
    line = "--lr-warmup-samples 20 --lr-decay-samples 500 --lr-wsd-decay-samples 30 --lr-decay-style WSD"
    run_plan = plan(f"--train-samples 1000 {line} --eval-interval 7")
    assert (run_plan.lr_warmup_samples, run_plan.lr_decay_samples, run_plan.lr_wsd_decay_samples) == (20, 500, 30)
    assert (run_plan.eval_interval, run_plan.save_interval) == (7, 7)
    assert plan("--train-samples 9 --eval-interval 7 --save-interval 3").save_interval == 3


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "",
            "no budget: a run has one budget; give exactly one of --train-epochs, --train-samples, --train-iters, --tr",
        ),
        (
            "--train-iters 3 --train-epochs 2",
            "--train-epochs 2.0 and --train-iters 3: a run has one budget; give exactly",
        ),
        ("--train-epochs 0.001", "--train-epochs 0.001: is less than one sample of 100 tokens; raise it"),
        ("--train-flops 10", "--train-flops 10.0: is less than one sample of 100 tokens; raise it"),
        ("--train-samples 9 --lr-warmup-samples 10", "--lr-warmup-samples 10: is longer than the whole schedule of 9"),
        ("--train-samples 1000 --lr-decay-samples 5", "--lr-warmup-samples 10: is longer than the whole schedule of 5"),
        (
            "--train-samples 9 --optimizer muon --deepspeed",
            "--optimizer muon: orthogonalises whole matrices, and DeepSpeed's ZeRO updates flat pieces of them; leave",
        ),
        (
            "--train-samples 9 --ema-decay 0.9 --deepspeed",
            "--ema-decay 0.9: averages the fp32 weights, which DeepSpeed",
        ),
        (
            "--train-samples 9 --average-from-samples 5 --deepspeed",
            "--average-from-samples 5: averages the fp32 weights, which DeepSpeed keeps in flat pieces of its own",
        ),
        (
            "--train-samples 9 --average-from-samples 10",
            "--average-from-samples 10: is more than the budget of 9 samples, so nothing would be averaged; lower it",
        ),
        (
            "--train-samples 100 --lr-decay-style WSD --lr-warmup-samples 50 --lr-wsd-decay-samples 60",
            "--lr-wsd-decay-samples 60: and a warm-up of 50 samples are longer than the whole schedule of 100",
        ),
    ],
)
def test_contradictions_are_refused(line, message):
    assert refusal(plan, line).startswith(message)


def test_a_step_divides_into_micro_batches_of_all_processes():
    for micro, size in ((8, 1), (4, 2), (1, 8), (2, 1)):
        check_batch(config(f"--micro-batch-size {micro}"), size, capabilities("ar"))
    message = refusal(check_batch, config("--micro-batch-size 3"), 1, capabilities("ar"))
    assert message == "--global-batch-size 8: is not a multiple of --micro-batch-size 3 times 1 rank = 3; take 6 or 9"
    message = refusal(check_batch, config("--micro-batch-size 4"), 4, capabilities("ar"))
    assert message.endswith("--micro-batch-size 4 times 4 ranks = 16; take 16")


# --------------------------------------------------------------------------------------- resuming

BEGUN = "--train-samples 93 --train-data-path data --save run"


@pytest.mark.parametrize("size, line", [
    (8, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    (4, "--zero-stage 3 --num-distributed-optimizer-instances 2"),
    (2, "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    (2, "--num-layers 3 --pipeline-model-parallel-size 2"),
])  # fmt: skip
def test_a_layout_that_fits_passes(size, line):
    check_layout(config(line), size)
    check_batch(config(f"{line} --micro-batch-size 1"), size, capabilities("ar"))


@pytest.mark.parametrize("size, line, message", [
    (6, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
     "--tensor-model-parallel-size 2: makes groups of 4 ranks (2 tensor-parallel x 2 stages), and 6 were started; "
     "start a multiple of 4"),
    (1, "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2: makes groups of 2"),
    (4, "--tensor-model-parallel-size 4",
     "--tensor-model-parallel-size 4: does not divide --num-attention-heads 2; give 2, or change --num-"),
    (4, "--num-attention-heads 4 --group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4",
     "--tensor-model-parallel-size 4: does not divide --num-query-groups 2"),
    (2, "--ffn-hidden-size 65 --tensor-model-parallel-size 2",
     "--tensor-model-parallel-size 2: does not divide --ffn-hidden-size 65"),
    (2, "--seq-length 101 --tensor-model-parallel-size 2",
     "--tensor-model-parallel-size 2: does not divide --seq-length 101"),
    (4, "--pipeline-model-parallel-size 4", "--pipeline-model-parallel-size 4: is more than --num-layers 2"),
    (2, "--num-layers 6 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
     "--num-layers-per-virtual-pipeline-stage 2: times 2 stages does not divide --num-layers 6"),
    (2, "--tensor-model-parallel-size 2 --recompute-granularity full --compile", "--compile: cannot"),
    (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
     "--num-layers-per-virtual-pipeline-stage 1: gives every rank one stage"),
    (2, "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-num-layers 2",
     "--recompute-num-layers 2: is more than the 1 layer of a stage; lower"),
    (3, "--num-distributed-optimizer-instances 2",
     "--num-distributed-optimizer-instances 2: does not divide the 3 data-parallel ranks"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(size, line, message):
    assert refusal(check_layout, config(line), size).startswith(message)


def test_a_pipeline_needs_enough_micro_batches():
    message = refusal(
        check_batch, config("--pipeline-model-parallel-size 2 --micro-batch-size 4"), 4, capabilities("ar")
    )
    assert message == (
        "--global-batch-size 8: makes 1 micro-batch a step, and --pipeline-model-parallel-size 2 needs at least as "
        "many; take 16, or lower --micro-batch-size"
    )
    interleaved = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    message = refusal(
        check_batch, config(f"{interleaved} --global-batch-size 12 --micro-batch-size 4"), 2, capabilities("ar")
    )
    assert "makes 3 micro-batches a step" in message and "needs a multiple of that; take 16" in message


def recorded(line: str = BEGUN, objective: str = "ar", unique_tokens: int = 12_345) -> dict:
    """Return the content of config.json that a resume reads."""
    names = {"objective_name": objective, "vocabulary_size": VOCABULARY.size}
    return json.loads(json.dumps(names | asdict(config(line)) | {"plan": asdict(plan(line, unique_tokens))}))


def resume(line: str, *, branch: bool = False, objective: str = "ar", before: dict | None = None, unique: int = 12_345):
    check_resume(before or recorded(), config(line), plan(line, unique), objective, branch)


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
def test_another_objective_or_vocabulary_is_never_continued(objective):
    other = {"ar": "mdm", "mdm": "ar"}[objective]
    for branch, line in ((False, BEGUN), (True, f"{BEGUN} --load other")):
        folder = "--load other" if branch else "--save run"
        before = recorded(objective=objective)
        message = refusal(partial(resume, line, branch=branch, objective=other, before=before))
        assert message.startswith(
            f"{folder}: holds a run of objective {objective}, not {other}; give --objective {objective} "
        )
        before |= {"vocabulary_size": 300}
        message = refusal(partial(resume, line, branch=branch, objective=objective, before=before))
        assert message.startswith(f"{folder}: holds a run over 300 token ids, and this data has 257")


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


# -------------------------------------------------------------------------------- parameter counts


@pytest.mark.parametrize("vocabulary", [1, 257, 512])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"untie_embeddings_and_output_weights": True},
        {"group_query_attention": True, "num_query_groups": 2},
        {"add_bias_linear": True},
        {"add_bias_linear": True, "swiglu": False, "group_query_attention": True, "num_query_groups": 1},
        {"normalization": "layernorm"},
        {"normalization": "layernorm", "qk_layernorm": True, "add_bias_linear": True},
        {"swiglu": False},
        {"swiglu": False, "ffn_hidden_size": 50},
        {"qk_layernorm": True},
        {"kv_channels": 10, "qk_layernorm": True, "ffn_hidden_size": 100, "untie_embeddings_and_output_weights": True},
        {"num_layers": 1},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_parameter_count_is_that_of_the_model(options, vocabulary):
    model = ModelConfig(**{"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4} | options)
    built = Transformer(model, Vocabulary(vocabulary))
    assert parameter_count(model, Vocabulary(vocabulary)) == sum(parameter.numel() for parameter in built.parameters())
