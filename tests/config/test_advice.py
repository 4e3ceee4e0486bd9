"""The remedy of every refusal is accepted: for the refused flags of Megatron, and for the checks between flags."""

import json
import re

import pytest

from megatron.config.compatibility_entries import NoOp, Refused
from megatron.config.compatibility_table import TABLE
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import BUDGETS, resolve
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.parallel.deepspeed_config import deepspeed_config
from megatron.training.command_line import parse

RANKS = 4
BASE = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --train-iters 10 --global-batch-size 32"
BASE += " --micro-batch-size 1"
FLAG = re.compile(r"--[A-Za-z][A-Za-z0-9_-]*")


def accept(line: str, ranks: int = RANKS) -> None:
    """Run the checks of a command line, its DeepSpeed file included, that come before data is read."""
    config = parse("mdm" if "--low-noise" in line else "ar", line.split())
    parallel = config.parallel
    if not config.validation.skip_train:
        resolve(config, Vocabulary(300), 1_000_000, capabilities("ar"))
        check_layout(config, ranks)
        check_batch(config, ranks, capabilities("ar"))
    if parallel.deepspeed:
        options = {"world_size": ranks, "bf16": True, "cpu_offload": parallel.cpu_offload}
        file, stage = parallel.deepspeed_config, parallel.zero_stage
        deepspeed_config(file, config.training, config.optimizer, zero_stage=stage, **options)


