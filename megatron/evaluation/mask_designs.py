"""Which tokens of an answer are hidden, and what each row counts: designs that estimate the masked-diffusion bound.

Of n tokens let m(S) be the mean nll, in nats, of a hidden set S when all of S is hidden and the rest is seen. The bound
of the negative log-likelihood is the sum over k = 1..n of the mean of m(S) over the sets of k tokens; it is the mean,
over all orders of the tokens, of the negative log of the chain rule (2406.07524, 2502.09992). A design is a list of
rows, each a set and a weight, such that the weighted sum of m over them is the bound on average.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Design:
    """R hidden sets of n tokens, and what the mean nll of each counts; the weights add up to the levels covered."""

    hidden: np.ndarray  # [R, n] bool
    weights: np.ndarray  # [R]


def all_sets(n: int) -> Design:
    """Return the design of every hidden set, 2**n - 1 rows, whose weighted sum is the bound itself."""
    hidden = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    sizes = hidden.sum(1)
    return Design(hidden, 1 / np.bincount(sizes)[sizes])


def everything(n: int) -> Design:
    """Return the one row that hides all n tokens: its level holds no other set, so it is known without error."""
    return Design(np.ones((1, n), bool), np.ones(1))


def balanced(n: int, rows: int, shift: float, ranks: np.ndarray) -> Design:
    """Return a random design of `rows` rows over the levels 1..n-1, unbiased for `shift` uniform on [0, 1).

    `ranks` [n] is a uniformly random order of the tokens. Three things keep its variance low. Levels are cut into
    strata that each get one row, or levels get several rows, more of them where few tokens are asked, as a mean of few
    is noisy. The place within a stratum is `shift` and 1 - `shift` in turn, so that what is linear in the level
    cancels. And all rows together count every token about as often: each row hides those that count least so far, so
    that how hard a token is in itself cancels. Which token takes which part in that plan is random.
    """
    sizes, weights = _levels(n, rows, shift)
    order = np.argsort(-weights / sizes, kind="stable")
    counted, hidden = np.zeros(n), np.zeros((rows, n), bool)
    for row in order:
        least = np.argsort(counted, kind="stable")[: sizes[row]]
        hidden[row, least] = True
        counted[least] += weights[row] / sizes[row]
    return Design(hidden[:, ranks], weights)


def _levels(n: int, rows: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens each row hides, in 1..n-1, and how many levels it speaks of."""
    levels = np.arange(1, n)
    noise = np.sqrt((n - levels) / levels)  # the error of the mean of k of n numbers, but for a factor
    share = rows * noise / noise.sum()
    if rows >= n - 1:
        counts = _rounded(1 + (rows - n + 1) * noise / noise.sum(), rows)
        return np.repeat(levels, counts), np.repeat(1 / counts, counts)
    heights = np.cumsum(share)
    ends = np.searchsorted(heights, np.arange(1, rows) - 1e-9) + 1  # of all strata but the last
    ends = np.maximum.accumulate(ends - np.arange(1, rows)) + np.arange(1, rows)  # each holds a level at least,
    ends = np.minimum(ends, n - 1 - np.arange(rows - 1, 0, -1))  # the last ones too
    ends = np.concatenate([[0], ends, [n - 1]])
    lengths = np.diff(ends)
    places = np.where(np.arange(rows) % 2, 1 - shift, shift)
    within = np.minimum((places * lengths).astype(int), lengths - 1)
    return 1 + ends[:-1] + within, lengths.astype(float)


def _rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers that add up to `total`, each the share rounded down or up."""
    counts = np.floor(shares + 1e-9).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts
