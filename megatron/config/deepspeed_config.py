"""A DeepSpeed configuration file beside the flags: both may say a thing, but not two things.

What only DeepSpeed knows (buckets, overlap, offload) comes from the file, the rest from the flags, and where the
file repeats a flag the two must agree. No key is passed over in silence: one is used, has no effect, which a line
says, or is refused with the reason.
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
# What a file may hold and nothing here reads: what is said and measured, and what DeepSpeed must be told anyway.
IDLE = {
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
    "activation_checkpointing": "recomputation is not DeepSpeed's here",
    "gradient_allreduce_op": "gradients are averaged, and the loss is scaled for that",
    ZERO + "zero_quantized_weights": "it changes what is computed",
    ZERO + "zero_quantized_nontrainable_weights": "it changes what is computed",
    ZERO + "zero_quantized_gradients": "it changes what is computed",
    ZERO + "zenflow": "it changes what is computed",
    # link_hp_params is given the parameters in another order than they lie in (DeepSpeed 0.19.8)
    ZERO + "round_robin_gradients": "DeepSpeed mistakes one parameter for another with it when they are read by name",
    ZERO + "compute_grad_norm": "the gradient norm is always recorded",
    ZERO + "zero_hpz_partition_size": "it is not tested here",
    ZERO + "elastic_checkpoint": "checkpoints are not DeepSpeed's, and are read by any number of processes",
    ZERO + "legacy_stage1": "DeepSpeed has removed it",
    ZERO + "cpu_offload": 'DeepSpeed has replaced it by offload_optimizer {"device": "cpu"}',
    ZERO + "cpu_offload_param": 'DeepSpeed has replaced it by offload_param {"device": "cpu"}',
    ZERO + "offload_optimizer.ratio": "all of the optimizer is offloaded or nothing",
    ZERO + "offload_optimizer.super_offload": "it changes the optimizer",
}
# values that ask for nothing, where that is not false
OFF = {
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
    """Return what DeepSpeed is given: the file at `path`, which may be None, reconciled with the flags.

    `processes` or `bf16` is None in a check before it is known: then it agrees with the file. `zero_stage` is
    --zero-stage, None where it was not given, and `cpu_offload` is --cpu-offload.

    Raises: ConfigurationError for a contradiction.
    """
    given = dict(_flat(_read(path))) if path else {}

    def agree(key: str, value, flag: str):
        """Take a key out of the file: it says what the flag says, or nothing."""
        found = given.pop(key, value)
        if found != value:
            raise ConfigurationError(
                f"--deepspeed-config {path}: {key} {json.dumps(found)} contradicts {flag}; "
                "let them agree, or leave it out"
            )
        return value

    micro, whole = training.micro_batch_size, training.global_batch_size
    steps = max(1, whole // (micro * world_size)) if world_size else given.get("gradient_accumulation_steps", 1)
    if bf16 is None:
        bf16 = given.get("bf16.enabled", given.get("bfloat16.enabled", True)) is True
    cut = f"--global-batch-size {whole}, --micro-batch-size {micro} and {world_size} processes, which make it {steps}"
    agree("train_batch_size", whole, f"--global-batch-size {whole}")
    settings = {
        "train_micro_batch_size_per_gpu": agree(
            "train_micro_batch_size_per_gpu", micro, typed("micro_batch_size", micro)
        ),
        "gradient_accumulation_steps": agree("gradient_accumulation_steps", steps, cut),
        "gradient_clipping": agree("gradient_clipping", optimizer.clip_grad, typed("clip_grad", optimizer.clip_grad)),
    }
    settings |= _precision(agree, bf16)
    _check_optimizer(agree, path, given, optimizer)
    if cpu_offload:
        given[OFFLOAD_OPTIMIZER] = agree(OFFLOAD_OPTIMIZER, "cpu", "--cpu-offload")
    zero = _zero(path, given, zero_stage)
    for key, value in given.items():
        _judge(path, key, value)
    # our own AdamW works on DeepSpeed's partitions, on the CPU too: nothing is compiled
    return settings | {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _precision(agree, bf16: bool) -> dict:
    """Return the types: bf16 weights beside fp32 masters, or fp32; gradients are summed and sent in fp32."""
    computing = "computing in bf16 (--bf16)" if bf16 else "computing in fp32 (--fp32)"
    settings = {"bf16": {"enabled": agree("bf16.enabled", bf16, computing)}}
    agree("bfloat16.enabled", bf16, computing)
    agree("fp16.enabled", False, computing)
    summing = "the rule that gradients are summed in fp32"
    settings["data_types"] = {"grad_accum_dtype": agree("data_types.grad_accum_dtype", "fp32", summing)}
    return settings | {"communication_data_type": agree("communication_data_type", "fp32", summing)}


def _check_optimizer(agree, path: str | None, given: dict, optimizer: OptimizerConfig) -> None:
    """Check that an optimizer section describes the AdamW of the flags."""
    kind = given.pop("optimizer.type", "AdamW")
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
    else:  # it is set at every step, and the file has no word for that
        agree("optimizer.params.weight_decay", None, typed("weight_decay_incr_style", style))
    betas = [optimizer.adam_beta1, optimizer.adam_beta2]
    agree("optimizer.params.betas", betas, f"--adam-beta1 {betas[0]} --adam-beta2 {betas[1]}")
    for name in ("adam_w_mode", "bias_correction"):
        agree(f"optimizer.params.{name}", True, "AdamW, the only optimizer here with DeepSpeed")


def _zero(path: str | None, given: dict, asked: int | None) -> dict:
    """Return DeepSpeed's section zero_optimization, the stage settled."""
    stage = given.pop(ZERO + "stage", None)
    if stage is not None and (isinstance(stage, bool) or stage not in range(4)):
        raise ConfigurationError(
            f"--deepspeed-config {path}: zero_optimization.stage {json.dumps(stage)} is none; give 0, 1, 2 or 3"
        )
    if None not in (stage, asked) and stage != asked:
        raise ConfigurationError(
            f"--deepspeed-config {path}: zero_optimization.stage {stage} contradicts {typed('zero_stage', asked)}; "
            "let them agree, or leave one out"
        )
    stage = next((found for found in (stage, asked) if found is not None), 1)
    section = {"stage": stage}
    for key in [key for key in given if key.startswith(ZERO)]:
        value = given.pop(key)
        if key in REFUSED:
            _judge(path, key, value)
            continue
        if key.startswith(OFFLOAD_PARAM) and stage < 3:
            if key == OFFLOAD_PARAM + "device" and value != "none":
                logger.info("--deepspeed-config %s: %s has no effect at ZeRO stage %d, only at 3", path, key, stage)
            continue
        _check_offload(path, key, value, stage)
        *parents, name = key.removeprefix(ZERO).split(".")
        inner = section
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return section


def _check_offload(path: str | None, key: str, value, stage: int) -> None:
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


def _judge(path: str | None, key: str, value) -> None:
    """Say what becomes of a key that is not used, or refuse it."""
    if key in IDLE:
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
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"--deepspeed-config {path}: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigurationError(f"--deepspeed-config {path}: is not JSON ({error}); mend it") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"--deepspeed-config {path}: holds no object; DeepSpeed's keys stand in {{...}}")
    return found


def _flat(section: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of everything that a file asks for: not "auto" or null, nor a section not enabled."""
    for name, value in section.items():
        if not isinstance(value, dict):
            if value not in ("auto", None):
                yield prefix + name, value
        elif value.get("enabled", True) is True or name in ("bf16", "bfloat16"):
            yield from _flat(value, f"{prefix}{name}.")
