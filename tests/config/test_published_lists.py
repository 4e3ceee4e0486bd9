"""The 14 published training and evaluation command lines, unchanged: each becomes a plan, with its DeepSpeed file."""

import json
import logging
from dataclasses import dataclass

import pytest

from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import resolve
from megatron.config.sizes import LADDER, UNIQUE_TOKENS
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.registry import capabilities
from megatron.parallel.deepspeed_config import deepspeed_config
from megatron.training.command_line import parse, parse_run

GPUS = 8
OPTIMIZER = (
    "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --lr 2e-4 --min-lr 2e-5 --clip-grad 1.0"
)
OPTIMIZER += " --weight-decay 1e-1 --lr-decay-style cosine"
SHAPE = "--disable-bias-linear --normalization rmsnorm --swiglu --bf16 --use-rotary-position-embeddings"
SHAPE += " --max-position-embeddings 2048 --seq-length 2048"
RECORDS = "--log-interval 10 --save-interval 1000 --tensorboard-queue-size 5 --log-timers-to-tensorboard"
RECORDS += " --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard"
FILES = "--vocab-file utils/data/gpt2-vocab.json --merge-file utils/data/gpt2-merges.txt --data-impl mmap"
FILES += " --train-data-path-file utils/datapaths/train.txt --valid-data-path-file utils/datapaths/valid.txt"
OFFLOAD = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Script:
    """The differences between the scripts."""

    objective: str
    size: str
    unique: str
    epochs: float
    micro_batch: int = 8
    evaluates: bool = False
    num_mc: int | None = None
    multi_node: bool = False

    def samples(self) -> int:
        return int(UNIQUE_TOKENS[self.unique] * self.epochs) // 2048

    def flags(self, folder) -> list[str]:
        """Return the command line, and write its DeepSpeed file into `folder`."""
        layers, hidden, heads, channels = LADDER[self.size]
        stage, samples = int(self.multi_node), self.samples()
        evaluation = "--skip-train --eval-interval 1 --eval-iters 100"
        evaluation += f" --num-mc {self.num_mc}" if self.num_mc else ""
        line = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
        line += " --no-pipeline-parallel --cpu-optimizer" if self.multi_node else ""
        line += f" --num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --kv-channels {channels}"
        line += f" {SHAPE} --micro-batch-size {self.micro_batch} --global-batch-size 256 --train-samples {samples}"
        line += f" --lr-decay-samples {samples} --lr-warmup-samples {samples // 100} {OPTIMIZER} {RECORDS} {FILES} "
        line += evaluation if self.evaluates else "--eval-interval 1000 --eval-iters 10"
        line += f" --kill-switch-file {folder}/kill --save {folder}/run --load {folder}/run"
        line += f" --tensorboard-dir {folder}/board --wandb-exp-name run --wandb-save-dir {folder} --wandb-group run"
        line += f" --deepspeed --deepspeed_config {folder}/ds.json --zero-stage {stage}"
        zero = {"stage": stage}
        if self.multi_node:
            zero |= {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}
            zero |= {"contiguous_gradients": True, "overlap_comm": True}
        file = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "train_batch_size": 256,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": True},
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        }
        (folder / "ds.json").write_text(json.dumps(file))
        return [*line.split(), "--wandb-project", "example project name"]


