"""A run is read back with the configuration that --skip-train uses."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from megatron.config.layout_checks import check_layout
from megatron.config.resolve import resolve
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse
from megatron.training.load_run import trained_config

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --train-data-path data/train"
LINES = {
    "plain": f"{MODEL} --tokenizer-type ByteTokenizer --train-samples 93 --save run",
    "recipe": "--model-size 7M --seq-length 64 --train-data-path a --recipe published --vocab-file v --merge-file m "
    "--train-samples 10 --save run --load other",
    "layout": f"{MODEL} --tensor-model-parallel-size 2 --ema-decay 0.9 --lr-decay-style WSD --lr-wsd-decay-samples 5 "
    "--split 9,1 --train-epochs 2 --tensorboard-dir t --wait-for-lock 3 --save run",
    "blend": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --group-query-attention "
    "--seq-length 32 --train-data-path 0.3 a 0.7 b --valid-data-path x=a y=b --bf16 --objective dual "
    "--global-batch-size 16 --train-samples 64",
    "fp8": f"{MODEL} --fp8-recipe tensorwise --train-samples 64 --objective mdm --num-mc 7",
    "training-only": f"{MODEL} --teacher other --distill-weight 0.3 --meta-gradient-norm 0.5 --train-samples 64",
    "deepspeed": f"{MODEL} --deepspeed --deepspeed-config d.json --objective block-diffusion --diffusion-block-size 8",
}
FLAGS = [
    "",
    "--num-mc 3 --eval-seed 5 --eval-samples 12",
    "--valid-data-path other=elsewhere/valid",
    "--tokenizer-type HFTokenizer --tokenizer-model t.json",
    "--vocab-file v.json --merge-file m.txt",
    "--fp32",
    "--no-bf16",
    "--train-epochs 3",
    "--train-iters 7",
    "--train-data-path-file list.txt",
    "--model-size 7M",
    "--tensor-model-parallel-size 2",
    "--objective mdm",
]


def record(folder, line: str, precision: str, objective: str = "ar") -> dict:
    """Write the config.json of a run into `folder` and return it."""
    config = parse(objective, line.split())
    recorded = {"objective_name": config.objective.objective, "precision": precision, "plan": {}, **asdict(config)}
    (folder / "config.json").write_text(json.dumps(recorded))
    return recorded


def outcome(read: Callable[[], Config]) -> dict | str:
    """Return the configuration that `read` returns, or the message of its error."""
    try:
        return asdict(read())
    except ConfigurationError as error:
        return str(error)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", LINES)
def test_a_recorded_run_is_read_as_by_skip_train(name, flags, tmp_path):
    record(tmp_path, LINES[name], precision="bf16" if name in ("blend", "fp8") else "fp32")
    words = flags.split()
    expected = outcome(lambda: parse("ar", ["--skip-train", "--load", str(tmp_path), *words]))
    assert outcome(lambda: trained_config(str(tmp_path), words)) == expected


def test_an_evaluation_depends_on_neither_the_layout_nor_the_device_of_training(tmp_path):
    record(tmp_path, LINES["layout"], precision="bf16")
    config = trained_config(str(tmp_path))
    assert config.parallel.tensor_model_parallel_size == 1 and config.tracking.tensorboard_dir is None
    assert (config.training.bf16, config.training.fp32) == (True, None)
    assert (config.checkpoint.load, config.checkpoint.save) == (str(tmp_path), None)
    assert config.optimizer.ema_decay == 0.9 and config.validation.skip_train


@pytest.mark.parametrize("flags", ["--pipeline-model-parallel-size 2", "--zero-stage 3"])
def test_an_evaluation_fits_layouts_that_teachers_and_trial_moves_do_not(flags, tmp_path):
    record(tmp_path, LINES["training-only"], precision="fp32")
    config = trained_config(str(tmp_path), flags.split())
    resolve(config, Vocabulary(257), 1000, capabilities("ar"))
    check_layout(config, 2)


def test_a_run_older_than_a_flag_has_its_default(tmp_path):
    recorded = record(tmp_path, LINES["plain"], "fp32", objective="mdm")
    del recorded["objective"], recorded["validation"]["num_mc"], recorded["parallel"], recorded["checkpoint"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    config = trained_config(str(tmp_path))
    assert config == parse("ar", ["--skip-train", "--load", str(tmp_path)])
    assert config.objective.objective == "mdm" and config.validation.num_mc == 4


@pytest.mark.parametrize(
    "flags, message", [(["--num-mx", "3"], "unknown flag --num-mx"), (["--num-mc"], "no value|is not followed")]
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    record(tmp_path, LINES["plain"], "fp32")
    with pytest.raises(ConfigurationError, match=message):
        trained_config(str(tmp_path), flags)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no run and is no checkpoint; give a folder that --save wrote"):
        trained_config(str(tmp_path))
