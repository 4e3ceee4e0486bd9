"""Budgets, derived numbers, parameter counts, and the checks between sections."""

from fractions import Fraction

import pytest

from megatron.config.resolve import resolve
from megatron.config.sections import ModelConfig
from megatron.config.sizes import parameter_count
from megatron.config.vocabulary import Vocabulary
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


def test_cycles_end_at_the_steps_nearest_to_equal_parts():
    assert plan("--train-samples 93 --lr-decay-style cyclic --lr-cycles 3").lr_cycle_ends == (32, 64, 93)
    assert plan("--train-samples 80 --lr-decay-style cyclic --lr-cycles 10").lr_cycle_ends == tuple(range(8, 81, 8))
    ends = plan("--train-samples 1000 --lr-decay-style cyclic --lr-cycles 2 --lr-decay-samples 100").lr_cycle_ends
    assert ends == (48, 100)
    assert plan("--train-samples 93").lr_cycle_ends == ()


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
            "--train-samples 9 --meta-gradient-norm 0.5 --deepspeed",
            "--meta-gradient-norm 0.5: moves whole weights along whole gradients, which DeepSpeed keeps in flat pieces",
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
            "--train-samples 79 --lr-decay-style cyclic --lr-cycles 10",
            "--lr-cycles 10: makes cycles of less than a step in a schedule of 79 samples; give fewer",
        ),
        (
            "--train-samples 80 --lr-decay-style cyclic --lr-cycles 2 --lr-warmup-samples 40",
            "--lr-warmup-samples 40: is not shorter than the first cycle, which ends at 40 samples; shorten it",
        ),
        (
            "--train-samples 9 --target-offset-max 101 --target-positions",
            "--target-offset-max 101: leaves samples of --seq-length 100 without a target; give at most 100",
        ),
        (
            "--train-samples 9 --epoch-order megatron --seed -1",
            "--seed -1: does not seed NumPy's RandomState, from which --epoch-order megatron draws; give 0 to",
        ),
        (
            "--train-samples 100 --lr-decay-style WSD --lr-warmup-samples 50 --lr-wsd-decay-samples 60",
            "--lr-wsd-decay-samples 60: and a warm-up of 50 samples are longer than the whole schedule of 100",
        ),
    ],
)
def test_contradictions_are_refused(line, message):
    assert refusal(plan, line).startswith(message)


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
