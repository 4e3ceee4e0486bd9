"""Learning rate and weight decay as functions of samples."""

import math

from megatron.config.resolve import Plan
from megatron.config.sections import OptimizerConfig


def learning_rate(config: OptimizerConfig, plan: Plan, samples: int) -> float:
    """Return the rate of the step that ends at `samples` consumed samples.

    Megatron takes the samples before the step: its step k + 1 has the rate of our step k, and its first step 0.

    Linear from 0 over the warm-up, then the chosen shape down to the final rate at `lr_decay_samples`,
    and the final rate after that. WSD (2404.06395) stays at the peak and decays linearly at the end;
    "constant" never leaves the peak.
    """
    if samples < plan.lr_warmup_samples:
        return config.lr * samples / plan.lr_warmup_samples
    if config.lr_decay_style == "constant":
        return config.lr
    start = plan.lr_warmup_samples
    if config.lr_decay_style == "WSD":
        start = max(start, plan.lr_decay_samples - plan.lr_wsd_decay_samples)
    done = min(1.0, max(0.0, (samples - start) / max(1, plan.lr_decay_samples - start)))
    left = (1 + math.cos(math.pi * done)) / 2 if config.lr_decay_style == "cosine" else 1 - done
    return config.final_lr + (config.lr - config.final_lr) * left


def weight_decay(config: OptimizerConfig, plan: Plan, samples: int) -> float:
    """Return the weight decay of the step that ends at `samples` consumed samples.

    It is constant, or goes from its start to its end over the whole budget, on a line or on half a cosine, as
    Megatron's does.
    """
    if config.weight_decay_incr_style == "constant":
        return config.weight_decay
    done = min(1.0, samples / plan.train_samples)
    if config.weight_decay_incr_style == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return config.start_weight_decay + (config.end_weight_decay - config.start_weight_decay) * done
