"""Training runs that resume in other layouts have the losses of a run that stays in one layout."""

import json

import pytest
import torch

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.transformer import Transformer
from megatron.training.checkpoint_store import CheckpointStore, load_checkpoint, read_meta
from tests.conftest import records, run

TENSOR, PIPELINE = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
JOURNEY = [
    (4, [*TENSOR, *PIPELINE]),
    (4, ["--zero-stage", 3]),
    (1, []),
    (2, [*PIPELINE, "--num-layers-per-virtual-pipeline-stage", 1]),
    (2, ["--deepspeed", "--zero-stage", 3, "--cpu-optimizer"]),
    (2, TENSOR),
]
OBJECTIVES = {
    "ar": ["--token-dropout-max", 0.3],
    "mdm": ["--untie-embeddings-and-output-weights", "--num-loops", 2, "--loop-layers", "2-2"],
}


@pytest.fixture(scope="module")
def flags(tiny):
    model = [*tiny, "--micro-batch-size", 2, "--num-layers", 4, "--group-query-attention", "--num-query-groups", 2]
    return [*model, "--num-attention-heads", 4, "--save-interval", 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_moves_between_layouts(name, flags, tmp_path):
    run(name, *flags, *OBJECTIVES[name], "--save", tmp_path / "fixed")
    for step, (processes, layout) in zip((2, 4, 7, 9, 11, 1000), JOURNEY, strict=True):
        command = [*flags, *OBJECTIVES[name], *layout, "--save", tmp_path / "moved", "--exit-interval", step]
        run(name, *command, processes=processes)
    fixed, moved = records(tmp_path / "fixed"), records(tmp_path / "moved")
    assert len(fixed) == len(moved)
    for expected, record in zip(fixed, moved, strict=True):
        texts = {key for key, value in expected.items() if not isinstance(value, (int, float))}
        assert {key: record[key] for key in texts} == {key: expected[key] for key in texts}
        numbers = expected.keys() - texts
        assert {key: record[key] for key in numbers} == pytest.approx({key: expected[key] for key in numbers}, rel=1e-4)
    for weight, expected in zip(plain_weights(tmp_path / "moved"), plain_weights(tmp_path / "fixed"), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def plain_weights(folder) -> list[torch.Tensor]:
    """Return the weights of the newest checkpoint, read into a plain model in one process, without process groups."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    meta = read_meta(newest)
    recorded = meta["config"]
    model = Transformer(ModelConfig(**recorded["model"]), Vocabulary(recorded["vocabulary_size"]))
    load_checkpoint(newest, {f"model.{name}": parameter.data for name, parameter in model.named_parameters()})
    return list(model.parameters())


@pytest.mark.slow
def test_a_resume_in_the_same_layout_is_exact_with_dropout(flags, tmp_path):
    layout = [*flags, *TENSOR, *PIPELINE, "--mlp-dropout", 0.2, "--hidden-dropout", 0.1, "--attention-dropout", 0.1]
    run("mdm", *layout, "--save", tmp_path / "uninterrupted", processes=4)
    for step in (5, 1000):
        run("mdm", *layout, "--save", tmp_path / "stopped", "--exit-interval", step, processes=4)
    assert records(tmp_path / "stopped") == records(tmp_path / "uninterrupted")


def test_any_layout_evaluates_a_run(flags, tmp_path):
    run("mdm", *flags, *TENSOR, "--save", tmp_path, "--exit-interval", 4, processes=2)
    expected = [record["loss"] for record in records(tmp_path, "valid") if record["iteration"] == 4]
    for processes, layout in ((4, [*TENSOR, *PIPELINE]), (1, [])):
        done = run("mdm", "--skip-train", "--load", tmp_path, *layout, processes=processes)
        losses = [json.loads(line)["loss"] for line in done.stdout.splitlines()]
        assert losses == pytest.approx(expected, rel=1e-5)
