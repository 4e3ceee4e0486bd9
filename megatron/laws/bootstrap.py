"""Bootstrap intervals: whole groups of rows are drawn with replacement, and every resample is fitted again."""

import numpy as np
from scipy.stats import norm, t
from tqdm import tqdm

from megatron.laws.fit import Fit
from megatron.laws.optimise import descend
from megatron.randomness import stream

CHUNK = 100  # resamples that are fitted in the same array operations
WARM_STARTS = 2  # distinct optima of the fit from which each resample starts
TOLERANCE = 1e-5  # relative, of a resample's objective


def bootstrap(fit: Fit, resamples: int, *, seed: int = 1, progress: bool = False) -> np.ndarray:
    """Return theta [B, P] of the fits to B resamples of the groups of rows.

    A resample draws as many groups as there are, with replacement (pairs bootstrap, Efron and Tibshirani 1993, section
    9.5; by clusters). It starts from the best optima of the fit, so that it does not repeat the search over the grid.
    """
    groups, rows = np.unique(fit.table.group, return_inverse=True)
    draws = []
    for start in tqdm(range(0, resamples, CHUNK), desc="bootstrap", disable=not progress, leave=False):
        indices = range(start, min(start + CHUNK, resamples))
        counts = np.array(
            [
                np.bincount(
                    stream(seed, "bootstrap", index).integers(len(groups), size=len(groups)), minlength=len(groups)
                )
                for index in indices
            ]
        )
        draws.append(_refit(fit, counts[:, rows].astype(float)))
    return np.concatenate(draws)


def _refit(fit: Fit, weights: np.ndarray) -> np.ndarray:
    """Return theta [S, P] of the fits with row weights [S, R]."""
    best = None
    for optimum in fit.optima[:WARM_STARTS]:
        starts = np.repeat(optimum[None], len(weights), axis=0)
        theta, values = descend(fit.objective, starts, weights=weights, tolerance=TOLERANCE)
        if best is None:
            best = theta, values
        else:
            better = (values < best[1])[:, None]
            best = np.where(better, theta, best[0]), np.minimum(values, best[1])
    assert best is not None
    return best[0]


def interval(draws: np.ndarray, level: float, num_groups: int, num_fitted: int) -> tuple[float, float]:
    """Return the percentile interval of draws [B] at a confidence level, widened for few groups per parameter.

    Plain percentile intervals of small samples are too narrow. Here the percentiles are those of Hesterberg (The
    American Statistician 69, 2015), Phi(-sqrt(n / m) t) in place of (1 - level) / 2, with n groups, m = n - parameters
    and Student's quantile t of m degrees of freedom.
    """
    degrees = max(num_groups - num_fitted, 1)
    tail = norm.cdf(-np.sqrt(num_groups / degrees) * t.ppf((1 + level) / 2, degrees))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
