"""Every flag of the published scripts is in the table, and every entry has its effect."""

import logging

import pytest

from megatron.config.compatibility import markdown, translate
from megatron.config.compatibility_entries import NoOp, Refused, Same, one_table, refused
from megatron.config.compatibility_table import TABLE
from megatron.config.sections import SECTIONS
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse, parser
from tests.conftest import ROOT

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2".split()
# flags that the 18 runnable scripts of the published system pass to its entry points and evaluators
PUBLISHED = """
    --adam-beta1 --adam-beta2 --adam-eps --bf16 --clip-grad --cpu-optimizer --data-impl --deepspeed --deepspeed_config
    --disable-bias-linear --eval-interval --eval-iters --eval_fp32 --eval_method --global-batch-size --hidden-size
    --inference --kill-switch-file --kv-channels --load --load-tag --log-batch-size-to-tensorboard --log-interval
    --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard --lr --lr-decay-samples --lr-decay-style
    --lr-warmup-samples --max-position-embeddings --merge-file --micro-batch-size --min-lr --no-load-optim --no-load-rng
    --no-pipeline-parallel --normalization --num-attention-heads --num-layers --num-mc --only_generate --only_mc_nll
    --optimizer --pipeline-model-parallel-size --results_path --save --save-interval --seq-length --skip-train --swiglu
    --task_list --tensor-model-parallel-size --tensorboard-dir --tensorboard-queue-size --train-data-path-file
    --train-samples --use-rotary-position-embeddings --valid-data-path-file --vocab-file --wandb-exp-name --wandb-group
    --wandb-project --wandb-save-dir --weight-decay --zero-stage
""".split()  # fmt: skip
DOCUMENTED = """
    --append-eod --ar-ratio --attention-dropout --num-order-list --randmask-ratio --tokenizer-type --use-order-list
    --use-predefined-order
""".split()[1:]  # the first belongs to its preprocessing tool


def of_kind(kind) -> list[str]:
    return sorted(name for name, entry in TABLE.items() if isinstance(entry, kind))


def test_every_published_flag_is_known_and_none_has_two_meanings():
    ours = set(parser("ar")._option_string_actions)
    assert [name for name in (*PUBLISHED, *DOCUMENTED) if name not in ours and name not in TABLE] == []
    assert len(PUBLISHED) == 65 and not ours & set(TABLE)


def test_a_flag_of_two_rules_is_a_programming_error():
    with pytest.raises(TypeError, match="--a"):
        one_table(refused("--a --b", "no"), refused("--c --a", "no"))


DEFAULTS = ("--disable-bias-linear",)  # sets the default
SWITCHES = (
    *DEFAULTS,
    "--deterministic-mode",
    "--use-distributed-optimizer",
    "--recompute-activations",
    "--checkpoint-activations",
    "--cpu-optimizer",
)
VALUES = {
    "--data-path": "d",
    "--layernorm-epsilon": "0.5",
    "--rotary-position-embeddings-theta": "500",
    "--num-key-value-heads": "1",
}


@pytest.mark.parametrize("name", of_kind(Same))
def test_an_alias_is_the_same_as_what_it_stands_for(name):
    entry = TABLE[name]
    takes_value = name not in SWITCHES
    value = VALUES.get(name, "3") if takes_value else None
    ours = str(int(value) * 8) if entry.batches else value
    base = [*MODEL, "--global-batch-size", "8", "--micro-batch-size", "8", "--lr-decay-style", "WSD", "--deepspeed"]
    expected = parse("ar", base + entry.words.split() + ([ours] if takes_value else []))
    assert parse("ar", base + [name] + ([value] if takes_value else [])) == expected
    assert expected != parse("ar", base) or name in DEFAULTS
    if takes_value:
        assert parse("ar", [*base, f"{name}={value}"]) == expected
        with pytest.raises(ConfigurationError, match="value"):
            parse("ar", [*base, name])


@pytest.mark.parametrize("line", ["--zero-stage 3 {}", "{} --zero-stage=3"])
def test_an_alias_beside_another_value_of_its_flag_is_refused(line):
    alias = "--use-distributed-optimizer"
    message = f"{alias}: is --zero-stage 1, and --zero-stage 3 is given too; leave one out"
    with pytest.raises(ConfigurationError) as caught:
        parse("ar", [*MODEL, *line.format(alias).split()])
    assert str(caught.value) == message
    assert parse("ar", [*MODEL, alias, "--zero-stage", "1"]).parallel.zero_stage == 1


