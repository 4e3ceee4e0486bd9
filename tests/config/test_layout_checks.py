"""The parallel layout against the world size, the model and the batch of a step."""

import pytest

from megatron.config.layout_checks import check_batch, check_layout
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 100 --global-batch-size 8".split()


def config(line: str):
    return parse("ar", [*MODEL, *line.split()])


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigurationError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_step_divides_into_micro_batches_of_all_processes():
    for micro, size in ((8, 1), (4, 2), (1, 8), (2, 1)):
        check_batch(config(f"--micro-batch-size {micro}"), size, capabilities("ar"))
    message = refusal(check_batch, config("--micro-batch-size 3"), 1, capabilities("ar"))
    assert message == "--global-batch-size 8: is not a multiple of --micro-batch-size 3 times 1 rank = 3; take 6 or 9"
    message = refusal(check_batch, config("--micro-batch-size 4"), 4, capabilities("ar"))
    assert message.endswith("--micro-batch-size 4 times 4 ranks = 16; take 16")


@pytest.mark.parametrize("size, line", [
    (8, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    (4, "--zero-stage 3 --num-distributed-optimizer-instances 2"),
    (2, "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    (2, "--num-layers 3 --pipeline-model-parallel-size 2"),
    (2, "--num-layers 3 --pipeline-model-parallel-size 2 --num-loops 4 --loop-layers 0-1"),
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
    (2, "--num-layers 4 --pipeline-model-parallel-size 2 --num-loops 2",
     "--num-loops 2: repeats blocks 0-3 of several pipeline stages, which hold the blocks 0-1, 2-3; give --loop-"),
    (2, "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --num-loops 2 "
        "--loop-layers 2-3",
     "--loop-layers 2-3: repeats blocks 2-3 of several pipeline stages, which hold the blocks 0-0, 1-1, 2-2, 3-3"),
    (2, "--meta-gradient-norm 0.5 --pipeline-model-parallel-size 2",
     "--meta-gradient-norm 0.5: moves weights between two halves of a step, and with --pipeline-model-parallel-size 2 "
     "all its micro-batches are in flight at once; leave one of them out"),
    (2, "--meta-gradient-norm 0.5 --zero-stage 2",
     "--meta-gradient-norm 0.5: moves the gathered weights along gradients that are not reduced, and --zero-stage 2 "
     "shards them after every micro-batch; give --zero-stage 0 or 1"),
    (3, "--num-distributed-optimizer-instances 2",
     "--num-distributed-optimizer-instances 2: does not divide the 3 data-parallel ranks"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(size, line, message):
    assert refusal(check_layout, config(line), size).startswith(message)


@pytest.mark.parametrize("size, line, remedy", [
    (1, "--micro-batch-size 8", "has 1 on the rank; give --micro-batch-size 4"),
    (1, "--micro-batch-size 4 --global-batch-size 12", "has 3 on the rank; give --micro-batch-size 3"),
    (2, "--micro-batch-size 4", "has 1 on each data-parallel rank; give --micro-batch-size 2"),
    (2, "--micro-batch-size 1 --global-batch-size 6", "has 3 on each data-parallel rank; give --global-batch-size 8"),
])  # fmt: skip
def test_a_meta_gradient_step_needs_two_halves(size, line, remedy):
    line = f"{line} --meta-gradient-norm 0.5"
    message = refusal(check_batch, config(line), size, capabilities("ar"))
    needed = "--meta-gradient-norm 0.5: needs an even number of micro-batches, two halves, and a step "
    assert message == needed + remedy
    check_batch(config(f"{line} {remedy.partition('give ')[2]}"), size, capabilities("ar"))


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
