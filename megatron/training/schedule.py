"""Learning rate and weight decay as functions of consumed samples."""

import math

from megatron.config.resolve import Plan
from megatron.config.sections import OptimizerConfig


def learning_rate(config: OptimizerConfig, plan: Plan, samples: int) -> float:
    """Return the learning rate of the step that ends at `samples` consumed samples.

    Linear warm-up from 0, then the decay style down to the final rate at `lr_decay_samples`, then the final rate.
    WSD (2404.06395) stays at the peak and decays linearly at the end; "constant" stays at the peak after warm-up;
    "cyclic" is a cosine that restarts at the peak after every cycle (1608.03983).

    Megatron uses the samples before the step: its step k + 1 has the rate of our step k, and its first step rate 0.
    """
    if samples < plan.lr_warmup_samples:
        return config.lr * samples / plan.lr_warmup_samples
    if config.lr_decay_style == "constant":
        return config.lr
    start, end = plan.lr_warmup_samples, plan.lr_decay_samples
    if config.lr_decay_style == "WSD":
        start = max(start, end - plan.lr_wsd_decay_samples)
    if config.lr_decay_style == "cyclic":
        earlier = [cycle_end for cycle_end in plan.lr_cycle_ends[:-1] if cycle_end < samples]
        start, end = max([start, *earlier]), plan.lr_cycle_ends[len(earlier)]
    fraction = min(1.0, max(0.0, (samples - start) / max(1, end - start)))
    factor = (1 + math.cos(math.pi * fraction)) / 2 if config.lr_decay_style in ("cosine", "cyclic") else 1 - fraction
    return config.final_lr + (config.lr - config.final_lr) * factor


def weight_decay(config: OptimizerConfig, plan: Plan, samples: int) -> float:
    """Return the weight decay of the step that ends at `samples` consumed samples.

    It is constant, or increases from start to end value over the whole budget, linearly or along half a cosine, as in
    Megatron.
    """
    if config.weight_decay_incr_style == "constant":
        return config.weight_decay
    fraction = min(1.0, samples / plan.train_samples)
    if config.weight_decay_incr_style == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    start, end = config.start_weight_decay, config.end_weight_decay
    assert start is not None and end is not None
    return start + (end - start) * fraction
