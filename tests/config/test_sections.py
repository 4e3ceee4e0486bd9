"""Each section checks its own fields; every message is tested."""

import ast
from pathlib import Path

import pytest

from megatron.config import sections, tokenizer_flags
from megatron.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError

REFUSED = [
    (ModelConfig, {"num_layers": 0}, "--num-layers 0: must be at least 1"),
    (ModelConfig, {"hidden_size": -1}, "--hidden-size -1: must be at least 1"),
    (ModelConfig, {"num_attention_heads": 0}, "--num-attention-heads 0: must be at least 1"),
    (ModelConfig, {"kv_channels": 0}, "--kv-channels 0: must be at least 1"),
    (ModelConfig, {"ffn_hidden_size": 0}, "--ffn-hidden-size 0: must be at least 1"),
    (ModelConfig, {"group_query_attention": True, "num_query_groups": -1}, "--num-query-groups -1: must be at least 1"),
    (ModelConfig, {"norm_epsilon": 0.0}, "--norm-epsilon 0.0: must be positive"),
    (ModelConfig, {"rotary_base": -1.0}, "--rotary-base -1.0: must be positive"),
    (ModelConfig, {"init_method_std": 0.0}, "--init-method-std 0.0: must be positive"),
    (ModelConfig, {"mlp_dropout": 1.0}, "--mlp-dropout 1.0: must be in [0, 1)"),
    (ModelConfig, {"hidden_dropout": -0.1}, "--hidden-dropout -0.1: must be in [0, 1)"),
    (ModelConfig, {"label_smoothing": 1.0}, "--label-smoothing 1.0: must be in [0, 1)"),
    (ModelConfig, {"label_smoothing": -0.1}, "--label-smoothing -0.1: must be in [0, 1)"),
    (ModelConfig, {"z_loss": -1e-4}, "--z-loss -0.0001: must not be negative"),
    (ModelConfig, {"parametrization": "mup"}, "--parametrization mup: does nothing without --base-hidden-size"),
    (ModelConfig, {"base_hidden_size": 8}, "--base-hidden-size 8: does nothing without --parametrization; give both"),
    (ModelConfig, {"weight_decay_scaling": "none"}, "--weight-decay-scaling none: does nothing without --parametriza"),
    (ModelConfig, {"base_kv_channels": 8}, "--base-kv-channels 8: does nothing without --parametrization; give both"),
    (
        ModelConfig,
        {"parametrization": "completep", "base_hidden_size": 8},
        "--parametrization completep: scales with the depth and needs --base-num-layers; give it",
    ),
    (
        ModelConfig,
        {"parametrization": "mup", "base_hidden_size": 8, "base_num_layers": 2},
        "--base-num-layers 2: does nothing without --parametrization completep; give both or neither",
    ),
    (ModelConfig, {"num_loops": 2, "loop_layers": "1-0"}, "--loop-layers 1-0: must be A-B with 0 <= A <= B <= "),
    (ModelConfig, {"hidden_size": 33}, "--hidden-size 33: is not a multiple of --num-attention-heads 4; change one"),
    (
        ModelConfig,
        {"hidden_size": 12},
        "--hidden-size 12: gives heads of dimension 3, and rotary embeddings need an even",
    ),
    (
        ModelConfig,
        {"kv_channels": 5},
        "--kv-channels 5: gives heads of dimension 5, and rotary embeddings need an even",
    ),
    (ModelConfig, {"num_query_groups": 2}, "--num-query-groups 2: does nothing without --group-query-attention"),
    (ModelConfig, {"group_query_attention": True}, "--group-query-attention: does nothing without --num-query-groups"),
    (
        ModelConfig,
        {"group_query_attention": True, "num_query_groups": 3},
        "--num-query-groups 3: does not divide --num-attention-heads 4; change one",
    ),
    (DataConfig, {"seq_length": 1}, "--seq-length 1: must be at least 2"),
    (
        DataConfig,
        {"train_data_path": ("a",), "train_data_path_file": "f"},
        "--train-data-path-file f: excludes --train-data-path a; give one of them",
    ),
    (DataConfig, {"split": "0,1"}, "--split 0,1: give up to three proportions"),
    (DataConfig, {"num_workers": -1}, "--num-workers -1: must not be negative"),
    (DataConfig, {"train_unique_tokens": 0}, "--train-unique-tokens 0: must be positive"),
    (DataConfig, {"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer: needs --vocab-size; give it"),
    (
        DataConfig,
        {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"},
        "--vocab-file v: needs --merge-file; give both",
    ),
    (
        DataConfig,
        {"tokenizer_type": "GPT2BPETokenizer", "merge_file": "m"},
        "--merge-file m: needs --vocab-file; give both",
    ),
    (
        DataConfig,
        {"tokenizer_type": "GPT2BPETokenizer"},
        "--tokenizer-type GPT2BPETokenizer: needs --vocab-file and --merge-file; give both",
    ),
    (DataConfig, {"vocab_size": 5}, "--vocab-size 5: belongs to NullTokenizer, and --tokenizer-type is HFTokenizer"),
    (DataConfig, {"tokenizer_type": "NullTokenizer", "vocab_size": 0}, "--vocab-size 0: must be at least 1"),
    (
        DataConfig,
        {"tokenizer_type": "ByteTokenizer", "tokenizer_model": "t.json"},
        "--tokenizer-model t.json: belongs to HFTokenizer, GPTSentencePieceTokenizer, SentencePieceTokenizer, and",
    ),
    (ObjectiveConfig, {"mask_eps": 0.0}, "--mask-eps 0.0: must be in (0, 1)"),
    (ObjectiveConfig, {"mask_eps": 1.0}, "--mask-eps 1.0: must be in (0, 1)"),
    (
        ObjectiveConfig,
        {"mask_time_distribution": "bell", "mask_time_high": 0.9},
        "--mask-time-high 0.9: does nothing without --mask-time-distribution window; give both or neither",
    ),
    (
        ObjectiveConfig,
        {"mask_time_weighting": "none"},
        "--mask-time-weighting none: does nothing without --mask-time-distribution; give both or neither",
    ),
    (
        ObjectiveConfig,
        {"mask_time_distribution": "window", "mask_time_low": 0.8},
        "--mask-time-low 0.8: must be below --mask-time-high 0.75; change one of them",
    ),
    (
        ObjectiveConfig,
        {"mask_time_distribution": "window", "mask_time_uniform_share": 0.0},
        "--mask-time-uniform-share 0.0: leaves out times outside the window, which importance weights need; give more",
    ),
    (
        ObjectiveConfig,
        {"mask_time_distribution": "bell", "mask_time_std": 0.0},
        "--mask-time-std 0.0: must be positive",
    ),
    (ObjectiveConfig, {"stochastic_depth": 1.0}, "--stochastic-depth 1.0: must be in [0, 1)"),
    (ObjectiveConfig, {"masked_input_weight": -1.0}, "--masked-input-weight -1.0: must not be negative"),
    (ObjectiveConfig, {"diffusion_block_size": 0}, "--diffusion-block-size 0: must be at least 1"),
    (
        ObjectiveConfig,
        {"masked_input_weight": 0.4, "token_dropout": 0.1},
        "--masked-input-weight 0.4: excludes --token-dropout 0.1; give one of them",
    ),
    (
        ObjectiveConfig,
        {"right_to_left_ratio": 0.5, "num_order_list": 4},
        "--right-to-left-ratio 0.5: excludes --num-order-list 4; give one of them",
    ),
    (
        ObjectiveConfig,
        {"use_predefined_order": True},
        "--use-predefined-order: does nothing without --num-order-list; give both or neither",
    ),
    (ObjectiveConfig, {"target_offset_max": 5}, "--target-offset-max 5: needs --target-positions, or the model"),
    (ObjectiveConfig, {"token_dropout": 1.1}, "--token-dropout 1.1: must be in [0, 1]"),
    (ObjectiveConfig, {"token_dropout_max": -0.1}, "--token-dropout-max -0.1: must be in [0, 1]"),
    (
        ObjectiveConfig,
        {"token_dropout": 0.1, "token_dropout_max": 0.3},
        "--token-dropout 0.1: excludes --token-dropout-max 0.3; give one of them",
    ),
    (OptimizerConfig, {"lr_cycles": 4}, "--lr-cycles 4: does nothing without --lr-decay-style cyclic; give both"),
    (OptimizerConfig, {"lr_decay_style": "cyclic"}, "--lr-decay-style cyclic: needs --lr-cycles; give it"),
    (OptimizerConfig, {"lr": 0.0}, "--lr 0.0: must be positive"),
    (OptimizerConfig, {"lr": 0.1, "min_lr": 0.2}, "--min-lr 0.2: must be in [0, --lr 0.1]"),
    (OptimizerConfig, {"min_lr": -0.1}, "--min-lr -0.1: must be in [0, --lr 0.0002]"),
    (OptimizerConfig, {"weight_decay": -1.0}, "--weight-decay -1.0: must not be negative"),
    (
        OptimizerConfig,
        {"end_weight_decay": 0.1},
        "--end-weight-decay 0.1: does nothing with --weight-decay-incr-style c",
    ),
    (
        OptimizerConfig,
        {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1},
        "--weight-decay-incr-style linear: needs --end-weight-decay; give it",
    ),
    (
        OptimizerConfig,
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.1, "end_weight_decay": 0.2, "weight_decay": 0.3},
        "--weight-decay 0.3: does nothing with --weight-decay-incr-style cosine, which has a start and an end; leave",
    ),
    (OptimizerConfig, {"clip_grad": -1.0}, "--clip-grad -1.0: must not be negative"),
    (OptimizerConfig, {"adam_beta1": 1.0}, "--adam-beta1 1.0: must be in [0, 1)"),
    (OptimizerConfig, {"adam_beta2": -0.1}, "--adam-beta2 -0.1: must be in [0, 1)"),
    (OptimizerConfig, {"muon_momentum": 1.0}, "--muon-momentum 1.0: must be in [0, 1)"),
    (OptimizerConfig, {"muon_momentum": 0.9}, "--muon-momentum 0.9: does nothing without --optimizer muon; give both"),
    (OptimizerConfig, {"ema_decay": 1.0}, "--ema-decay 1.0: must be in (0, 1)"),
    (OptimizerConfig, {"average_from_samples": -1}, "--average-from-samples -1: must not be negative"),
    (
        OptimizerConfig,
        {"ema_decay": 0.9, "average_from_samples": 5},
        "--ema-decay 0.9: excludes --average-from-samples 5; give one of them",
    ),
    (OptimizerConfig, {"adam_eps": 0.0}, "--adam-eps 0.0: must be positive"),
    (OptimizerConfig, {"lr_warmup_samples": -1}, "--lr-warmup-samples -1: must not be negative"),
    (OptimizerConfig, {"lr_decay_samples": 0}, "--lr-decay-samples 0: must be at least 1"),
    (OptimizerConfig, {"lr_wsd_decay_samples": 0, "lr_decay_style": "WSD"}, "--lr-wsd-decay-samples 0: must be at"),
    (
        OptimizerConfig,
        {"lr_wsd_decay_samples": 5},
        "--lr-wsd-decay-samples 5: does nothing without --lr-decay-style",
    ),
    (
        OptimizerConfig,
        {"lr_decay_style": "constant", "min_lr": 0.0},
        "--min-lr 0.0: excludes --lr-decay-style constant; give one of them",
    ),
    (TrainingConfig, {"micro_batch_size": 0}, "--micro-batch-size 0: must be at least 1"),
    (TrainingConfig, {"global_batch_size": 0}, "--global-batch-size 0: must be at least 1"),
    (TrainingConfig, {"log_interval": 0}, "--log-interval 0: must be at least 1"),
    (TrainingConfig, {"train_epochs": 0.0}, "--train-epochs 0.0: must be positive"),
    (TrainingConfig, {"train_samples": -5}, "--train-samples -5: must be positive"),
    (TrainingConfig, {"train_iters": 0}, "--train-iters 0: must be positive"),
    (TrainingConfig, {"train_flops": 0.0}, "--train-flops 0.0: must be positive"),
    (
        TrainingConfig,
        {"fp32": True, "fp8_recipe": "rowwise"},
        "--fp8-recipe rowwise: needs bf16; leave it out, or --fp32",
    ),
    (
        TrainingConfig,
        {"bf16": False, "flash_attention": "FA4"},
        "--flash-attention FA4: needs bf16; leave it out, or --no-bf16",
    ),
    (TrainingConfig, {"exit_interval": 0}, "--exit-interval 0: must be positive"),
    (TrainingConfig, {"exit_duration_in_mins": 0.0}, "--exit-duration-in-mins 0.0: must be positive"),
    (
        TrainingConfig,
        {"exit_code_when_stopped": 256},
        "--exit-code-when-stopped 256: must be in [0, 255]",
    ),
    (TrainingConfig, {"bf16": True, "fp32": True}, "--bf16: excludes --fp32; give one of them"),
    (TrainingConfig, {"bf16": False, "fp32": False}, "--no-bf16: excludes --no-fp32; give one of them"),
    (ParallelConfig, {"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0: must be at least 1"),
    (ParallelConfig, {"distributed_timeout_minutes": 0.0}, "--distributed-timeout-minutes 0.0: must be positive"),
    (ParallelConfig, {"recompute_num_layers": 0}, "--recompute-num-layers 0: must be at least 1"),
    (ParallelConfig, {"zero_stage": 4}, "--zero-stage 4: must be in [0, 3]"),
    (ParallelConfig, {"zero_stage": -1}, "--zero-stage -1: must be in [0, 3]"),
    (
        ParallelConfig,
        {"zero_stage": 2, "pipeline_model_parallel_size": 2},
        "--zero-stage 2: reduces gradients at every micro-batch, and a pipeline once a step; give --zero-stage 1 or 3",
    ),
    (
        ParallelConfig,
        {"zero_stage": 0, "num_distributed_optimizer_instances": 2},
        "--num-distributed-optimizer-instances 2: has no effect at --zero-stage 0",
    ),
    (
        ParallelConfig,
        {"num_layers_per_virtual_pipeline_stage": 1},
        "--num-layers-per-virtual-pipeline-stage 1: does nothing without --pipeline-model-parallel-size",
    ),
    (
        ParallelConfig,
        {"recompute_num_layers": 1},
        "--recompute-num-layers 1: does nothing without --recompute-granularity",
    ),
    (ParallelConfig, {"deepspeed_config": "d.json"}, "--deepspeed-config d.json: does nothing without --deepspeed"),
    (
        ParallelConfig,
        {"deepspeed": True, "tensor_model_parallel_size": 2},
        "--tensor-model-parallel-size 2: is not supported with --deepspeed",
    ),
    (
        ParallelConfig,
        {"deepspeed": True, "num_distributed_optimizer_instances": 2},
        "--num-distributed-optimizer-instances 2: is not supported with --deepspeed",
    ),
    (
        ParallelConfig,
        {"deepspeed": True, "cpu_offload": True, "zero_stage": 0},
        "--cpu-offload: needs --zero-stage 1 or more with --deepspeed; leave one of them out",
    ),
    (ValidationConfig, {"num_mc": 0}, "--num-mc 0: must be at least 1"),
    (ValidationConfig, {"likelihood": "chain"}, "--likelihood chain: is evaluated without training, since it may cost"),
    (ValidationConfig, {"likelihood": "mean"}, "--likelihood mean: is not one of bound, chain, iwae"),
    (
        ValidationConfig,
        {"likelihood": "chain", "chain_order": "up"},
        "--chain-order up: is not one of confidence, margin, entropy, random",
    ),
    (
        ValidationConfig,
        {"chain_order": "random"},
        "--chain-order random: does nothing without --likelihood chain; give",
    ),
    (ValidationConfig, {"tokens_per_step": 2}, "--tokens-per-step 2: does nothing without --likelihood chain; give bo"),
    (ValidationConfig, {"tokens_per_step": 0}, "--tokens-per-step 0: must be at least 1"),
    (ValidationConfig, {"block_length": 0}, "--block-length 0: must be at least 1"),
    (ValidationConfig, {"num_orders": 4}, "--num-orders 4: does nothing without --likelihood iwae; give both or neith"),
    (ValidationConfig, {"num_orders": 1}, "--num-orders 1: must be at least 2"),
    (
        ValidationConfig,
        {"likelihood": "iwae", "skip_train": True, "num_orders": 3},
        "--num-orders 3: is an odd number, and validation compares two halves of the orders; give an even one",
    ),
    (ValidationConfig, {"eval_interval": 0}, "--eval-interval 0: must be positive"),
    (ValidationConfig, {"eval_samples": -1}, "--eval-samples -1: must be positive"),
    (ValidationConfig, {"eval_batch_size": 0}, "--eval-batch-size 0: must be positive"),
    (CheckpointConfig, {"save_interval": 0}, "--save-interval 0: must be positive"),
    (CheckpointConfig, {"keep_every_epochs": 0.0}, "--keep-every-epochs 0.0: must be positive"),
    (CheckpointConfig, {"keep_iterations": (5, 0)}, "--keep-iterations 5 0: steps are counted from 1; change it"),
    (CheckpointConfig, {"wait_for_lock": 721.0}, "--wait-for-lock 721.0: must be in [0, 720]"),
    (CheckpointConfig, {"wait_for_lock": 5.0}, "--wait-for-lock 5.0: does nothing without --save; give both"),
    (TrackingConfig, {"tensorboard_queue_size": 0}, "--tensorboard-queue-size 0: must be at least 1"),
    (
        TrackingConfig,
        {"tensorboard_queue_size": 9},
        "--tensorboard-queue-size 9: does nothing without --tensorboard",
    ),
    (TrackingConfig, {"wandb_project": "a/b"}, "--wandb-project a/b: a project's name has none of / \\ # ? % : in it"),
    (TrackingConfig, {"wandb_exp_name": "a"}, "--wandb-exp-name a: does nothing without --wandb-project"),
    (
        TrackingConfig,
        {"wandb_group": "a", "wandb_project": ""},
        "--wandb-group a: does nothing without --wandb",
    ),
    (TrackingConfig, {"wandb_save_dir": "a"}, "--wandb-save-dir a: does nothing without --wandb-project; give both"),
]
MODEL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}


def build(section, fields):
    return section(**(MODEL if section is ModelConfig else {}) | fields)


@pytest.mark.parametrize("section, fields, message", REFUSED, ids=[message.split(":")[0] for _, _, message in REFUSED])
def test_a_wrong_value_is_refused_in_one_line(section, fields, message):
    with pytest.raises(ConfigurationError) as caught:
        build(section, fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_rule_of_every_section_is_provoked():
    """The table above makes every `require` call of the sections fail."""
    files = [*Path(sections.__file__).parent.glob("*.py"), Path(tokenizer_flags.__file__)]
    calls = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    ]
    provoked = set()
    for section, fields, _ in REFUSED:
        with pytest.raises(ConfigurationError) as caught:
            build(section, fields)
        caller = caught.traceback[-2]  # of `require`
        if Path(str(caller.path)) in files:
            provoked.add((caller.path, caller.lineno))
    assert len(provoked) == len(calls)


def test_edges_that_are_allowed():
    ModelConfig(**MODEL | {"hidden_size": 33, "kv_channels": 6})  # head dimension independent of hidden size / heads
    ModelConfig(**MODEL, group_query_attention=True, num_query_groups=4)
    DataConfig(tokenizer_type="NullTokenizer", vocab_size=1)
    DataConfig(valid_data_path=("data/validation", "tuning=/data/lr=3/tuning", "c4-en_2=x"))
    ObjectiveConfig(token_dropout=1.0)
    OptimizerConfig(clip_grad=0.0, weight_decay=0.0, min_lr=2e-4, lr_warmup_samples=0)
    OptimizerConfig(weight_decay_incr_style="linear", start_weight_decay=0.3, end_weight_decay=0.0)
    TrainingConfig(bf16=True, fp32=False)


def test_derived_sizes():
    model = ModelConfig(**MODEL)
    assert model.head_size == 8 and model.key_value_heads == 4 and model.mlp_size == 64
    assert ModelConfig(**MODEL, kv_channels=16).head_size == 16
    assert ModelConfig(**MODEL, group_query_attention=True, num_query_groups=2).key_value_heads == 2
    assert ModelConfig(**MODEL | {"hidden_size": 768}).mlp_size == 2048
    assert ModelConfig(**MODEL, swiglu=False).mlp_size == 128
    assert ModelConfig(**MODEL, ffn_hidden_size=100).mlp_size == 100
    assert OptimizerConfig(lr=1.0).final_lr == 0.1 and OptimizerConfig(lr=1.0, min_lr=0.0).final_lr == 0.0


@pytest.mark.parametrize("size, padded", [(1, 128), (127, 128), (128, 256), (257, 384), (512, 640), (50257, 50304)])
def test_the_vocabulary_always_has_a_row_for_the_mask(size, padded):
    vocabulary = Vocabulary(size)
    assert vocabulary.mask_id == size < vocabulary.padded_size == padded
