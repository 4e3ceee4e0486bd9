"""Densities of the diffusion time of masked diffusion, and the weights that undo them.

The bound is an integral over times t in (0, 1), which times of any positive density f estimate without bias if each is
weighted by 1 / f(t), the uniform density over its own. A density is u + (1 - u) g(t): a share u of the times is
uniform, so that no weight exceeds 1 / u, and the others have the density g of a window or a bell.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

STANDARD_NORMAL = NormalDist()


class TimeDensity(ABC):
    """The density of times in (0, 1)."""

    @abstractmethod
    def density(self, time: float) -> float:
        """Return the density at a time; that of uniform times is 1."""

    @abstractmethod
    def cumulative(self, time: float) -> float:
        """Return the probability of a smaller time."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """The mean time."""

    def quantile(self, probability: float) -> float:
        """Return the time whose cumulative probability is given, by bisection to the precision of a float.

        Uniform probabilities become times of this density, and stratified ones times that are spread as evenly.
        """
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high:
            if self.cumulative(middle) <= probability:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """Uniform times."""

    @property
    def mean(self) -> float:
        """The mean time."""
        return 0.5

    def density(self, time: float) -> float:
        """Return 1."""
        return 1.0

    def cumulative(self, time: float) -> float:
        """Return the time itself."""
        return time

    def quantile(self, probability: float) -> float:
        """Return the probability itself."""
        return probability


@dataclass(frozen=True)
class Window(TimeDensity):
    """A share of the times is uniform on (0, 1), the others on [low, high] (2601.22450)."""

    low: float
    high: float
    uniform_share: float

    def density(self, time: float) -> float:
        """Return the density at a time; 0 outside a window without a uniform share."""
        inside = self.low <= time <= self.high
        return self.uniform_share + ((1 - self.uniform_share) / (self.high - self.low) if inside else 0.0)

    def cumulative(self, time: float) -> float:
        """Return the probability of a smaller time."""
        inside = min(1.0, max(0.0, (time - self.low) / (self.high - self.low)))
        return self.uniform_share * time + (1 - self.uniform_share) * inside

    @property
    def mean(self) -> float:
        """The mean time."""
        return self.uniform_share / 2 + (1 - self.uniform_share) * (self.low + self.high) / 2


@dataclass(frozen=True)
class Bell(TimeDensity):
    """A share of the times is uniform, the others are normal, truncated to (0, 1).

    2605.13026 samples times from a bell-shaped density; that it is this one is our choice.
    """

    center: float  # of the normal density before it is truncated, as `std`
    std: float
    uniform_share: float

    def density(self, time: float) -> float:
        """Return the density at a time."""
        _, mass = self._truncation
        bell = STANDARD_NORMAL.pdf((time - self.center) / self.std) / (self.std * mass)
        return self.uniform_share + (1 - self.uniform_share) * bell

    def cumulative(self, time: float) -> float:
        """Return the probability of a smaller time."""
        start, mass = self._truncation
        return self.uniform_share * time + (1 - self.uniform_share) * (self._normal(time) - start) / mass

    @property
    def mean(self) -> float:
        """The mean time."""
        start, end = (STANDARD_NORMAL.pdf((limit - self.center) / self.std) for limit in (0.0, 1.0))
        bell = self.center + self.std * (start - end) / self._truncation[1]
        return self.uniform_share / 2 + (1 - self.uniform_share) * bell

    def _normal(self, time: float) -> float:
        """Return the probability of a smaller time before the density is truncated."""
        return (1 + math.erf((time - self.center) / (self.std * math.sqrt(2)))) / 2

    @cached_property
    def _truncation(self) -> tuple[float, float]:
        """The probabilities of a time below 0 and of one in (0, 1), before the density is truncated."""
        start = self._normal(0.0)
        return start, self._normal(1.0) - start


@dataclass(frozen=True)
class TimeSampling:
    """How the diffusion times of training are distributed, and how masked tokens are weighted."""

    density: TimeDensity
    importance: bool = False  # weight times by the uniform density over `density`, which restores the bound
    simple: bool = False  # every masked token has the weight 1 / E[p] instead of 1 / p, p its mask probability

    @property
    def mean(self) -> float:
        """The mean time, of uniform times if others are weighted to their expectation."""
        return (Uniform() if self.importance else self.density).mean

    def importance_weights(self, times: list[float]) -> np.ndarray:
        """Return the uniform density over the density at each of the `times` [N] drawn from it, [N]."""
        return np.array([1 / self.density.density(time) for time in times])


UNIFORM_TIMES = TimeSampling(Uniform())
