"""Flags of the published scorers and of training on the command line of scoring."""

import json
import logging
import sys
from dataclasses import asdict

import pytest

from megatron.errors import ConfigurationError
from megatron.scoring.lm_eval_cli import main, read
from megatron.training.command_line import parse

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --seq-length 64"
# the flags that all four published lists have, and below those of each list
PUBLISHED = f"""
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 {MODEL} --use-rotary-position-embeddings
    --max-position-embeddings 64 --micro-batch-size 32 --global-batch-size 256 --train-samples 1000
    --vocab-file no/vocab.json --merge-file no/merges.txt --disable-bias-linear --kill-switch-file no/kill
    --normalization rmsnorm --swiglu --bf16 --load RUN --load-tag latest --data-impl mmap --deepspeed
    --deepspeed_config no/config.json --zero-stage 0 --inference --no-load-optim --no-load-rng --eval_fp32
    --task_list a,b --results_path results/out.json
"""  # fmt: skip
LISTS = {
    "": ("ar", {}),
    "--eval_method ar": ("mdm", {"likelihood": "chain"}),
    "--eval_method mc --only_mc_nll --num-mc 64": ("mdm", {"likelihood": "bound", "only_mc_nll": True, "num_mc": 64}),
    "--method chain --chain-order=random": ("mdm", {"likelihood": "chain", "chain_order": "random"}),
    "--only_generate": ("mdm", {"only_generate": True}),
}


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run folder with the values that flags are compared with."""

    def write(objective="mdm", flags=""):
        config = asdict(parse(objective, [*MODEL.replace("--kv-channels 16 ", "").split(), *flags.split()]))
        recorded = {"objective_name": objective, "precision": "bf16", **config}
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        return str(tmp_path)

    return write


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness"])


def refusal(*words: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("added", LISTS)
def test_the_published_lists_are_understood_and_what_has_no_effect_is_named(run, added, caplog):
    objective, expected = LISTS[added]
    folder = run(objective)
    words = f"{PUBLISHED} {added}".replace("RUN", folder).split()
    with caplog.at_level(logging.INFO, "megatron"):
        arguments = read(words)
    assert arguments.model_args == {"pretrained": folder, "dtype": "float32"} | expected
    assert arguments.tasks == ["a", "b"] and arguments.output_path == "results/out.json"
    (line,) = [line for line in caplog.messages if line.endswith("a run records its own model, data and training")]
    names = line.partition(": have no effect")[0].split(", ")
    assert {"--num-layers", "--train-samples", "--deepspeed_config", "--bf16", "--vocab-file"} <= set(names)
    log = " ".join(caplog.messages)
    for word in words:
        if (
            word.startswith("--")
            and word not in "--load --eval_fp32 --task_list --results_path".split() + added.split()
        ):
            assert word in log


def test_the_command_shows_what_has_no_effect_while_it_reads_flags(monkeypatch, caplog, capsys):
    monkeypatch.setattr(logging.getLogger("megatron"), "level", logging.NOTSET)  # as at the start of the program
    logging.getLogger("megatron").manager._clear_cache()
    with pytest.raises(SystemExit) as caught:
        main(["--inference", "--tasks", "a", "--load"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --load: is not followed by a value; give one\n"
    assert caplog.messages == ["--inference: has no effect, scoring never trains"]


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--no-load-optim", "scoring reads no optimizer state"),
        ("--max_chunk_size 32", "all later tokens of an answer are masked; batches are --batch-tokens"),
    ],
)
def test_the_reason_for_no_effect_is_logged(run, words, reason, caplog):
    with caplog.at_level(logging.INFO, "megatron"):
        read(["--load", run(), "--tasks", "a", *words.split()])
    assert caplog.messages == [f"{words}: has no effect, {reason}"]


@pytest.mark.parametrize("flag", "--load --run --task_list --results_path --eval_method --max_chunk_size".split())
def test_a_spelling_without_its_value_is_refused_wherever_it_stands(run, flag):
    other_words = ["--load", run(), "--task_list", "a"]
    for words in ([*other_words, flag], [*other_words, flag, "--limit", "3"], [flag, *other_words], [flag]):
        assert refusal(*words).startswith(f"{flag}: is not followed by a value; give one")
    for name in ("--pretrained", "--num-mc", "--num-layers", "--encoder-num-layers", "--micro-batch-size"):
        assert refusal(*other_words, name).startswith(f"{name}: is not followed by a value; give one")


@pytest.mark.parametrize("switch", "--eval_fp32 --adaptive_seq_len --inference --no-load-optim --swiglu".split())
def test_a_spelling_that_takes_no_value_may_end_the_line(run, switch):
    folder = run()
    arguments = read(["--load", folder, "--tasks", "a", switch])
    assert arguments.tasks == ["a"] and arguments.model_args["pretrained"] == folder


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--sampling_eps 0.1", "--sampling_eps 0.1: not supported, mask ratios begin at 0; leave it out"),
        (
            "--load-tag global_step100",
            "--load-tag global_step100: not supported, --load also takes the folder of a checkpoint; give that, or "
            "--checkpoint best",
        ),
        ("--eval_method x", "--eval_method x: is not one of ar, mc"),
        ("--dtype bfloat16 --eval_fp32", "--eval_fp32: is --dtype float32, and --dtype bfloat16 is given too"),
        ("--fp16", "--fp16: not supported, training computes in bf16 or fp32"),
        ("--dry-run", "--dry-run: not supported, only training has a dry run; leave it out"),
        ("--num-layers two", "--num-layers two: is not a number"),
        ("--num-laiers 2", "unknown flag --num-laiers; did you mean --num-layers?"),
        ("--num-mcc=9", "unknown flag --num-mcc; did you mean --num-mc?"),
        ("--batch-size 8", "unknown flag --batch-size; did you mean --batch_size?"),
        ("--xyzzy", "unknown flag --xyzzy; --help and"),
    ],
)
def test_what_cannot_be_meant_is_refused(run, words, expected):
    assert refusal("--load", run(), "--tasks", "a", *words.split()).startswith(expected)


def test_a_flag_of_training_acts_on_no_other_model():
    message = refusal(*"--model hf --model_args pretrained=gpt2 --num-layers 2 --tasks a".split())
    assert message == "--num-layers: acts on --model megatron, and --model hf was given"


def test_beginnings_of_the_flags_of_lm_eval_are_left_to_it(run):
    assert read(["--load", run(), "--task", "a", "--lim", "3", "-b", "4"]).limit == 3


CONTRADICTIONS = {
    "--num-layers 3": "--num-layers 3",
    "--num-layers=3": "--num-layers 3",
    "--encoder-num-layers 3": "--num-layers 3",
    "--hidden-size 64": "--hidden-size 64",
    "--num-attention-heads 3": "--num-attention-heads 3",
    "--kv-channels 8": "--kv-channels 8",
    "--ffn-hidden-size 128": "--ffn-hidden-size 128",
    "--num-key-value-heads 1": "--num-query-groups 1",
    "--no-swiglu": "--no-swiglu",
    "--normalization layernorm": "--normalization layernorm",
    "--rotary-base 500": "--rotary-base 500.0",
    "--attention-dropout 0.1": "--attention-dropout 0.1",
    "--seq-length 32": "--seq-length 32",
    "--objective ar": "--objective ar",
    "--model-size 140M": "--num-layers ",
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_a_flag_of_another_model_is_refused(run, words):
    folder = run()
    message = refusal("--load", folder, "--tasks", "a", *words.split())
    assert message.startswith(CONTRADICTIONS[words]) and f": {folder} was trained with --" in message
    assert message.endswith("; leave the flag out, or score another run")


@pytest.mark.parametrize(
    "recorded, words",
    [
        ("", "--kv-channels 16 --ffn-hidden-size 64 --num-query-groups 2"),
        ("", "--num-key-value-heads 2 --no-untie-embeddings-and-output-weights --objective mdm"),
        ("--kv-channels 8 --lr 1e-3", "--kv-channels 8 --lr 5 --seed 3 --num-mc 9"),
        ("--mask-times iid", "--mask-times stratified --train-data-path 1 a 2 b --eval-iters 3"),
    ],
)
def test_a_flag_of_the_same_model_or_of_its_training_is_accepted(run, recorded, words):
    folder = run("mdm", recorded)
    arguments = read(["--load", folder, *words.split(), "--tasks", "a"])
    assert arguments.tasks == ["a"]
    assert arguments.model_args == {"pretrained": folder} | ({"num_mc": 9} if "--num-mc" in words else {})
    assert ("--seed" not in words) or arguments.seed[0] == 3  # lm-eval's own