SCRIPTS = {
    "quickstart/train_ar": Script("ar", "140M", "100M", 50),
    "quickstart/train_mdm": Script("mdm", "425M", "100M", 500),
    "quickstart/eval_ar": Script("ar", "140M", "100M", 50, 16, evaluates=True),
    "quickstart/eval_mdm": Script("mdm", "425M", "100M", 500, evaluates=True, num_mc=8),
    "training/arm/example": Script("ar", "217M", "100M", 100),
    "training/mdm/example": Script("mdm", "217M", "100M", 100),
    "training/arm/chinchilla": Script("ar", "117M", "500M", 1, 16),
    "training/mdm/chinchilla": Script("mdm", "117M", "500M", 1, 16),
    "training/arm/data_value": Script("ar", "217M", "500M", 2),
    "training/mdm/data_value": Script("mdm", "117M", "500M", 4),
    "training/arm/multi_node": Script("ar", "2298M", "500M", 363, 2, multi_node=True),
    "training/mdm/multi_node": Script("mdm", "2298M", "500M", 363, 2, multi_node=True),
    "evaluation/arm/example": Script("ar", "217M", "100M", 100, evaluates=True),
    "evaluation/mdm/example": Script("mdm", "217M", "100M", 100, evaluates=True, num_mc=16),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_published_command_line_becomes_a_plan_unchanged(name, tmp_path):
    script = SCRIPTS[name]
    config = parse(script.objective, script.flags(tmp_path))
    plan = resolve(config, Vocabulary(50257), UNIQUE_TOKENS[script.unique], capabilities(config.objective.objective))
    assert (config.data.tokenizer_type, config.data.vocab_file) == ("GPT2BPETokenizer", "utils/data/gpt2-vocab.json")
    assert plan.train_samples == plan.lr_decay_samples == script.samples()
    assert config.validation.eval_samples == (25600 if script.evaluates else 2560)
    check_layout(config, GPUS)
    check_batch(config, GPUS, capabilities(config.objective.objective))
    parallel = config.parallel
    settings = deepspeed_config(
        parallel.deepspeed_config,
        config.training,
        config.optimizer,
        world_size=GPUS,
        bf16=True,
        zero_stage=parallel.zero_stage,
        cpu_offload=parallel.cpu_offload,
    )
    offloaded = {"offload_optimizer": OFFLOAD, "contiguous_gradients": True, "overlap_comm": True}
    assert settings["zero_optimization"] == ({"stage": 1} | offloaded if script.multi_node else {"stage": 0})


# ------------------------------------------------------- differences without --recipe published


def published_line(caplog, objective, flags) -> str | None:
    """Return the line that lists the defaults that are not published."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "megatron"):
        parse_run(objective, flags)
    lines = [line for line in caplog.messages if line.startswith("without --recipe published")]
    assert len(lines) <= 1
    return lines[0] if lines else None


def test_one_line_lists_the_defaults_that_are_not_published(caplog, tmp_path):
    flags = SCRIPTS["quickstart/train_mdm"].flags(tmp_path)
    assert published_line(caplog, "mdm", flags) == (
        "without --recipe published, defaults differ from the published system's: --no-softmax-over-padding "
        "(published: on), --attention-dropout 0.0 (published: 0.1), --hidden-dropout 0.0 (published: 0.1), "
        "--embedding-dropout 0.0 (published: 0.1), --epoch-order documents (published: megatron), --num-workers 0 "
        "(published: 2), --mask-times stratified (published: iid), --eval-alignment common (published: published), "
        "--num-mc 4 (published: 1)"
    )
    given = "--softmax-over-padding --attention-dropout 0 --hidden-dropout 0.1 --embedding-dropout=0.1 --num-mc 1"
    rest = published_line(caplog, "mdm", [*flags, *given.split(), "--epoch-order", "megatron", "--num-workers", "2"])
    assert rest.endswith(": --mask-times stratified (published: iid), --eval-alignment common (published: published)")
    everything = [*given.split(), "--epoch-order", "windows", "--num-workers", "2", "--eval-alignment", "published"]
    assert published_line(caplog, "ar", [*flags, *everything]) is None  # AR draws no mask times
    assert published_line(caplog, "mdm", [*flags, "--recipe", "published"]) is None


def test_an_evaluation_differs_in_what_it_evaluates_only(caplog, tmp_path):
    line = published_line(caplog, "mdm", SCRIPTS["quickstart/eval_mdm"].flags(tmp_path))
    assert line.endswith(": --no-softmax-over-padding (published: on), --eval-alignment common (published: published)")


def test_a_command_line_in_our_own_spellings_is_not_compared(caplog):
    flags = "--model-size 140M --train-epochs 1 --deepspeed --vocab-file v --merge-file m --optimizer=adamw".split()
    assert published_line(caplog, "ar", flags) is None
    assert published_line(caplog, "ar", [*flags, "--disable-bias-linear"])
