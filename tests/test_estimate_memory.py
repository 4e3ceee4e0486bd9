"""The tool that says whether a training fits: what it prints, what it chooses, what it refuses; and its page."""

import json
import sys

import pytest

from megatron.training.command_line import parse_with
from tests.conftest import ROOT
from tools import estimate_memory
from tools.estimate_memory import BESIDE, TOLD, Options, flags, layouts, main


@pytest.fixture
def say(monkeypatch, capsys):
    """Return what the tool prints for a command line."""

    def run(words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["estimate_memory.py", *words.split()])
        main()
        return capsys.readouterr().out

    return run


def test_the_parts_add_up_to_the_total(say):
    lines = [line.replace(",", "").split() for line in say("--model-size 140M --processes 8").splitlines()]
    places = [words.index("GiB") for words in lines[1:-1]]
    sizes = {" ".join(words[: at - 1]): float(words[at - 1]) for words, at in zip(lines[1:-1], places, strict=True)}
    assert len(sizes) == 8 and sum(sizes.values()) == pytest.approx(float(lines[-1][1]), abs=0.05)
    assert lines[-1][2:6] == ["GiB:", "fits", "80", "GB"]


def test_json_is_in_bytes_and_says_whether_it_fits(say):
    told = json.loads(say("--model-size 1018M --processes 8 --json"))
    parts = "master_weights optimizer_states gradients compute_weights activations head communication".split()
    assert told["total"] == sum(told[part] for part in parts) and told["beside"] == BESIDE
    # 4 bytes of each parameter, over eight; FSDP2 pads little at this width
    assert told["master_weights"] == pytest.approx(4 * 971.3e6 / 8, rel=1e-3) and told["fits"]
    small = json.loads(say("--model-size 1018M --processes 8 --device-memory 24 --json"))
    assert not small["fits"] and small["total"] == told["total"]


def test_a_layout_that_does_not_fit_says_so(say):
    assert "GiB: does not fit 80 GB, which are 74.51 GiB" in say("--model-size 16183M")
    assert "of the host" in say("--model-size 16183M --cpu-offload")


def test_what_is_listed_fits_and_is_in_order(say):
    words = "--model-size 9293M --processes 16 --global-batch-size 64".split()
    options, config = parse_with(Options, "", words, TOLD)
    found = list(layouts(options, config))
    keys = [
        (
            each.parallel.cpu_offload,
            each.parallel.tensor_model_parallel_size * each.parallel.pipeline_model_parallel_size,
            each.parallel.pipeline_model_parallel_size,
            each.parallel.zero_stage,
            (None, "selective", "full").index(each.parallel.recompute_granularity),
        )
        for each, _ in found
    ]
    assert len(keys) > 20 and keys == sorted(keys)
    assert all(options.fits(memory) for _, memory in found)
    assert all(each.parallel.pipeline_model_parallel_size == 1 for each, _ in found if each.parallel.zero_stage == 2)
    first = say("--model-size 9293M --processes 16 --global-batch-size 64 --search 1")
    assert first.split("GiB  ")[1].strip() == flags(found[0][0])
    told = json.loads(say("--model-size 9293M --processes 16 --global-batch-size 64 --search 2 --json"))
    assert [each["flags"] for each in told] == [flags(each) for each, _ in found[:2]]


def test_more_of_a_layout_needs_no_more_memory(say):
    def total(words: str) -> int:
        return json.loads(say(f"--model-size 6796M --processes 8 --micro-batch-size 1 --json {words}"))["total"]

    for harder in (["--zero-stage 0", "--zero-stage 1", "--zero-stage 2", "--zero-stage 3"],):
        sizes = [total(words) for words in harder]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]
    kept = [total(f"--recompute-granularity {kind}") for kind in ("selective", "full")]
    assert total("") > kept[0] > kept[1]
    assert total("--tensor-model-parallel-size 2") > total("--tensor-model-parallel-size 4")


def test_nothing_fits(say):
    assert say("--model-size 16183M --device-memory 4 --search 3").startswith("nothing fits; more processes")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--model-size 140M --processes 0", "--processes 0: must be positive"),
        ("--model-size 140M --device-memory 0", "--device-memory 0.0: must be positive"),
        ("--model-size 140M --deepspeed", "--deepspeed: the formula is FSDP2's; leave it out"),
        (
            "--model-size 140M --processes 3",
            "--global-batch-size 256: is not a multiple of --micro-batch-size 8 times 3",
        ),
        (
            "--model-size 140M --processes 2 --tensor-model-parallel-size 4",
            "--tensor-model-parallel-size 4: makes groups",
        ),
        ("--model-size 140M --process 3", "unknown flag --process; did you mean --processes?"),
        ("--processes 8", "--num-layers, --hidden-size and --num-attention-heads: required and not given"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, words, expected):
    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", *words.split()])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith(f"error: {expected}") and told.count("\n") == 1


def test_flags_of_a_whole_training_are_taken(say):
    training = "--train-data-path data --train-epochs 2 --lr 1e-3 --save runs/a --distributed-backend nccl"
    assert say(f"--model-size 140M {training}") == say("--model-size 140M")


def test_the_page_has_the_table_of_the_tool(say):
    page = (ROOT / "docs" / "layouts.md").read_text()
    (command,) = [line for line in page.splitlines() if "--table" in line]
    assert page.endswith("\n\n" + say(command.split("estimate_memory.py ")[1]))
    assert "| 16183M | 512 |" in page and estimate_memory.TABLE_PROCESSES == (1, 8, 64, 512)
