"""Reconciles a DeepSpeed configuration file with the flags.

Settings that only DeepSpeed has (buckets, overlap, offload) come from the file, all others from the flags, and where
the file repeats a flag the two must agree. No key is ignored silently: it is used, logged as having no effect, or
refused with the reason.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron.config.flags import typed
from megatron.config.sections import OptimizerConfig, TrainingConfig
from megatron.errors import ConfigurationError

logger = logging.getLogger(__name__)

ZERO = "zero_optimization."
OFFLOAD_OPTIMIZER, OFFLOAD_PARAM = ZERO + "offload_optimizer.device", ZERO + "offload_param."
# Keys without effect: logging and profiling, and settings that DeepSpeed gets from here in any case.
NO_OP = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "dataloader_drop_last",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "optimizer.params.torch_adam",
    "optimizer.params.fused", "prescale_gradients",
}  # fmt: skip
TRACKERS = "metrics have their own trackers; give --tensorboard-dir or --wandb-project"
REFUSED = {
    "scheduler": "the learning rate follows --lr-decay-style and its flags",
    "fp16": "training computes in bf16 or fp32",
    "amp": "training computes in bf16 or fp32",
    "tensorboard": TRACKERS,
    "wandb": TRACKERS,
    "csv_monitor": TRACKERS,
    "comet": TRACKERS,
    "activation_checkpointing": "activation checkpointing is PyTorch's here",
    "bf16.check_grad_overflow": "updates that are not finite are skipped",
    "bfloat16.check_grad_overflow": "updates that are not finite are skipped",
    "gradient_allreduce_op": "gradients are averaged, and the loss is scaled accordingly",
    ZERO + "zero_quantized_weights": "it changes what is computed",
    ZERO + "zero_quantized_nontrainable_weights": "it changes what is computed",
    ZERO + "zero_quantized_gradients": "it changes what is computed",
    ZERO + "zenflow": "it changes what is computed",
    # link_hp_params gets the parameters in another order than that of the flat buffer (DeepSpeed 0.19.8)
    ZERO + "round_robin_gradients": "with it DeepSpeed mistakes one parameter for another when they are read by name",
    ZERO + "compute_grad_norm": "the gradient norm is always recorded",
    ZERO + "zero_hpz_partition_size": "it is not tested here",
    ZERO + "elastic_checkpoint": "checkpoints are not DeepSpeed's, and load at any world size",
    ZERO + "legacy_stage1": "DeepSpeed has removed it",
    ZERO + "cpu_offload": 'DeepSpeed has replaced it by offload_optimizer {"device": "cpu"}',
    ZERO + "cpu_offload_param": 'DeepSpeed has replaced it by offload_param {"device": "cpu"}',
    ZERO + "offload_optimizer.ratio": "the optimizer is offloaded entirely or not at all",
    ZERO + "offload_optimizer.super_offload": "it changes the optimizer",
}
# values that leave a refused key off, where that is not false
OFF = {
    "bf16.check_grad_overflow": True,
    "bfloat16.check_grad_overflow": True,
    ZERO + "compute_grad_norm": True,
    ZERO + "offload_optimizer.ratio": 1.0,
    ZERO + "zero_hpz_partition_size": 1,
}


def deepspeed_config(
    path: str | None,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    *,
    world_size: int | None,
    bf16: bool | None,
    zero_stage: int | None,
    cpu_offload: bool = False,
) -> dict:
    """Return DeepSpeed's configuration: the file at `path`, which may be None, reconciled with the flags.

    `world_size` or `bf16` is None in a check before it is known; it then agrees with the file. `zero_stage` is
    --zero-stage, None if it was not given, and `cpu_offload` is --cpu-offload.

    Raises: ConfigurationError for a contradiction.
    """
    file_values = dict(_flat(_read(path))) if path else {}

    def agree(key: str, value, flag: str):
        """Remove a key from the file's values; return the flag's `value`, which it must equal if present."""
        file_value = file_values.pop(key, value)
        if file_value != value:
            raise ConfigurationError(
                f"--deepspeed-config {path}: {key} {json.dumps(file_value)} contradicts {flag}; "
                "let them agree, or leave it out"
            )
        return value

    micro_batch, global_batch = training.micro_batch_size, training.global_batch_size
    steps = file_values.get("gradient_accumulation_steps", 1)
    if world_size:
        steps = max(1, global_batch // (micro_batch * world_size))
    if bf16 is None:
        bf16 = file_values.get("bf16.enabled", file_values.get("bfloat16.enabled", True)) is True
    sizes = f"--global-batch-size {global_batch}, --micro-batch-size {micro_batch} and {world_size} ranks"
    agree("train_batch_size", global_batch, f"--global-batch-size {global_batch}")
    settings = {
        "train_micro_batch_size_per_gpu": agree(
            "train_micro_batch_size_per_gpu", micro_batch, typed("micro_batch_size", micro_batch)
        ),
        "gradient_accumulation_steps": agree("gradient_accumulation_steps", steps, f"{sizes}, which make it {steps}"),
        "gradient_clipping": agree("gradient_clipping", optimizer.clip_grad, typed("clip_grad", optimizer.clip_grad)),
    }
    settings |= _precision(agree, bf16)
    _check_optimizer(agree, path, file_values, optimizer)
    if cpu_offload:
        file_values[OFFLOAD_OPTIMIZER] = agree(OFFLOAD_OPTIMIZER, "cpu", "--cpu-offload")
    zero = _zero(path, file_values, zero_stage)
    for key, value in file_values.items():
        _log_or_refuse(path, key, value)
    # our own AdamW updates DeepSpeed's partitions, on the CPU too, so that DeepSpeed compiles no optimizer
    return settings | {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _precision(agree, bf16: bool) -> dict:
    """Return the dtypes: bf16 with fp32 master weights, or fp32; gradients are accumulated and reduced in fp32."""
    computing = "computing in bf16 (--bf16)" if bf16 else "computing in fp32 (--fp32)"
    settings = {"bf16": {"enabled": agree("bf16.enabled", bf16, computing)}}
    agree("bfloat16.enabled", bf16, computing)
    agree("fp16.enabled", False, computing)
    summing = "the rule that gradients are summed in fp32"
    settings["data_types"] = {"grad_accum_dtype": agree("data_types.grad_accum_dtype", "fp32", summing)}
    return settings | {"communication_data_type": agree("communication_data_type", "fp32", summing)}


def _check_optimizer(agree, path: str | None, file_values: dict, optimizer: OptimizerConfig) -> None:
    """Check that an optimizer section describes the AdamW of the flags."""
    kind = file_values.pop("optimizer.type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        raise ConfigurationError(
            f"--deepspeed-config {path}: optimizer.type {json.dumps(kind)} contradicts AdamW, the only optimizer that "
            "DeepSpeed runs here; leave it out"
        )
    for name, field in {"lr": "lr", "eps": "adam_eps"}.items():
        value = getattr(optimizer, field)
        agree(f"optimizer.params.{name}", value, typed(field, value))
    style, decay = optimizer.weight_decay_incr_style, optimizer.weight_decay
    if style == "constant":
        agree("optimizer.params.weight_decay", decay, typed("weight_decay", decay))
    else:  # the schedule sets it at every step, and the file has no key for that
        agree("optimizer.params.weight_decay", None, typed("weight_decay_incr_style", style))
    betas = [optimizer.adam_beta1, optimizer.adam_beta2]
    agree("optimizer.params.betas", betas, f"--adam-beta1 {betas[0]} --adam-beta2 {betas[1]}")
    for name in ("adam_w_mode", "bias_correction"):
        agree(f"optimizer.params.{name}", True, "AdamW, the only optimizer here with DeepSpeed")


def _zero(path: str | None, file_values: dict, zero_stage: int | None) -> dict:
    """Return DeepSpeed's section zero_optimization, with its stage; `zero_stage` is --zero-stage."""
    stage = file_values.pop(ZERO + "stage", None)
    if stage is not None and (isinstance(stage, bool) or stage not in range(4)):
        raise ConfigurationError(
            f"--deepspeed-config {path}: zero_optimization.stage {json.dumps(stage)} is not a ZeRO stage; "
            "give 0, 1, 2 or 3"
        )
    if None not in (stage, zero_stage) and stage != zero_stage:
        raise ConfigurationError(
            f"--deepspeed-config {path}: zero_optimization.stage {stage} contradicts "
            f"{typed('zero_stage', zero_stage)}; let them agree, or leave one out"
        )
    stage = next((number for number in (stage, zero_stage) if number is not None), 1)
    section: dict = {"stage": stage}
    for key in [key for key in file_values if key.startswith(ZERO)]:
        value = file_values.pop(key)
        if key in REFUSED:
            _log_or_refuse(path, key, value)
            continue
        if key.startswith(OFFLOAD_PARAM) and stage < 3:
            if key == OFFLOAD_PARAM + "device" and value != "none":
                logger.info("--deepspeed-config %s: %s has no effect at ZeRO stage %d, only at 3", path, key, stage)
            continue
        _check_offload(path, key, value, stage)
        *parents, name = key.removeprefix(ZERO).split(".")
        subsection = section
        for parent in parents:
            subsection = subsection.setdefault(parent, {})
        subsection[name] = value
    return section


