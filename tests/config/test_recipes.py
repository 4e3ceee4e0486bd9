"""The recipes: field by field against the published system, and flags win over them."""

import csv
import dataclasses

import pytest

from megatron.config.recipes import BY_OBJECTIVE, RECIPES
from megatron.config.resolve import resolve
from megatron.config.sections import SECTIONS
from megatron.config.subsets import UNIQUE_TOKENS
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse
from tests.conftest import ROOT

FILES = "--vocab-file v.json --merge-file m.txt --train-data-path-file t.txt --valid-data-path-file v.txt".split()
# Values that the published scripts pass (quickstart/train_ar.sh), then defaults of their parser, under our names.
SCRIPT = {
    "num_layers": 15, "hidden_size": 768, "num_attention_heads": 12, "kv_channels": 64, "seq_length": 2048,
    "micro_batch_size": 8, "global_batch_size": 256, "normalization": "rmsnorm", "swiglu": True, "bf16": True,
    "add_bias_linear": False, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "lr": 2e-4, "min_lr": None,
    "lr_decay_style": "cosine", "clip_grad": 1.0, "weight_decay": 0.1, "log_interval": 10, "save_interval": 1000,
    "eval_interval": 1000, "eval_samples": 10 * 256, "vocab_file": "v.json", "merge_file": "m.txt",
    "train_data_path_file": "t.txt", "valid_data_path_file": "v.txt", "num_mc": 1,
}  # fmt: skip
ASSUMED = {
    "attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1, "seed": 1234, "init_method_std": 0.02,
    "norm_epsilon": 1e-5, "rotary_base": 10000.0, "untie_embeddings_and_output_weights": False, "num_workers": 2,
    "tokenizer_type": "GPT2BPETokenizer", "softmax_over_padding": True, "epoch_order": "megatron", "mask_times": "iid",
    "mask_eps": 1e-3, "eval_alignment": "published", "ffn_hidden_size": None, "group_query_attention": False,
    "num_query_groups": None, "qk_layernorm": False, "mlp_dropout": 0.0, "token_dropout": 0.0, "token_dropout_max": 0.0,
    "split": None, "train_unique_tokens": None, "skip_train": False, "ar_ratio": 0.0, "randmask_ratio": 0.0,
    "low_noise_samples": 0, "num_order_list": 1, "use_predefined_order": False, "reset_attention_mask": False,
    "reset_position_ids": False, "eod_mask_loss": False, "weight_decay_incr_style": "constant",
    "start_weight_decay": None, "end_weight_decay": None, "weight_decay_parameters": "matrices",
    "optimizer": "adamw",
}  # fmt: skip
# Flags that the published system does not have, or that are set for each run.
OURS = {
    "model_size", "recipe", "vocab_size", "tokenizer_model", "train_data_path", "valid_data_path", "fp32", "compile",
    "deterministic", "fp8_recipe", "flash_attention",
    "train_epochs", "train_samples", "train_iters", "train_flops", "lr_warmup_samples", "lr_decay_samples",
    "lr_wsd_decay_samples", "exit_interval", "exit_duration_in_mins", "kill_switch_file", "exit_code_when_stopped",
    "dry_run", "eval_batch_size", "eval_seed", "likelihood", "chain_order", "tokens_per_step", "block_length",
    "num_orders", "save", "load", "wait_for_lock", "keep_every_epochs", "keep_iterations",
    "objective",
    "exact_branch", "exit_on_missing_checkpoint", "causal_ratio", "diffusion_block_size",
    "right_to_left_ratio", "target_offset_max", "target_positions", "random_replacement", "masked_input_weight",
    "masked_input_max", "stochastic_depth", "low_noise_ratio", "label_smoothing", "z_loss", "muon_momentum",
    "parametrization", "base_hidden_size", "base_num_layers", "base_kv_channels", "weight_decay_scaling",
    "mask_time_distribution", "mask_time_low", "mask_time_high", "mask_time_center", "mask_time_std",
    "mask_time_uniform_share", "mask_time_weighting", "mdm_loss", "lr_cycles",
    "ema_decay", "average_from_samples", "teacher", "distill_weight", "distill_temperature",
    "num_loops", "loop_layers",
    "meta_gradient_norm", "meta_gradient_parameters", "meta_gradient_style",
    "blend_order",  # each published run reads one data set
}  # fmt: skip
# and the parallel layout and the trackers
OURS |= {name for section in ("parallel", "tracking") for name in SECTIONS[section].__dataclass_fields__}


def values(config) -> dict:
    return {
        field.name: getattr(getattr(config, name), field.name)
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
    }


