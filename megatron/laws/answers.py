"""What laws answer: the best model size and epochs for a data budget, compute-optimal frontiers, critical compute.

Compute is C = 6 N D: N parameters with the embedding counted once, D training tokens, epochs D / U over U unique tokens
(the convention of budgets and records, docs/checkpoints.md); loops and several passes count as `compute` has it. "At
compute C" means at most C: a run may stop before it overfits. Every search is over a finite range, `Limits`; where a
law still improves at the end of it there is no optimum, and the answer says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron.laws.base import Law
from megatron.laws.table import short

SAME_LOSS = 1e-6  # nats per token; losses closer than this are equal
NEAR_LOSS = 0.01  # nats per token; a loss this close to the lowest is enough
COARSE, FINE = 97, 33  # compute budgets of a frontier: over the whole range, and around a crossing
BEYOND = 1e3  # times the range: where a loss that still falls has no floor
DRAWS = 200  # resamples of an interval


@dataclass(frozen=True)
class Limits:
    """The range of a search."""

    parameters: tuple[float, float] = (1e5, 1e13)  # equal for a given size
    epochs: float = 1e5  # the most
    flops: tuple[float, float] | None = None  # of a crossing; by default all compute that the other two allow


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best model size and epochs for a data budget at a compute budget."""

    parameters: float
    unique_tokens: float  # the data budget; a run of less than an epoch does not read them all
    tokens: float
    epochs: float
    flops: float  # of this run
    loss: float  # nats per token
    no_optimum_in: tuple[str, ...] = ()  # "parameters", "epochs": the law still improves at the end of the range

    def __str__(self) -> str:
        text = f"{short(self.parameters)} parameters for {self.epochs:.4g} epochs ({self.flops:.3g} FLOPs): "
        text += f"{self.loss:.4f} nats per token"
        if self.no_optimum_in:
            text += f"; no optimum within the range: the loss never rises with more {' or '.join(self.no_optimum_in)}"
        return text


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where the first of two laws overtakes the second on one data budget."""

    unique_tokens: float
    flops: float | None  # critical compute; None: no crossing in the range
    loss: float | None  # of both laws there
    ahead: str  # "first" or "second": the law with the lower loss at the end of the range, or "neither"
    crossings: tuple[float, ...]  # every compute budget at which the order changes, either way
    interval: tuple[float | None, float | None] | None  # an end beyond the range is None
    level: float  # of the interval
    resamples: int  # of the interval; 0 unless both laws have draws
    resamples_without_crossing: int
    names: tuple[str, str]  # of the two laws

    def __str__(self) -> str:
        budget = f"{short(self.unique_tokens)} unique tokens"
        if self.flops is None:
            leader = self.names[self.ahead == "second"]
            at_end = "the losses are equal" if self.ahead == "neither" else f"{leader} is ahead"
            return f"{budget}: no crossing in the range at which {self.names[0]} goes ahead; {at_end} at its end"
        text = f"{budget}: critical compute {self.flops:.3g} FLOPs, loss {self.loss:.4f}"
        if self.interval:
            low, high = (f"{end:.3g}" if end is not None else "beyond the range" for end in self.interval)
            text += f", {100 * self.level:g}% [{low}, {high}] of {self.resamples} resamples"
        return text if self.ahead == "first" else f"{text}; {self.names[0]} does not stay ahead"


@dataclass(frozen=True)
class PowerLaw:
    """C = coefficient * (U / 1e6)^exponent: critical compute in FLOPs for U unique tokens."""

    coefficient: float
    exponent: float

    def flops(self, unique_tokens: float) -> float:
        """Return C in FLOPs for U unique tokens."""
        return self.coefficient * (unique_tokens / 1e6) ** self.exponent


# The compute from which masked diffusion beats autoregressive models (2507.15857, C4): fitted to measured crossings at
# 25M, 50M and 100M unique tokens. The project page prints the same line for U in tokens: 2.12 * 10^1.956 * U^2.174.
PUBLISHED_CRITICAL_COMPUTE = PowerLaw(2.12e15, 2.174)


def best_run(law: Law, unique_tokens: float, flops: float | None = None, limits: Limits | None = None) -> Optimum:
    """Return the size and the epochs of lowest loss on U unique tokens at C <= `flops`; None: no limit.

    A grid over (log N, log D), with one epoch among its D, is refined around its best point until it is 1e-9 wide.
    """
    limits = limits or Limits()
    low, high = np.log(limits.parameters)
    if flops is not None:
        high = max(low, min(high, law.compute.parameters(np.log(flops / 6))))  # at least a token
    depth = np.log(limits.epochs) + 12  # how far below the most tokens D may lie
    center, width = np.array([(low + high) / 2, depth / 2]), np.array([high - low, depth])
    log_size = log_tokens = 0.0
    while width.max() > 1e-9:
        ranges = ((low, high), (0.0, depth))
        axes = [
            np.clip(mid + span * np.linspace(-0.5, 0.5, 33), *ends) for mid, span, ends in zip(center, width, ranges)
        ]
        most = np.full_like(axes[0], np.log(limits.epochs * unique_tokens))
        if flops is not None:
            most = np.minimum(most, np.log(flops / 6) - law.compute.computed(axes[0]))
        epoch = np.clip(most - np.log(unique_tokens), 0, depth)  # D = U, after which a loss may rise steeply
        log_sizes = np.append(np.repeat(axes[0], 33), axes[0])
        below = np.append(np.tile(axes[1], 33), epoch)
        log_tokens_of = np.append(np.repeat(most, 33), most) - below
        losses = law.loss(np.exp(log_sizes), unique_tokens, np.exp(log_tokens_of))
        best = int(np.argmin(losses))
        center, width = np.array([log_sizes[best], below[best]]), width / 2
        log_size, log_tokens = log_sizes[best], log_tokens_of[best]
    return _optimum(law, (log_size, log_tokens), unique_tokens, flops=flops, limits=limits)


def _optimum(law: Law, point: tuple, unique_tokens: float, *, flops: float | None, limits: Limits) -> Optimum:
    size, tokens = np.exp(point)
    loss = float(law.loss(size, unique_tokens, tokens))
    most_epochs, most_parameters = limits.epochs, limits.parameters[1]
    unbounded = []
    # the end of the range is as good as the best point, and compute allows it
    for name, at_end in (
        ("parameters", (most_parameters, tokens)),
        ("epochs", (size, most_epochs * unique_tokens)),
    ):
        is_free = name != "parameters" or limits.parameters[0] < limits.parameters[1]
        affordable = flops is None or law.compute.flops(*at_end) <= flops * (1 + 1e-6)
        if is_free and affordable and law.loss(at_end[0], unique_tokens, at_end[1]) <= loss + SAME_LOSS:
            unbounded.append(name)
    return Optimum(
        parameters=float(size),
        unique_tokens=float(unique_tokens),
        tokens=float(tokens),
        epochs=float(tokens / unique_tokens),
        flops=float(law.compute.flops(size, tokens)),
        loss=loss,
        no_optimum_in=tuple(unbounded),
    )


def enough(law: Law, unique_tokens: float, limits: Limits | None = None) -> Optimum | None:
    """Return the run of least compute whose loss is within NEAR_LOSS of the lowest on U unique tokens.

    It answers how much compute is worth spending, where a law has no optimum too. None where the loss has no floor in
    the range, so that the end of the range would decide: for forms without repetition, and where the loss still falls
    by a tenth of NEAR_LOSS in a range BEYOND times as wide.
    """
    limits = limits or Limits()
    best = best_run(law, unique_tokens, limits=limits)
    if not law.form.models_repetition or (best.no_optimum_in and _falls_beyond(law, best, limits)):
        return None
    target = best.loss + NEAR_LOSS
    flops = np.geomspace(*_all_flops(law, unique_tokens, limits), COARSE)
    flops = np.sort(np.append(flops, np.clip(best.flops, flops[0], flops[-1])))  # the optimum may lie between two
    for _ in range(3):
        losses = frontier(law, unique_tokens, flops, limits)[0]
        last = int(np.flatnonzero(losses <= target)[0])
        flops = np.geomspace(flops[max(last - 1, 0)], flops[last], FINE)
    return best_run(law, unique_tokens, float(flops[-1]), limits)


def _falls_beyond(law: Law, best: Optimum, limits: Limits) -> bool:
    """Return whether the loss falls further in a wider range, in the directions without an optimum."""
    sizes, most = limits.parameters, limits.epochs
    wider = replace(
        limits,
        parameters=(sizes[0], sizes[1] * (BEYOND if "parameters" in best.no_optimum_in else 1)),
        epochs=most * (BEYOND if "epochs" in best.no_optimum_in else 1),
    )
    return best_run(law, best.unique_tokens, limits=wider).loss < best.loss - NEAR_LOSS / 10


def _all_flops(law: Law, unique_tokens: float, limits: Limits) -> tuple[float, float]:
    """Return the compute of the smallest model on a thousandth of an epoch, and the most that the limits allow."""
    smallest, largest = limits.parameters
    least, most = law.compute.flops(smallest, unique_tokens), law.compute.flops(largest, unique_tokens)
    return float(least * 1e-3), float(most * limits.epochs)


def frontier(
    law: Law, unique_tokens: float, flops: np.ndarray, limits: Limits | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest losses [K] on U unique tokens at ascending compute budgets [K], and their model sizes [K].

    A budget need not be spent: losses never rise with compute. NaN below the compute of the smallest model.
    """
    losses, sizes = _spent(law, unique_tokens, np.asarray(flops, float), limits or Limits())
    lowest = np.minimum.accumulate(losses)
    source = np.maximum.accumulate(np.where(losses == lowest, np.arange(len(losses)), 0))
    return np.where(np.isinf(lowest), np.nan, lowest), sizes[source]