def refusal(line: str, ranks: int = RANKS) -> str:
    with pytest.raises(ConfigurationError) as caught:
        accept(line, ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------- the table of Megatron's flags

# values for the flags in the remedies of the table
VALUES = {
    "--base-hidden-size": "16", "--base-kv-channels": "4", "--parametrization": "mup",
    "--bf16": "", "--deepspeed": "", "--deepspeed-config": "{file}", "--epoch-order": "windows",
    "--exit-duration-in-mins": "60", "--fp32": "", "--fp8-recipe": "rowwise", "--load": "run", "--log-interval": "5",
    "--low-noise-iter": "1000", "--lr-decay-samples": "100", "--lr-warmup-samples": "10", "--micro-batch-size": "1",
    "--num-layers": "2", "--recompute-granularity": "full", "--recompute-num-layers": "1", "--seq-length": "64",
    "--skip-train": "", "--teacher": "run", "--tensor-model-parallel-size": "2", "--tokenizer-model": "t.json",
    "--train-epochs": "2", "--train-samples": "200", "--valid-data-path": "test=p",
}  # fmt: skip


def refusals() -> dict[str, str]:
    """Return the flags and values that the table refuses, each with its message."""
    refused = {name: entry.reason for name, entry in TABLE.items() if isinstance(entry, Refused)}
    values = {name: entry for name, entry in TABLE.items() if isinstance(entry, NoOp) and entry.only}
    return refused | {f"{name} 7": entry.otherwise for name, entry in values.items()}


def advised(reason: str) -> list[tuple[list[str], list[str]]]:
    """Return the alternatives of a remedy: the flags to give, and the flags to leave out."""
    advice = reason.split("; ")[-1]
    alternatives = []
    for alternative in re.split(r",? or ", advice):
        added, _, dropped = re.sub(r"in (place of|the file of)|without", "|", alternative).partition("|")
        if FLAG.search(added) or "leave it out" in added:
            alternatives.append((FLAG.findall(added), FLAG.findall(dropped) if "file of" not in alternative else []))
    return alternatives


def without(line: str, flags: list[str]) -> str:
    for name in flags:
        line = re.sub(rf"{name}( [^-]\S*)?(?= |$)", "", line)
    return line


@pytest.mark.parametrize("context", ["", "--bf16", "--deepspeed --deepspeed-config {file} --zero-stage 1"])
def test_what_the_table_advises_is_accepted(context, tmp_path):
    file = tmp_path / "ds.json"
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": section | {"offload_param": {"device": "cpu"}}}))
    budgets = ["--" + name.replace("_", "-") for name in BUDGETS]
    for refused, reason in refusals().items():
        if refused == "--fp16" and context == "--bf16":  # nobody gives both
            continue
        assert refusal(f"{BASE} {refused}") == f"{refused}: {reason}"
        alternatives = advised(reason)
        assert alternatives, f"{refused}: {reason} names no remedy"
        for added, dropped in alternatives:
            line = without(f"{BASE} {context}", dropped)
            line = without(line, [name for name in (*budgets, *added) if set(added) & {name, *budgets}])
            line += " " + " ".join(f"{name} {VALUES[name]}" for name in added)
            try:
                accept(line.replace("{file}", str(file)))
            except ConfigurationError as error:
                raise AssertionError(f"{refused}: {reason}\nbut: {line}\nis refused: {error}") from None


# ----------------------------------------------------------------------------------- checks between flags

DEEPSPEED = "--deepspeed --deepspeed-config {file}"
# (refused flags, end of the message, flags that follow the remedy); BASE is added to each
FOLLOWED = [
    (f"--tensor-model-parallel-size 2 {DEEPSPEED}", "leave it out, or --deepspeed and --deepspeed-config",
     [DEEPSPEED, "--tensor-model-parallel-size 2"]),
    (f"--pipeline-model-parallel-size 2 {DEEPSPEED}", "leave it out, or --deepspeed and --deepspeed-config",
     [DEEPSPEED, "--pipeline-model-parallel-size 2"]),
    (f"--num-distributed-optimizer-instances 2 {DEEPSPEED}", "leave it out, or --deepspeed and --deepspeed-config",
     [DEEPSPEED, "--num-distributed-optimizer-instances 2"]),
    (f"--optimizer muon {DEEPSPEED}", "leave it out, or --deepspeed and --deepspeed-config",
     [DEEPSPEED, "--optimizer muon"]),
    (f"--ema-decay 0.9 {DEEPSPEED}", "leave it out, or --deepspeed and --deepspeed-config",
     [DEEPSPEED, "--ema-decay 0.9"]),
    ("--deepspeed-config {file}", "does nothing without --deepspeed; give both or neither", [DEEPSPEED, ""]),
    ("--deepspeed --cpu-optimizer --zero-stage 0", "leave one of them out",
     ["--deepspeed --cpu-optimizer", "--deepspeed --zero-stage 0"]),
    ("--vocab-file v", "needs --merge-file; give both", ["--vocab-file v --merge-file m"]),
    ("--merge-file m", "needs --vocab-file; give both", ["--vocab-file v --merge-file m"]),
    ("--recipe published --merge-file m", "give both", ["--recipe published --vocab-file v --merge-file m"]),
    ("--tokenizer-type GPT2BPETokenizer", "needs --vocab-file and --merge-file; give both",
     ["--tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m"]),
    ("--vocab-file v --merge-file m --tokenizer-model t", "leave it out, or give --tokenizer-type HFTokenizer",
     ["--vocab-file v --merge-file m"]),
    ("--vocab-size 9", "leave it out, or give --tokenizer-type NullTokenizer",
     ["", "--vocab-size 9 --tokenizer-type NullTokenizer"]),
    ("--recipe published --tokenizer-model t --tokenizer-type ByteTokenizer", "or give --tokenizer-type HFTokenizer",
     ["--recipe published --tokenizer-model t --tokenizer-type HFTokenizer",
      "--recipe published --tokenizer-type ByteTokenizer"]),
    ("--checkpoint-activations --checkpoint-num-layers 1", "give --recompute-granularity full with "
     "--recompute-num-layers", ["--checkpoint-activations", "--recompute-granularity full --recompute-num-layers 1"]),
    ("--bf16 --fp32-residual-connection", "give --fp32 in place of --bf16", ["--fp32", "--bf16"]),
    ("--tensor-model-parallel-size 2 --recompute-granularity full --compile", "leave out --compile or "
     "--recompute-granularity", ["--tensor-model-parallel-size 2 --recompute-granularity full",
                                 "--tensor-model-parallel-size 2 --compile"]),
    ("--lr-wsd-decay-samples 9", "does nothing without --lr-decay-style WSD; give both or neither",
     ["--lr-wsd-decay-samples 9 --lr-decay-style WSD", ""]),
    ("--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
     "does not divide --num-query-groups 2; give 2, or change --num-query-groups",
     ["--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 2",
      "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 4"]),
    ("--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 1 --ffn-hidden-size 6",
     "give 1, or change --num-query-groups", ["--group-query-attention --num-query-groups 1 --ffn-hidden-size 6"]),
]  # fmt: skip


@pytest.mark.parametrize("refused, advice, followed", FOLLOWED, ids=[line for line, _, _ in FOLLOWED])
def test_what_a_rule_advises_is_accepted(refused, advice, followed, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text("{}")
    message = refusal(f"{BASE} {refused}".replace("{file}", str(file)))
    assert message.endswith(advice), message
    for line in followed:
        accept(f"{BASE} {line}".replace("{file}", str(file)))


@pytest.mark.parametrize("heads, groups, width, tensor, ranks", [
    (4, 4, 64, 3, 3), (12, 3, 64, 4, 4), (12, 6, 64, 4, 8), (12, 12, 90, 4, 4), (12, 4, 66, 6, 6), (8, 8, 64, 16, 16),
])  # fmt: skip
def test_the_tensor_parallel_size_that_is_advised_is_accepted(heads, groups, width, tensor, ranks):
    line = f"--num-layers 2 --hidden-size 96 --num-attention-heads {heads} --group-query-attention --train-iters 9"
    line += f" --num-query-groups {groups} --ffn-hidden-size {width} --global-batch-size 48 --micro-batch-size 1"
    message = refusal(f"{line} --tensor-model-parallel-size {tensor}", ranks)
    (advice,) = re.findall(r"; give (\d+), or change --", message)
    accept(f"{line} --tensor-model-parallel-size {advice}", ranks)
