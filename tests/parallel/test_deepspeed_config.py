"""A DeepSpeed file and the flags: they agree, or one line names both."""

import codecs
import json
import logging
from types import SimpleNamespace

import pytest

from megatron.config.sections import OptimizerConfig
from megatron.errors import ConfigurationError
from megatron.parallel.deepspeed_config import deepspeed_config

TRAINING = SimpleNamespace(micro_batch_size=4, global_batch_size=32)
PUBLISHED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 2000,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
    "bf16": {"enabled": True},
}


def reconcile(folder, file, *, bf16=True, zero_stage=None, cpu_offload=False, **optimizer) -> dict:
    path = None
    if file is not None:
        path = folder / "ds.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
    options = {"world_size": 2, "bf16": bf16, "zero_stage": zero_stage, "cpu_offload": cpu_offload}
    return deepspeed_config(path and str(path), TRAINING, OptimizerConfig(**optimizer), **options)


def test_without_a_file_the_flags_say_all(tmp_path):
    settings = reconcile(tmp_path, None, zero_stage=2, clip_grad=0.5)
    assert settings == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert reconcile(tmp_path, None)["zero_optimization"] == {"stage": 1}


def test_a_file_that_repeats_the_flags_changes_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert reconcile(tmp_path, PUBLISHED) == reconcile(tmp_path, None, zero_stage=0)
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["steps_per_print has no effect"]


def test_auto_and_what_is_switched_off_ask_for_nothing(tmp_path):
    file = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "tensorboard": {"enabled": False, "job_name": "x"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"reduce_bucket_size": "auto", "zero_quantized_weights": False, "compute_grad_norm": True},
    }
    assert reconcile(tmp_path, file) == reconcile(tmp_path, None)


def test_what_only_deepspeed_knows_is_passed_on(tmp_path):
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "overlap_comm": True}
    settings = reconcile(tmp_path, {"zero_optimization": section | {"reduce_bucket_size": 5e6}}, zero_stage=2)
    assert settings["zero_optimization"] == section | {"reduce_bucket_size": 5e6, "stage": 2}
    none = {"zero_optimization": {"offload_param": {"device": "none"}}}
    assert reconcile(tmp_path, none, zero_stage=3)["zero_optimization"]["offload_param"] == {"device": "none"}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("device", ["cpu", "nvme", "none"])
def test_parameters_are_offloaded_at_stage_3_only_as_deepspeed_does(stage, device, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    section = {"stage": stage, "offload_param": {"device": device, "pin_memory": True, "buffer_count": 5}}
    assert reconcile(tmp_path, {"zero_optimization": section})["zero_optimization"] == {"stage": stage}
    line = f"zero_optimization.offload_param.device has no effect at ZeRO stage {stage}, only at 3"
    assert [record.message.partition(": ")[2] for record in caplog.records] == ([line] if device != "none" else [])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_is_offload_optimizer_and_agrees_with_the_file(stage, tmp_path):
    pinned = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    settings = reconcile(tmp_path, pinned, cpu_offload=True)["zero_optimization"]
    assert settings == pinned["zero_optimization"]
    for file in (None, {"zero_optimization": {"stage": stage}}):
        settings = reconcile(tmp_path, file, zero_stage=stage, cpu_offload=True)["zero_optimization"]
        assert settings == {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    none = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}}}
    with pytest.raises(ConfigurationError, match='offload_optimizer.device "none" contradicts --cpu-offload; let them'):
        reconcile(tmp_path, none, cpu_offload=True)


