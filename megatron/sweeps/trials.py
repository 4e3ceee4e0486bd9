"""Quasi-random trials of tuned flags: the points of a scrambled Sobol sequence, mapped to their distributions."""

import math
import warnings
from typing import Any

from scipy.stats import qmc

from megatron.errors import ConfigurationError
from megatron.sweeps.sweep_file import Distribution, Tuning

DIGITS = 6  # significant digits of a value, so that it reads well as a flag
DIMENSIONS = 32  # of the sequence: a flag's values depend on its place among the flags, not on their number


def draw_trials(tuning: Tuning, parameters: dict[str, Distribution]) -> list[dict[str, Any]]:
    """Return the flags of each trial of a variant, which tunes `parameters`.

    The flags that all variants tune come first, so that they have the same values in all of them. Every variant has
    the same number of trials.

    Raises: ConfigurationError for more than DIMENSIONS tuned flags.
    """
    if len(parameters) > DIMENSIONS:
        raise ConfigurationError(
            f"tuning.parameters: {len(parameters)} flags; at most {DIMENSIONS} are tuned at a time"
        )
    sampler = qmc.Sobol(DIMENSIONS, scramble=True, rng=tuning.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The balance properties of Sobol")  # of numbers that are no power of two
        points = sampler.random(tuning.trials)  # [trials, DIMENSIONS]
    return [
        {
            name: _value(distribution, share)
            for (name, distribution), share in zip(parameters.items(), point, strict=False)
        }
        for point in points.tolist()
    ]


def _value(distribution: Distribution, share: float) -> Any:
    """Return the value at a `share` in [0, 1) of the distribution's probability."""
    low, high = distribution.low, distribution.high
    if distribution.kind == "categorical":
        return distribution.values[int(share * len(distribution.values))]
    if distribution.kind == "int_uniform":
        return int(low) + int(share * (int(high) - int(low) + 1))
    if distribution.kind == "log_uniform_values":
        return float(f"{low * math.exp(share * math.log(high / low)):.{DIGITS}g}")
    return float(f"{low + share * (high - low):.{DIGITS}g}")
