"""tools/estimate_memory.py: its output, the layouts that it chooses, its errors, and the table in docs/layouts.md."""

import json
import sys

import pytest

from megatron.training.command_line import parse_with
from tests.conftest import ROOT
from tools import estimate_memory
from tools.estimate_memory import HELP_SECTIONS, OVERHEAD, Options, flags, layouts, main


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Return a function that runs the tool on a command line and returns its output."""

    def run(words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["estimate_memory.py", *words.split()])
        main()
        return capsys.readouterr().out

    return run


def test_the_parts_add_up_to_the_total(output_of):
    lines = [line.replace(",", "").split() for line in output_of("--model-size 140M --processes 8").splitlines()]
    units = [words.index("GiB") for words in lines[1:-1]]
    sizes = {" ".join(words[: at - 1]): float(words[at - 1]) for words, at in zip(lines[1:-1], units, strict=True)}
    assert len(sizes) == 8 and sum(sizes.values()) == pytest.approx(float(lines[-1][1]), abs=0.05)
    assert lines[-1][2:6] == ["GiB:", "fits", "80", "GB"]


def test_json_is_in_bytes_and_says_whether_it_fits(output_of):
    report = json.loads(output_of("--model-size 1018M --processes 8 --json"))
    parts = "master_weights optimizer_states gradients compute_weights activations head communication".split()
    assert report["total"] == sum(report[part] for part in parts) and report["overhead"] == OVERHEAD
    # 4 bytes per parameter, over 8 ranks; FSDP2 pads little at this width
    assert report["master_weights"] == pytest.approx(4 * 971.3e6 / 8, rel=1e-3) and report["fits"]
    small = json.loads(output_of("--model-size 1018M --processes 8 --device-memory 24 --json"))
    assert not small["fits"] and small["total"] == report["total"]


def test_no_bf16_is_fp32(output_of):
    bf16, fp32, no_bf16 = (output_of(f"--model-size 140M {flag}") for flag in ("--bf16", "--fp32", "--no-bf16"))
    assert no_bf16 == fp32 != bf16


def test_a_layout_that_does_not_fit_says_so(output_of):
    assert "GiB: does not fit 80 GB, which are 74.51 GiB" in output_of("--model-size 16183M")
    assert "of the host" in output_of("--model-size 16183M --cpu-offload")


def test_what_is_listed_fits_and_is_in_order(output_of):
    words = "--model-size 9293M --processes 16 --global-batch-size 64".split()
    options, config = parse_with(Options, "", words, HELP_SECTIONS)
    fitting = list(layouts(options, config))
    parallels = [layout.parallel for layout, _ in fitting]
    keys = [
        (
            parallel.cpu_offload,
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.zero_stage,
            (None, "selective", "full").index(parallel.recompute_granularity),
        )
        for parallel in parallels
    ]
    assert len(keys) > 20 and keys == sorted(keys)
    assert all(options.fits(memory) for _, memory in fitting)
    assert all(parallel.pipeline_model_parallel_size == 1 for parallel in parallels if parallel.zero_stage == 2)
    first = output_of("--model-size 9293M --processes 16 --global-batch-size 64 --search 1")
    assert first.split("GiB  ")[1].strip() == flags(fitting[0][0])
    report = json.loads(output_of("--model-size 9293M --processes 16 --global-batch-size 64 --search 2 --json"))
    assert [entry["flags"] for entry in report] == [flags(layout) for layout, _ in fitting[:2]]


def test_more_of_a_layout_needs_no_more_memory(output_of):
    def total(words: str) -> int:
        return json.loads(output_of(f"--model-size 6796M --processes 8 --micro-batch-size 1 --json {words}"))["total"]

    sizes = [total(f"--zero-stage {stage}") for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]
    selective, full = (total(f"--recompute-granularity {kind}") for kind in ("selective", "full"))
    assert total("") > selective > full
    assert total("--tensor-model-parallel-size 2") > total("--tensor-model-parallel-size 4")


def test_a_search_in_which_no_layout_would_start_gives_the_cause(output_of, capsys):
    with pytest.raises(SystemExit):
        output_of("--model-size 106M --processes 3 --search 2")
    assert capsys.readouterr().err.startswith("error: --global-batch-size 256: is not a multiple of")


def test_nothing_fits(output_of):
    assert output_of("--model-size 16183M --device-memory 4 --search 3").startswith("nothing fits; give more GPUs")


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
    with pytest.raises(SystemExit) as exit:
        main()
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith(f"error: {expected}") and message.count("\n") == 1


def test_flags_of_a_training_run_are_accepted(output_of):
    run_flags = "--train-data-path data --train-epochs 2 --lr 1e-3 --save runs/a --distributed-backend nccl"
    assert output_of(f"--model-size 140M {run_flags}") == output_of("--model-size 140M")


def test_the_page_has_the_table_of_the_tool(output_of):
    page = (ROOT / "docs" / "layouts.md").read_text()
    (command,) = [line for line in page.splitlines() if "--table" in line]
    assert page.endswith("\n\n" + output_of(command.split("estimate_memory.py ")[1]))
    assert "| 16183M | 512 |" in page and estimate_memory.TABLE_PROCESSES == (1, 8, 64, 512)