@pytest.mark.parametrize(
    "file, options, message",
    [
        ({"train_batch_size": 64}, {}, "train_batch_size 64 contradicts --global-batch-size 32"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            "train_micro_batch_size_per_gpu 8 contradicts --micro-batch-size 4",
        ),
        ({"gradient_accumulation_steps": 8}, {}, "gradient_accumulation_steps 8 contradicts --global-batch-size 32, "),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping 0.5 contradicts --clip-grad 1.0"),
        (
            {"zero_optimization": {"stage": 1}},
            {"zero_stage": 2},
            "zero_optimization.stage 1 contradicts --zero-stage 2",
        ),
        ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage 4 is not a ZeRO stage; give 0, 1, 2 or 3"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled false contradicts computing in bf16 (--bf16)"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, "bf16.enabled true contradicts computing in fp32 (--fp32)"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled true contradicts computing in bf16 (--bf16)"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, 'grad_accum_dtype "bf16" contradicts the rule'),
        ({"communication_data_type": "bf16"}, {}, 'communication_data_type "bf16" contradicts the rule'),
        ({"optimizer": {"type": "Lamb"}}, {}, 'optimizer.type "Lamb" contradicts AdamW'),
        ({"optimizer": {"params": {"lr": 1e-3}}}, {}, "optimizer.params.lr 0.001 contradicts --lr 0.0002"),
        ({"optimizer": {"params": {"weight_decay": 0.2}}}, {}, "weight_decay 0.2 contradicts --weight-decay 0.1"),
        (
            {"optimizer": {"params": {"weight_decay": 0.1}}},
            {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1, "end_weight_decay": 0.2},
            "weight_decay 0.1 contradicts --weight-decay-incr-style linear",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            {},
            "betas [0.9, 0.999] contradicts --adam-beta1 0.9 --adam-beta2 0.95",
        ),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, {}, "adam_w_mode false contradicts AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, 'scheduler.type "WarmupLR" is not supported: the learning rate'),
        ({"tensorboard": {"enabled": True}}, {}, "give --tensorboard-dir or --wandb-project; leave it out"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, {}, "it changes what is computed"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            {},
            'DeepSpeed has replaced it by offload_optimizer {"device": "cpu"}; leave it out',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            {},
            'zero_optimization.offload_optimizer.device "nvme" is not supported; give "cpu" or "none"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            'zero_optimization.offload_param.device "nvme" is not supported; give "cpu" or "none"',
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {},
            "needs ZeRO stage 1 at least, and the stage is 0; set zero_optimization.stage and --zero-stage to 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            {},
            "zero_optimization.offload_optimizer.ratio 0.5 is not supported",
        ),
        ({"zero_optimization": {"round_robin_gradients": True}}, {}, "mistakes one parameter for another"),
        ({"zero_optimization": {"compute_grad_norm": False}}, {}, "the gradient norm is always recorded"),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}},
            {},
            "bf16.check_grad_overflow false is not supported: updates that are not finite are skipped; leave it out",
        ),
        ({"bfloat16": {"check_grad_overflow": False}}, {}, "bfloat16.check_grad_overflow false is not supported: upd"),
        ({"curriculum_learning": {"enabled": True}}, {}, "curriculum_learning.enabled true is not supported"),
        ({"zero_optimisation": {"stage": 1}}, {}, "zero_optimisation.stage 1 is not supported; leave it out"),
        ("{", {}, "is not JSON"),
        ("[]", {}, "is not a JSON object"),
    ],
)
def test_a_contradiction_is_refused_in_one_line_that_names_both(file, options, message, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        reconcile(tmp_path, file, **options)
    line = str(error.value)
    assert message in line and line.startswith(f"--deepspeed-config {tmp_path}/ds.json: ") and "\n" not in line


CONTRADICTIONS = [
    ({"train_batch_size": 64, "gradient_clipping": 1.0}, {}),
    ({"gradient_accumulation_steps": 8}, {}),
    ({"zero_optimization": {"stage": 1}}, {"zero_stage": 2}),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, {}),
    ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, {"cpu_offload": True}),
    ({"zero_optimization": {"cpu_offload": True, "overlap_comm": True}}, {}),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, {}),
    ({"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"}, {}),
    ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, {}),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, {}),
    ({"tensorboard": {"enabled": True}}, {}),
    ({"curriculum_learning": {"enabled": True}}, {}),
]


@pytest.mark.parametrize("file, options", CONTRADICTIONS)
def test_a_file_that_leaves_out_what_is_refused_is_accepted(file, options, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        reconcile(tmp_path, file, **options)
    line = str(error.value)
    assert "leave it out" in line or "leave one out" in line or "leave out" in line
    *parents, name = line.partition("ds.json: ")[2].split()[0].split(".")
    section = file
    for parent in parents:
        section = section[parent]
    del section[name]
    reconcile(tmp_path, file, **options)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "ds.json").write_bytes(codecs.BOM_UTF8 + b'{"zero_optimization": {"stage": 2}}')
    settings = deepspeed_config(
        str(tmp_path / "ds.json"), TRAINING, OptimizerConfig(), world_size=1, bf16=False, zero_stage=None
    )
    assert settings["zero_optimization"]["stage"] == 2


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="^--deepspeed-config .*/none.json: No such file or directory; name a"):
        deepspeed_config(
            str(tmp_path / "none.json"), TRAINING, OptimizerConfig(), world_size=1, bf16=False, zero_stage=None
        )