def _spent(law: Law, unique_tokens: float, flops: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest losses [K] of runs that spend exactly `flops` [K], inf where there is none, and their sizes."""
    # sizes are log M: the parameters that compute counts
    smallest, largest = law.compute.computed(np.log(limits.parameters))
    low = np.maximum(smallest, np.log(flops / (6 * limits.epochs * unique_tokens)))
    high = np.minimum(largest, np.log(flops / 6))
    feasible = low <= high
    high = np.maximum(high, low)
    epoch = np.log(flops / (6 * unique_tokens))  # size of the run with D = U
    center, width, num_points = (low + high) / 2, high - low, 65
    losses = np.empty(0)
    for _ in range(10):
        sizes = center[:, None] + width[:, None] * np.linspace(-0.5, 0.5, num_points)  # [K, points]
        sizes = np.append(sizes, epoch[:, None], axis=1)
        sizes = np.clip(sizes, low[:, None], high[:, None])
        values = law.loss(np.exp(law.compute.parameters(sizes)), unique_tokens, flops[:, None] / 6 / np.exp(sizes))
        best = np.argmin(values, axis=1)[:, None]
        center, losses = np.take_along_axis(sizes, best, 1)[:, 0], np.take_along_axis(values, best, 1)[:, 0]
        width, num_points = width * 2.7 / (num_points - 1), 9  # 1.35 points to both sides of the best one
    return np.where(feasible, losses, np.inf), np.exp(law.compute.parameters(center))


def critical_compute(
    first: Law,
    second: Law,
    unique_tokens: float,
    limits: Limits | None = None,
    *,
    level: float = 0.95,
    names: tuple[str, str] = ("the first law", "the second law"),
    progress: bool = False,
) -> Crossing:
    """Return the compute budget from which `first` has the lower frontier on U unique tokens, with its interval.

    Critical is the last crossing at which `first` goes ahead. The interval has the percentiles of `level` over pairs of
    bootstrap draws, where both laws have draws; draws without crossing count as beyond the range. `names` are printed.
    """
    limits = limits or Limits()
    flops, loss, crossings, ahead = _crossings(first, second, unique_tokens, limits)
    draws = list(zip(first.resampled(), second.resampled()))[:DRAWS]
    resampled: list[float] = []
    for pair in tqdm(draws, desc="critical compute", disable=not progress, leave=False):
        other, _, _, leader = _crossings(*pair, unique_tokens, limits)
        resampled.append(other if other is not None else 0.0 if leader == "first" else np.inf)
    interval = None
    if resampled:
        ends = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        low, high = (float(end) if 0 < end < np.inf else None for end in ends)
        interval = (low, high)
    return Crossing(
        unique_tokens=float(unique_tokens),
        flops=flops,
        loss=loss,
        ahead=ahead,
        crossings=tuple(crossings),
        interval=interval,
        level=level,
        names=names,
        resamples=len(resampled),
        resamples_without_crossing=sum(not 0 < value < np.inf for value in resampled),
    )


def _crossings(
    first: Law, second: Law, unique_tokens: float, limits: Limits
) -> tuple[float | None, float | None, list[float], str]:
    """Return critical compute and the loss there, all crossings, and the law that is ahead at the end."""
    laws, arguments = (first, second), (unique_tokens, limits)
    least, most = zip(*(_all_flops(law, unique_tokens, limits) for law in laws))
    flops = np.geomspace(*(limits.flops or (max(least), min(most))), COARSE)
    spent = [_spent(law, unique_tokens, flops, limits)[0] for law in laws]
    # the lowest loss of a law that overfits lies between two budgets
    extra = np.concatenate([_around(flops, int(np.argmin(losses))) for losses in spent])
    order = np.argsort(np.concatenate([flops, extra]), kind="stable")
    flops = np.concatenate([flops, extra])[order]
    spent = [np.append(losses, _spent(law, unique_tokens, extra, limits)[0])[order] for law, losses in zip(laws, spent)]
    lowest = [np.minimum.accumulate(losses) for losses in spent]
    order_of_laws = _order(lowest)
    ahead = {0: "neither", 1: "first", -1: "second"}[int(order_of_laws[-1])]
    critical = loss = None
    crossings = []
    for before, after in pairwise(np.flatnonzero(order_of_laws)):  # budgets at which one law is clearly ahead
        if order_of_laws[before] == order_of_laws[after]:
            continue
        below = [losses[before] for losses in lowest]
        point = _crossing(laws, below, np.geomspace(flops[before], flops[after], FINE), *arguments)
        crossings.append(point[0])
        if order_of_laws[after] > 0:
            critical, loss = point
    return critical, loss, crossings, ahead


def _around(flops: np.ndarray, index: int) -> np.ndarray:
    return np.geomspace(flops[max(index - 1, 0)], flops[min(index + 1, len(flops) - 1)], FINE)


def _order(lowest: Sequence[np.ndarray]) -> np.ndarray:
    """Return 1 where the first law has the lower loss, -1 where the second has, 0 where they are equal. [K]"""
    with np.errstate(invalid="ignore"):
        lead = np.nan_to_num(lowest[1] - lowest[0], posinf=0.0, neginf=0.0)  # inf: a law without a run at this budget
    return np.where(np.abs(lead) <= SAME_LOSS, 0, np.sign(lead)).astype(int)


def _crossing(
    laws: Sequence[Law], below: Sequence[float], flops: np.ndarray, unique_tokens: float, limits: Limits
) -> tuple[float, float]:
    """Return compute and loss of the crossing between the first and the last budget.

    `below` are the lowest losses of both laws at the first budget.
    """
    lowest = [
        np.minimum(np.minimum.accumulate(_spent(law, unique_tokens, flops, limits)[0]), loss)
        for law, loss in zip(laws, below)
    ]
    lead = lowest[1] - lowest[0]  # [K] nats
    index = max(int(np.flatnonzero(np.sign(lead) != np.sign(lead[0]))[0]), 1)
    share = lead[index - 1] / (lead[index - 1] - lead[index])
    log_flops = (1 - share) * np.log(flops[index - 1]) + share * np.log(flops[index])
    return float(np.exp(log_flops)), float((1 - share) * lowest[0][index - 1] + share * lowest[0][index])


def critical_compute_line(crossings: Sequence[Crossing]) -> PowerLaw | None:
    """Return the least-squares line of log C over log U through two or more crossings, else None."""
    points = [(crossing.unique_tokens, crossing.flops) for crossing in crossings if crossing.flops is not None]
    if len({budget for budget, _ in points}) < 2:
        return None
    budgets, flops = np.log(np.array(points)).T
    exponent, intercept = np.polyfit(budgets - np.log(1e6), flops, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def to_json(answer: Optimum | Crossing | PowerLaw | None) -> dict[str, Any] | None:
    """Return an answer as reports read it: its fields, or None."""
    return None if answer is None else asdict(answer)