@pytest.mark.parametrize("objective, size, epochs", [("ar", "140M", 50), ("mdm", "425M", 500)])
def test_the_published_recipe_is_the_published_system_field_by_field(objective, size, epochs):
    flags = ["--recipe", "published", "--model-size", size, "--train-epochs", str(epochs), *FILES]
    config = parse(objective, flags)
    settings = values(config)
    expected = SCRIPT | ASSUMED | ({} if objective == "mdm" else {"mask_times": "stratified"})  # AR has no use for it
    if size == "425M":
        expected |= {"num_layers": 18, "hidden_size": 1280, "num_attention_heads": 10, "kv_channels": 128}
    assert {name: settings[name] for name in expected} == expected
    assert set(settings) == set(expected) | OURS  # no field is forgotten
    plan = resolve(config, Vocabulary(50257), UNIQUE_TOKENS["100M"], capabilities(config.objective.objective))
    samples = {50: 2_440_244, 500: 24_402_441}[epochs]
    assert (plan.train_samples, plan.lr_decay_samples, plan.lr_warmup_samples) == (samples, samples, samples // 100)
    assert config.optimizer.final_lr == pytest.approx(2e-5)  # a tenth of the peak
    assert plan.steps == -(-samples // 256) and config.model.mlp_size == {"140M": 2048, "425M": 3392}[size]
    assert Vocabulary(50257).padded_size == 50304 and Vocabulary(50257).mask_id == 50257


def test_the_default_recipe_is_what_the_sections_say():
    flags = ["--model-size", "140M", "--train-epochs", "1"]
    assert RECIPES["default"] == {}
    assert parse("ar", [*flags, "--recipe", "default"]) == parse("ar", flags)
    settings = values(parse("ar", flags))
    dropouts = ("attention_dropout", "hidden_dropout", "embedding_dropout", "mlp_dropout")
    assert not any(settings[name] for name in dropouts)
    assert (settings["epoch_order"], settings["mask_times"]) == ("documents", "stratified")


def test_a_flag_replaces_those_of_a_recipe_that_exclude_it():
    recipe = "--recipe data-constrained --model-size 140M --tokenizer-type ByteTokenizer"
    for flag in ("token_dropout", "masked_input_weight"):
        objective = parse("ar", [*recipe.split(), f"--{flag.replace('_', '-')}", "0.1"]).objective
        assert getattr(objective, flag) == 0.1 and objective.token_dropout_max == 0
    assert parse("ar", recipe.split()).objective.token_dropout_max == 0.39
    schedule = "--weight-decay-incr-style linear --start-weight-decay 1 --end-weight-decay 2"
    optimizer = parse("ar", [*recipe.split(), *schedule.split()]).optimizer
    assert (optimizer.start_weight_decay, optimizer.end_weight_decay) == (1, 2)


def test_every_flag_wins_over_a_recipe():
    flags = ["--recipe", "published", "--model-size", "140M", "--tokenizer-type", "ByteTokenizer"]
    config = parse("ar", [*flags, "--hidden-dropout", "0", "--no-softmax-over-padding", "--fp32", "--num-mc", "3"])
    assert config.model.hidden_dropout == 0 and config.model.attention_dropout == 0.1
    assert config.training.fp32 and config.training.bf16 is None and not config.model.softmax_over_padding
    assert config.validation.num_mc == 3
    assert parse("ar", [*flags, "--lr-decay-style", "constant"]).optimizer.lr_decay_style == "constant"
    assert parse("ar", [*flags, "--eval-iters", "2", "--global-batch-size", "8"]).validation.eval_samples == 16
    assert parse("ar", [*flags, "--eval-iters", "2"]).validation.eval_samples == 512


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_help_shows_the_defaults_of_the_recipe(objective, capsys):
    shown = {}
    for recipe in RECIPES:
        with pytest.raises(SystemExit) as left:
            parse(objective, ["--help", "--recipe", recipe])
        assert left.value.code == 0
        shown[recipe] = " ".join(capsys.readouterr().out.split())
    published = "dropout of attention probabilities (in [0, 1); default: 0.1)"
    assert published in shown["published"] and published not in shown["default"]
    assert "(default: megatron)" in shown["published"] and "(default: documents)" in shown["default"]
    assert "steps between checkpoints; default --eval-interval (positive; default: 1000)" in shown["published"]


def test_every_name_of_a_recipe_is_a_field():
    of_objectives = [settings for recipe in BY_OBJECTIVE.values() for settings in recipe.values()]
    for settings in [*RECIPES.values(), *of_objectives]:
        assert set(settings) <= set(values(parse("ar", ["--model-size", "7M"])))
    with pytest.raises(ConfigurationError, match="--recipe mine: is not one of default, published, data-constrained"):
        parse("ar", ["--model-size", "7M", "--recipe", "mine"])


def test_the_data_constrained_recipe_is_that_of_the_study():
    """Its settings are those of the trials that the study chose, to two digits; others get what both share."""
    with (ROOT / "results" / "study" / "study.csv").open() as file:
        chosen = {row["variant"]: row for row in csv.DictReader(file) if row["stage"] == "headline"}
    flags = ["--model-size", "7M", "--recipe", "data-constrained"]
    for objective, variant in (("ar", "ar_dropout"), ("mdm", "mdm")):
        settings = values(parse(objective, flags))
        assert (settings["optimizer"], settings["lr_decay_style"]) == ("muon", "WSD")
        for flag in ("lr", "weight-decay", "token-dropout-max", "mlp-dropout"):
            expected = float(chosen[variant][flag] or 0)
            assert settings[flag.replace("-", "_")] == pytest.approx(expected, rel=0.03)
    own = values(parse("ar", [*flags, "--objective", "any-order"]))
    assert own["lr"] == values(parse("ar", ["--model-size", "7M"]))["lr"] and own["optimizer"] == "muon"
