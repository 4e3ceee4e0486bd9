"""Requests that are being scored, and which choices of a document keep being sampled: successive elimination."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.scoring.batched_forward import Prediction
from megatron.scoring.requests import REPLICATES

Choices = Sequence["PendingRequest"]  # of one document


@dataclass(eq=False)
class PendingRequest:
    """A request that is being scored: its sequence, and what is known of its likelihood so far.

    A sampling round has REPLICATES independent replicates, and each estimates the bound of the whole continuation.
    """

    sequence: np.ndarray  # [T] ids of context and continuation
    start: int  # index of the first token of the continuation
    key: str  # key of its Monte-Carlo noise, the same for all choices of a document
    length: float  # divisor of the length-normalised score
    full_mask: Prediction | None = None  # predictions where the whole continuation is masked
    exact: float | None = None  # nats, where there are no sampling rounds
    error: float = 0.0  # standard error of `exact`
    rounds: list[np.ndarray] = field(default_factory=list)  # [REPLICATES] nats each
    round_sizes: list[int] = field(default_factory=list)  # samples of each round
    mean_nll: dict[bytes, float] = field(default_factory=dict)  # by mask, where the continuation is short
    greedy: bool | None = None
    samples: int = 0
    forward_tokens: float = 0.0

    @property
    def size(self) -> int:
        """The number of tokens of the continuation."""
        return len(self.sequence) - self.start

    def replicates(self, rounds: int) -> np.ndarray:
        """Return the nats of the first rounds, [rounds, REPLICATES]; constant where the value is exact."""
        if self.exact is not None:
            return np.full((rounds, REPLICATES), self.exact)
        return np.array(self.rounds[:rounds])


def combine_rounds(replicates: np.ndarray, sizes: Sequence[int]) -> tuple[float, float]:
    """Return the mean of `replicates` [rounds, R], weighted by the sizes of the rounds, and its standard error."""
    share = np.array(sizes) / np.sum(sizes)
    variances = replicates.var(axis=1, ddof=1) / replicates.shape[1]
    return float(share @ replicates.mean(axis=1)), float(np.sqrt(share**2 @ variances))


def undecided(choices: Choices, decide_at: float) -> list[PendingRequest]:
    """Return the choices that may still be the best, or none where the best one is known.

    The best choice has the lowest nats, or nats divided by length; a choice stays where either is undecided. The
    difference of two choices has less noise than each of them, since they share their masks; it is taken over the
    rounds that both have had.
    """
    if len(choices) == 1:
        return list(choices)
    open_choices: list[PendingRequest] = []
    for lengths in ([1.0] * len(choices), [choice.length for choice in choices]):
        values = [_estimate(choice) / length for choice, length in zip(choices, lengths, strict=True)]
        best = int(np.argmin(values))
        contenders = [
            index
            for index in range(len(choices))
            if index != best
            and not _is_worse(
                choices[index], choices[best], lengths=(lengths[index], lengths[best]), decide_at=decide_at
            )
        ]
        if contenders:
            open_choices += [choices[index] for index in [best, *contenders] if choices[index] not in open_choices]
    return open_choices


def _estimate(request: PendingRequest) -> float:
    if request.exact is not None:
        return request.exact
    return combine_rounds(np.array(request.rounds), request.round_sizes)[0]


def _is_worse(choice: PendingRequest, best: PendingRequest, *, lengths: tuple[float, float], decide_at: float) -> bool:
    """Return whether `choice` is worse than `best` by more than `decide_at` standard errors of the difference.

    Their nats are divided by `lengths`.
    """
    if choice.exact is not None and best.exact is not None:
        return True  # no sample can change it
    rounds = min(len(request.rounds) for request in (choice, best) if request.exact is None)
    sizes = (choice if choice.exact is None else best).round_sizes[:rounds]
    differences = choice.replicates(rounds) / lengths[0] - best.replicates(rounds) / lengths[1]
    gap, error = combine_rounds(differences, sizes)
    return gap > decide_at * error