def _check_offload(path: str | None, key: str, value, stage: int) -> None:
    """Check that the device of an offload is the CPU, and that the ZeRO stage has something to offload."""
    if key not in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM + "device") or value in (None, "none"):
        return
    if value != "cpu":
        raise ConfigurationError(
            f'--deepspeed-config {path}: {key} {json.dumps(value)} is not supported; give "cpu" or "none"'
        )
    if stage == 0:
        raise ConfigurationError(
            f'--deepspeed-config {path}: {key} "cpu" needs ZeRO stage 1 at least, and the stage is 0; set '
            "zero_optimization.stage and --zero-stage to 1, or leave out offload_optimizer and --cpu-offload"
        )


def _log_or_refuse(path: str | None, key: str, value) -> None:
    """Log a key without effect, accept a refused key that is off, and refuse all others."""
    if key in NO_OP:
        logger.info("--deepspeed-config %s: %s has no effect", path, key)
        return
    prefixes = [key[:end] for end, letter in enumerate(key + ".") if letter == "."]
    reason = next((REFUSED[prefix] for prefix in prefixes if prefix in REFUSED), None)
    if reason and value == OFF.get(key, False):
        return
    raise ConfigurationError(
        f"--deepspeed-config {path}: {key} {json.dumps(value)} is not supported{f': {reason}' if reason else ''}; "
        "leave it out"
    )


def _read(path: str) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"--deepspeed-config {path}: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigurationError(f"--deepspeed-config {path}: is not JSON ({error}); fix it") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"--deepspeed-config {path}: is not a JSON object; write DeepSpeed's keys in {{...}}")
    return values


def _flat(section: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of every setting of a file, except "auto", null and sections that are not enabled."""
    for name, value in section.items():
        if not isinstance(value, dict):
            if value not in ("auto", None):
                yield prefix + name, value
        elif value.get("enabled", True) is True or name in ("bf16", "bfloat16"):
            yield from _flat(value, f"{prefix}{name}.")
