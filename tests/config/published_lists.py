"""The argument lists of the 18 scripts of the published system (2507.15857), as data, and the configuration they mean.

Its templates leave model size, micro-batch, data and epochs to the user: `training/*/example`, `*/data_value` and
`evaluation/*/example`, and the size of `*/chinchilla`. Those have values of its TRAIN.md here. The lists are as bash
expands them, but for `--wandb-project`, whose value the scripts split at its blanks, and a comment inside the string of
`evaluation/mdm/example`; the published parser refuses both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron.config.sizes import LADDER
from megatron.config.subsets import DATA_VALUE_TOKENS, UNIQUE_TOKENS

OPTIMIZER = (
    "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --lr 2e-4 --min-lr 2e-5 --clip-grad 1.0"
)
OPTIMIZER += " --weight-decay 1e-1 --lr-decay-style cosine"
SHAPE = "--disable-bias-linear --normalization rmsnorm --swiglu --bf16 --use-rotary-position-embeddings"
SHAPE += " --max-position-embeddings 2048 --seq-length 2048"
RECORDS = "--log-interval 10 --save-interval 1000 --tensorboard-queue-size 5 --log-timers-to-tensorboard"
RECORDS += " --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard"
TOKENIZER = "--vocab-file utils/data/gpt2-vocab.json --merge-file utils/data/gpt2-merges.txt --data-impl mmap"
DATA = "--train-data-path-file utils/datapaths/train.txt --valid-data-path-file utils/datapaths/valid.txt"
LAYOUT = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
OFFLOAD = {"device": "cpu", "pin_memory": True}
PROJECT = "example project name"
C4 = 174_000_000_000  # tokens of the whole training set, roughly; a single epoch reads fewer


@dataclass(frozen=True)
class Script:
    """What differs between the scripts: a budget in `epochs` of `unique_tokens`, or in `flops`."""

    objective: str
    size: str
    unique_tokens: int = UNIQUE_TOKENS["100M"]
    epochs: int = 100
    flops: int | None = None
    micro_batch: int = 8
    evaluates: bool = False
    num_mc: int | None = None
    multi_node: bool = False

    @property
    def samples(self) -> int:
        """--train-samples as the scripts compute it."""
        if self.flops is None:
            return self.unique_tokens * self.epochs // 2048
        layers, hidden = LADDER[self.size][:2]
        mlp = int((4 * hidden * 2 / 3) / 64) * 64
        parameters = 4 * layers * hidden**2 + 3 * layers * hidden * mlp + 6 * layers * hidden + 50257 * hidden
        return round(int((self.flops // 10**9 / 6) * (10**9 / parameters)) / 2048)

    @property
    def warmup(self) -> int:
        """--lr-warmup-samples as the scripts compute it."""
        return self.samples // 100 if self.flops is None else max(round(self.samples / 100), 100)

    def model(self) -> str:
        """Return the flags of the shape, as utils/model_params.sh has it."""
        layers, hidden, heads, channels = LADDER[self.size]
        return (
            f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --kv-channels {channels} "
            f"{SHAPE} --micro-batch-size {self.micro_batch} --global-batch-size 256 --train-samples {self.samples}"
        )

    def flags(self, folder: Path) -> list[str]:
        """Return the argument list, and write its DeepSpeed file into `folder`."""
        evaluation = "--skip-train --eval-interval 1 --eval-iters 100" + (
            f" --num-mc {self.num_mc}" * bool(self.num_mc)
        )
        line = f"{LAYOUT} {'--no-pipeline-parallel --cpu-optimizer ' if self.multi_node else ''}{self.model()}"
        line += f" --lr-decay-samples {self.samples} --lr-warmup-samples {self.warmup} {OPTIMIZER} {RECORDS}"
        line += f" {TOKENIZER} {DATA} {evaluation if self.evaluates else '--eval-interval 1000 --eval-iters 10'}"
        line += f" --kill-switch-file {folder}/kill --save {folder}/run --load {folder}/run"
        line += f" --tensorboard-dir {folder}/board --wandb-exp-name run --wandb-save-dir {folder} --wandb-group run"
        return [*line.split(), *self.deepspeed(folder), "--wandb-project", PROJECT]

    def deepspeed(self, folder: Path) -> list[str]:
        """Return the flags of DeepSpeed, and write its file."""
        zero: dict = {"stage": int(self.multi_node)}
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
        return f"--deepspeed --deepspeed_config {folder}/ds.json --zero-stage {int(self.multi_node)}".split()


QUICKSTART = {"ar": Script("ar", "140M", epochs=50), "mdm": Script("mdm", "425M", epochs=500)}
MULTI_NODE = {"unique_tokens": UNIQUE_TOKENS["500M"], "epochs": 363, "micro_batch": 2, "multi_node": True}
CHINCHILLA = {"unique_tokens": C4, "flops": 6 * 10**18, "micro_batch": 16}
SCRIPTS = {
    "quickstart/train_ar": QUICKSTART["ar"],
    "quickstart/train_mdm": QUICKSTART["mdm"],
    "quickstart/eval_ar": Script("ar", "140M", epochs=50, micro_batch=16, evaluates=True),
    "quickstart/eval_mdm": Script("mdm", "425M", epochs=500, evaluates=True, num_mc=8),
    "training/arm/example": Script("ar", "217M"),
    "training/mdm/example": Script("mdm", "217M"),
    "training/arm/chinchilla": Script("ar", "117M", **CHINCHILLA),
    "training/mdm/chinchilla": Script("mdm", "117M", **CHINCHILLA),
    "training/arm/data_value": Script("ar", "217M", DATA_VALUE_TOKENS["ar", 1e19][2], flops=10**19),
    "training/mdm/data_value": Script("mdm", "117M", DATA_VALUE_TOKENS["mdm", 1e19][2], flops=10**19),
    "training/arm/multi_node": Script("ar", "2298M", **MULTI_NODE),
    "training/mdm/multi_node": Script("mdm", "2298M", **MULTI_NODE),
    "evaluation/arm/example": Script("ar", "217M", evaluates=True),
    "evaluation/mdm/example": Script("mdm", "217M", evaluates=True, num_mc=16),
}

TASKS = "arc_easy,boolq,copa,hellaswag,piqa,race,winogrande,sciq"
ALL_TASKS = f"{TASKS},lambada_standard"


@dataclass(frozen=True)
class Downstream:
    """A script of downstream/: a run of the quickstart, tasks, name of the results and the flags of its scorer."""

    objective: str
    tasks: str = ALL_TASKS
    suffix: str = ""
    scorer: str = ""

    @property
    def results(self) -> str:
        """--results_path."""
        return f"results/{self.objective.replace('ar', 'arm')}_best_on_100m_latest{self.suffix}.json"

    def flags(self, folder: Path, run: str) -> list[str]:
        """Return the argument list for the run folder `run`, and write its DeepSpeed file into `folder`."""
        trained = QUICKSTART[self.objective]
        script = Script(trained.objective, trained.size, epochs=trained.epochs, micro_batch=32)
        line = f"{LAYOUT} {script.model()} {TOKENIZER} --kill-switch-file {folder}/kill --load {run} --load-tag latest"
        line += " --inference --no-load-optim --no-load-rng --eval_fp32"
        line += f" --task_list {self.tasks} --results_path {self.results} {self.scorer}"
        return [*line.split(), *script.deepspeed(folder)]


DOWNSTREAM = {
    "downstream/downstream_arm": Downstream("ar"),
    "downstream/downstream_mdm": Downstream("mdm", scorer="--eval_method ar"),
    "downstream/downstream_mdm_mc": Downstream("mdm", TASKS, "_mc32", "--eval_method mc --only_mc_nll --num-mc 32"),
    "downstream/downstream_mdm_onlygen": Downstream("mdm", "lambada_standard", "_onlygen", "--only_generate"),
}


def published_configuration(script: Script, folder: Path) -> dict:
    """Return the value of every flag of training that the published system has, by field.

    Values that its scripts do not pass are the defaults of its parser. Fields that it lacks are in `ABSENT`.
    """
    layers, hidden, heads, channels = LADDER[script.size]
    model = {
        **{"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "kv_channels": channels},
        **{"swiglu": True, "normalization": "rmsnorm", "norm_epsilon": 1e-5, "rotary_base": 10000.0},
        **{"add_bias_linear": False, "untie_embeddings_and_output_weights": False, "init_method_std": 0.02},
        **{"attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1},
        **{"softmax_over_padding": True, "ffn_hidden_size": None},
        **{"num_query_groups": None, "group_query_attention": False},
    }
    data = {
        **{"train_data_path": (), "train_data_path_file": "utils/datapaths/train.txt", "split": None},
        **{"valid_data_path": (), "valid_data_path_file": "utils/datapaths/valid.txt", "seq_length": 2048},
        **{"epoch_order": "megatron", "tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None},
        **{"vocab_file": "utils/data/gpt2-vocab.json", "merge_file": "utils/data/gpt2-merges.txt", "vocab_size": None},
        **{"reset_attention_mask": False, "reset_position_ids": False, "eod_mask_loss": False, "num_workers": 2},
    }
    objective = {
        **{"objective": script.objective, "mask_eps": 1e-3, "ar_ratio": 0.0, "low_noise_samples": 0},
        **{"low_noise_ratio": 0.5, "num_order_list": 1, "use_predefined_order": False, "randmask_ratio": 0.0},
    }
    objective["mask_times"] = "iid" if script.objective == "mdm" else "stratified"  # AR draws none
    optimizer = {
        **{"optimizer": "adamw", "lr": 2e-4, "min_lr": 2e-5, "lr_decay_style": "cosine", "clip_grad": 1.0},
        **{"lr_warmup_samples": script.warmup, "lr_decay_samples": script.samples, "weight_decay": 0.1},
        **{"weight_decay_incr_style": "constant", "start_weight_decay": None, "end_weight_decay": None},
        **{"weight_decay_parameters": "matrices", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8},
    }
    training = {
        **{"train_samples": script.samples, "train_iters": None, "micro_batch_size": script.micro_batch},
        **{"global_batch_size": 256, "seed": 1234, "bf16": True, "fp32": None, "log_interval": 10},
        **{"exit_interval": None, "exit_duration_in_mins": None, "kill_switch_file": f"{folder}/kill"},
    }
    parallel = {
        **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "zero_stage": int(script.multi_node)},
        **{"cpu_offload": script.multi_node, "deepspeed": True, "deepspeed_config": f"{folder}/ds.json"},
        **{"recompute_granularity": None, "recompute_num_layers": None, "distributed_timeout_minutes": 10.0},
    }
    validation = {
        **{"eval_interval": 1 if script.evaluates else 1000, "eval_samples": 256 * (100 if script.evaluates else 10)},
        **{"eval_alignment": "published", "skip_train": script.evaluates, "eval_batch_size": None},
    }
    validation["num_mc"] = script.num_mc or 1
    checkpoint = {"save": f"{folder}/run", "load": f"{folder}/run", "save_interval": 1000}
    tracking = {
        **{"tensorboard_dir": f"{folder}/board", "tensorboard_queue_size": 5, "wandb_project": PROJECT},
        **{"wandb_exp_name": "run", "wandb_save_dir": str(folder), "wandb_group": "run"},
    }
    return model | data | objective | optimizer | training | parallel | validation | checkpoint | tracking


# fields without a counterpart in the published system: values that change nothing
ABSENT = {
    **{"model_size": None, "qk_layernorm": False, "mlp_dropout": 0.0, "label_smoothing": 0.0, "z_loss": 0.0},
    **{"parametrization": "standard", "base_hidden_size": None, "base_num_layers": None, "base_kv_channels": None},
    **{"weight_decay_scaling": "inverse-lr"},
    **{"num_loops": 1, "loop_layers": None},
    **{"train_unique_tokens": None, "blend_order": "due-time"},  # one data set: no blend
    **{"right_to_left_ratio": 0.0, "target_offset_max": 1, "target_positions": False, "token_dropout": 0.0},
    **{"token_dropout_max": 0.0, "random_replacement": 0.0, "masked_input_weight": 0.0, "masked_input_max": 0.5},
    **{"mask_time_distribution": "uniform", "mask_time_low": 0.25, "mask_time_high": 0.75, "mask_time_center": 0.5},
    **{"mask_time_std": 0.2, "mask_time_uniform_share": None, "mask_time_weighting": "importance"},
    **{"mdm_loss": "bound", "lr_cycles": None},
    **{"stochastic_depth": 0.0, "causal_ratio": 0.5, "diffusion_block_size": 16},  # of other objectives
    **{"lr_wsd_decay_samples": None, "muon_momentum": 0.95, "ema_decay": None, "average_from_samples": None},
    **{"meta_gradient_norm": None, "meta_gradient_parameters": "matrices", "meta_gradient_style": "constant"},
    **{"recipe": "published", "train_epochs": None, "train_flops": None, "fp8_recipe": None, "dry_run": False},
    **{"flash_attention": None, "compile": None, "deterministic": False, "exit_code_when_stopped": 0},
    **{"num_layers_per_virtual_pipeline_stage": None, "num_distributed_optimizer_instances": 1, "eval_seed": 1},
    **{"exit_on_missing_checkpoint": False, "wait_for_lock": 0.0, "keep_every_epochs": None, "keep_iterations": ()},
    **{"trackio_project": None, "mlflow_experiment": None, "mlflow_tracking_uri": None},
    **{"likelihood": None, "chain_order": "left-to-right", "tokens_per_step": 1, "block_length": None, "num_orders": 8},
    **{"exact_branch": False, "teacher": (), "distill_weight": 0.5, "distill_temperature": 1.0},
}
