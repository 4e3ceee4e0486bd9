"""Mask sets and weights that estimate the masked-diffusion bound of a continuation.

For a continuation of n tokens let m(S) be the mean NLL, in nats, of a set S of tokens when all of S is masked and the
others are visible. The bound on the negative log-likelihood is the sum over levels k = 1..n of the mean of m(S) over
the sets of k tokens. It equals the mean, over all orders of the tokens, of the negative log of the chain rule
(2406.07524, 2502.09992). A design is a list of sets with weights; its weighted sum of m is an unbiased estimate of the
bound over the levels that it covers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Design:
    """R masks over n tokens, and the weight of the mean NLL of each; weights sum to the number of levels covered."""

    masked: np.ndarray  # [R, n] bool
    weights: np.ndarray  # [R]


def exhaustive_design(n: int) -> Design:
    """Return all 2**n - 1 non-empty masks; their weighted sum is the exact bound."""
    masked = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    sizes = masked.sum(1)
    return Design(masked, 1 / np.bincount(sizes)[sizes])


def full_mask(n: int) -> Design:
    """Return the single mask of level n, all tokens masked, which is exact for its level."""
    return Design(np.ones((1, n), bool), np.ones(1))


def balanced_design(n: int, samples: int, shift: float, ranks: np.ndarray) -> Design:
    """Return a random design of `samples` masks over levels 1..n-1, unbiased for `shift` uniform on [0, 1).

    `ranks` [n] is a uniformly random permutation of the tokens. Three steps lower the variance:

    1. Stratification. Levels are cut into strata of one mask each, or a level gets several masks where there are
       enough. Levels of few masked tokens get more of them, since a mean of few values is noisy.
    2. Antithetic positions. The level within a stratum is taken at `shift` and at 1 - `shift` alternately, so that
       terms linear in the level cancel.
    3. Balance. Each mask covers the tokens with the least total weight so far, so that all tokens count about equally
       and the difficulty of single tokens cancels. `ranks` assigns the tokens to this plan at random.
    """
    sizes, weights = _levels(n, samples, shift)
    order = np.argsort(-weights / sizes, kind="stable")
    token_weights = np.zeros(n)
    masked = np.zeros((samples, n), bool)
    for sample in order:
        least = np.argsort(token_weights, kind="stable")[: sizes[sample]]
        masked[sample, least] = True
        token_weights[least] += weights[sample] / sizes[sample]
    return Design(masked[:, ranks], weights)


def _levels(n: int, samples: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of masked tokens of each sample, in 1..n-1, and the number of levels that it stands for."""
    levels = np.arange(1, n)
    noise = np.sqrt((n - levels) / levels)  # standard error of the mean of k of n values, up to a factor
    share = samples * noise / noise.sum()
    if samples >= n - 1:
        counts = _rounded(1 + (samples - n + 1) * noise / noise.sum(), samples)
        return np.repeat(levels, counts), np.repeat(1 / counts, counts)
    heights = np.cumsum(share)
    ends = np.searchsorted(heights, np.arange(1, samples) - 1e-9) + 1  # of all strata but the last
    # every stratum has at least one level: first from the left, then from the right
    ends = np.maximum.accumulate(ends - np.arange(1, samples)) + np.arange(1, samples)
    ends = np.minimum(ends, n - 1 - np.arange(samples - 1, 0, -1))
    ends = np.concatenate([[0], ends, [n - 1]])
    lengths = np.diff(ends)
    fractions = np.where(np.arange(samples) % 2, 1 - shift, shift)
    offsets = np.minimum((fractions * lengths).astype(int), lengths - 1)
    return 1 + ends[:-1] + offsets, lengths.astype(float)


def _rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """Return integers that sum to `total`, each the share rounded down or up."""
    counts = np.floor(shares + 1e-9).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts
