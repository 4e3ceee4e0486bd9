"""Ratios of sums over documents, with standard errors that treat documents as clusters sampled at random.

The loss of a corpus is a ratio estimator: the nats of all documents divided by their tokens (Cochran, Sampling
Techniques, 1977, section 6.3).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums over clusters."""

    value: float
    standard_error: float | None  # over clusters; None where there is only one


def clustered_ratio(sums: np.ndarray, sizes: np.ndarray) -> Ratio:
    """Return sum(sums) / sum(sizes) over D clusters, and its standard error.

    `sums` [R, D] are R noise replicates of each cluster's sum, which are averaged, and `sizes` [D] are the sizes of the
    clusters. Clusters of size 0 are not counted.
    """
    value = float((sums.sum(axis=1) / sizes.sum()).mean())
    nonempty = sizes > 0  # [D]
    num_clusters = int(nonempty.sum())
    if num_clusters < 2:
        return Ratio(value, None)
    residuals = sums.mean(axis=0)[nonempty] - value * sizes[nonempty]
    error = np.sqrt(num_clusters / (num_clusters - 1) * (residuals**2).sum()) / sizes.sum()
    return Ratio(value, float(error))


def noise_error(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the standard error over noise of sum(sums) / sum(sizes); None where there is one replicate.

    `sums` [R, D] are independent replicates of the sums over D clusters of `sizes` [D].
    """
    ratios = sums.sum(axis=1) / sizes.sum()  # [R]
    return float(ratios.std(ddof=1) / np.sqrt(len(ratios))) if len(ratios) > 1 else None


def paired_difference(first: np.ndarray, second: np.ndarray, sizes: np.ndarray) -> Ratio:
    """Return the ratio of `first` minus that of `second`, paired by cluster, and its standard error.

    `first` [R1, D] and `second` [R2, D] are sums over the same D clusters, with any number of noise replicates. What
    makes a cluster difficult for both does not enter the error.
    """
    return clustered_ratio((first.mean(axis=0) - second.mean(axis=0))[None], sizes)