def test_the_alias_of_a_switch_undoes_it():
    assert not parse("ar", [*MODEL, "--add-bias-linear", "--disable-bias-linear"]).model.add_bias_linear


@pytest.mark.parametrize("name", of_kind(NoOp))
def test_what_has_no_effect_says_so_with_its_reason(name, caplog):
    entry = TABLE[name]
    values = (
        entry.only or ("anything",) if entry.takes_value else (None, "anything") if entry.may_take_value else (None,)
    )
    for value in values:
        for spelled in ([name] if value is None else [name, value], [name] if value is None else [f"{name}={value}"]):
            caplog.clear()
            with caplog.at_level(logging.INFO, "megatron"):
                assert parse("ar", [*MODEL, *spelled, "--lr", "0.5"]) == parse("ar", [*MODEL, "--lr", "0.5"])
            (line,) = caplog.messages
            typed = name if value is None else f"{name} {value}"
            assert line == f"{typed}: has no effect, {entry.reason}" and len(entry.reason) > 8
    if entry.only:
        with pytest.raises(ConfigurationError) as caught:
            parse("ar", [*MODEL, name, "7"])
        assert str(caught.value) == f"{name} 7: {entry.otherwise}" and len(entry.otherwise) > 8
    if entry.takes_value:
        with pytest.raises(ConfigurationError, match=f"{name}: is not followed by a value"):
            parse("ar", [*MODEL, name])
        with pytest.raises(ConfigurationError, match=f"{name}: is not followed by a value"):
            parse("ar", [*MODEL, name, "--lr", "0.5"])
    elif not entry.may_take_value:
        with pytest.raises(ConfigurationError, match=f"{name}: takes no value"):
            parse("ar", [*MODEL, f"{name}=1"])


@pytest.mark.parametrize("name", of_kind(Refused))
def test_what_is_refused_gives_its_reason(name):
    for spelled in ([name], [name, "1"], [f"{name}=1"]):
        with pytest.raises(ConfigurationError) as caught:
            parse("mdm", [*MODEL, *spelled])
        assert str(caught.value) == f"{name}: {TABLE[name].reason}"
        assert TABLE[name].reason.startswith(("not supported, ", "not supported; ", "not supported yet ("))


@pytest.mark.parametrize("spelled", ["--optimizer adam", "--optimizer=adam", "--optimizer adamw"])
def test_a_value_that_megatron_calls_otherwise_is_understood(spelled):
    assert parse("ar", [*MODEL, *spelled.split()]).optimizer.optimizer == "adamw"
    assert parse("ar", [*MODEL, "--optimizer", "muon"]).optimizer.optimizer == "muon"
    with pytest.raises(ConfigurationError, match="^--optimizer sgd: is not one of adamw, muon$"):
        parse("ar", [*MODEL, "--optimizer", "sgd"])
    with pytest.raises(ConfigurationError, match="^--optimizer: is not followed by a value"):
        parse("ar", [*MODEL, "--optimizer"])


def test_batches_are_counted_by_the_recipe_or_the_flag_wherever_it_stands():
    assert translate(["--eval-iters", "10"], 256) == ["--eval-samples=2560"]
    assert parse("ar", [*MODEL, "--eval-iters", "10"]).validation.eval_samples == 2560
    last = parse("ar", [*MODEL, "--eval-iters", "10", "--global-batch-size", "16"])
    assert last.validation.eval_samples == 160
    for wrong in ("ten", "-1", "1.5", "", "²"):
        with pytest.raises(ConfigurationError, match=f"--eval-iters {wrong}: is not a whole number of batches"):
            parse("ar", [*MODEL, "--eval-iters", wrong])
    with pytest.raises(ConfigurationError, match="--global-batch-size many: is not a number"):
        parse("ar", [*MODEL, "--eval-iters", "10", "--global-batch-size", "many"])


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "compatibility.md").read_text() == markdown()
    assert all(f"| `{name}` |" in markdown() for name in TABLE)


def test_what_an_alias_stands_for_exists():
    fields = {f"--{name.replace('_', '-')}" for section in SECTIONS.values() for name in section.__dataclass_fields__}
    for name in of_kind(Same):
        flags = {word for word in TABLE[name].words.split() if word.startswith("--")}
        assert {word.replace("--no-", "--") for word in flags} <= fields
