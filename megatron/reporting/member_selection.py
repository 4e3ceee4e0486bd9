"""Greedy selection of the members of an ensemble, by the loss of the averaged probabilities on a set of its own.

1. The NLL of every scored token under every candidate is computed once and stored in host memory.
2. The best candidate is the first member. Then the candidate is added with which the mean of the probabilities has the
   lowest loss, until there are enough (forward selection, Caruana et al., ICML 2004, each candidate at most once). This
   needs no forward pass.
3. The ensemble is evaluated on the other validation sets: on the set of the selection its loss is too low.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext
from megatron.training.datasets import Sources
from megatron.validation.evaluate import ValidationSet


@dataclass(frozen=True)
class Selection:
    """How many members are selected, and on which validation set; None is the first one."""

    size: int
    set_name: str | None = None

    def split(self, sources: Sources, candidates: int) -> tuple[ValidationSet, list[ValidationSet]]:
        """Return the set of the selection, and the others, on which the ensemble is reported.

        Raises: ConfigurationError where there are too few candidates, there is no such set, or no other text.
        """
        sets = {data.name: data for data in sources.validation}
        name = self.set_name or next(iter(sets))
        if not 1 <= self.size <= candidates:
            raise ConfigurationError(f"--select {self.size}: there are {candidates} members; give 1 to {candidates}")
        if name not in sets:
            raise ConfigurationError(f"--select-on {name}: is no validation set; give one of {', '.join(sets)}")
        others = [data for data in sources.validation if data.name != name]
        same = [data.name for data in others if sources.fingerprints[data.name] == sources.fingerprints[name]]
        if same or not others:
            reason = f"is the same text as {same[0]}" if same else "is the only validation set"
            raise ConfigurationError(
                f"--select-on {name}: {reason}, and an ensemble is not reported on the text that selects its members; "
                "give another set with --valid-data-path"
            )
        return sets[name], others


def select_greedily(
    nll: np.ndarray, weights: np.ndarray, size: int, ranks: ParallelContext
) -> tuple[list[int], list[float]]:
    """Return the indices of `size` of K candidates in the order of their selection, and the nats of the first 1, 2, ...

    `nll` [K, T] and `weights` [T] are those of this rank's scored tokens. A collective call, the same on all ranks.
    """
    together = np.full(len(weights), -np.inf)  # [T], log of the sum of the members' probabilities
    selected: list[int] = []
    nats: list[float] = []
    counted = weights.astype(np.float64) * ranks.is_loss_rank  # several ranks have the same tokens
    while len(selected) < size:
        candidates = [index for index in range(len(nll)) if index not in selected]
        log_size = math.log(len(selected) + 1)
        sums = ranks.sum(*[float(counted @ (log_size - np.logaddexp(together, -nll[i]))) for i in candidates])
        best = int(np.argmin(sums))
        selected.append(candidates[best])
        nats.append(sums[best])
        together = np.logaddexp(together, -nll[selected[-1]])
    return selected, nats
