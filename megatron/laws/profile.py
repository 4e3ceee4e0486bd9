"""Profile likelihood of each parameter: what the rows say about it, whatever the others are.

The profile of a parameter is the objective minimised over all others, at fixed values of it. Whether a value is
compatible with the rows is decided by a likelihood-ratio test for M-estimators (Schrader and Hettmansperger, Biometrika
67, 1980): with rise = objective(value) - objective(best),

    statistic = 2 rise * curvature / variance
    curvature = sum of psi'(r) over rows, variance = sum over groups of (sum of psi(r))^2

is compared with Student's t^2. psi is the derivative of Huber's loss, and runs that differ in their seed only are
summed first, since they deviate together.

A parameter has DIVERGED where its limits decide it: somewhere LIMIT_FACTOR below or above the best value the
statistic is still below NO_OPTIMUM, so that the objective has no interior minimum worth the name. It is WEAK where it
has one, but the interval reaches that far or spans more than a factor of WIDE.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t
from tqdm import tqdm

from megatron.laws.fit import Fit
from megatron.laws.optimise import HUBER_DELTA, THETA_LIMIT, Objective, descend

LIMIT_FACTOR = 1e4  # how far a profile is followed on each side of the best value
NO_OPTIMUM = 0.1  # statistic: a likelihood ratio of exp(0.05)
WIDE = 10.0  # largest ratio of the ends of an interval that counts as determined
NEAR = (0.7, 1.4, 2.1, 3.0)  # distances from the best value in standard errors, then those in logarithms
FAR = (0.25, 0.6, 1.2, 2.5, 5.0, np.log(LIMIT_FACTOR))
ITERATIONS = 60
RELEVANT = 10.0  # times the threshold: above, a profile need not be exact

DETERMINED = "determined"
WEAK = "weak"
DIVERGED = "diverged"


@dataclass(frozen=True, eq=False)
class Profile:
    """The profile of one parameter, in public values."""

    name: str
    values: np.ndarray  # [K] ascending
    objectives: np.ndarray  # [K]
    statistics: np.ndarray  # [K] likelihood ratios against the best fit
    low: float | None  # ends of the interval; None where it reaches LIMIT_FACTOR from the best value
    high: float | None
    status: str  # DETERMINED, WEAK or DIVERGED
    direction: str = ""  # of a diverged parameter: "0" or "infinity"


def profiles(fit: Fit, level: float, progress: bool = False) -> dict[str, Profile]:
    """Return the profile of every fitted parameter with its interval at a confidence level."""
    curvature, variance = _curvature_and_variance(fit)
    correction = (fit.num_groups - len(fit.free)) / fit.num_groups
    scale = 2 * max(correction, 1 / fit.num_groups) * curvature / variance
    degrees = max(fit.num_groups - len(fit.free), 1)
    threshold = float(t.ppf((1 + level) / 2, degrees) ** 2)
    gradient = fit.objective.residuals(fit.theta)[1]  # [F, R]
    covariance = np.linalg.pinv(gradient @ gradient.T) * variance * len(fit.table) / curvature**2
    errors = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))  # pinv rounds below 0 where nothing is determined
    progressing = tqdm(zip(fit.free, errors), total=len(errors), desc="profiles", disable=not progress, leave=False)
    return {
        name: _profile(fit, name, error=float(error), scale=scale, threshold=threshold) for name, error in progressing
    }


def _curvature_and_variance(fit: Fit) -> tuple[float, float]:
    """Return curvature and variance of the module docstring.

    psi' is 1 for residuals within delta only: a handful of rows. Their density at 0 is therefore estimated from the
    rows within a bandwidth of 1.84 s n^(-1/5) (the normal-reference rule for a box), s the scale of the median.
    """
    residuals = fit.residuals
    scale = np.median(np.abs(residuals)) / 0.6745
    bandwidth = max(1.84 * scale * len(residuals) ** -0.2, HUBER_DELTA)
    curvature = (np.abs(residuals) <= bandwidth).sum() * HUBER_DELTA / bandwidth
    psi = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
    index = np.unique(fit.table.group, return_inverse=True)[1]
    variance = (np.bincount(index, weights=psi) ** 2).sum()
    return float(curvature), max(float(variance), np.finfo(float).tiny)


def _profile(fit: Fit, name: str, *, error: float, scale: float, threshold: float) -> Profile:
    """Follow the profile of one parameter to both sides, all distances at once."""
    index = fit.form.parameters.index(name)
    others = tuple(other for other in fit.objective.free if other != index)
    near = np.array(NEAR) * np.clip(error, 1e-4, 1.0)
    steps = np.concatenate([near, [distance for distance in FAR if distance > 1.2 * near[-1]]])
    offsets = np.concatenate([-steps[::-1], [0.0], steps])
    thetas = np.clip(fit.theta[index] + offsets, -THETA_LIMIT, THETA_LIMIT)
    starts = np.repeat(fit.theta[None], len(offsets), axis=0)
    starts[:, index] = thetas
    objectives = _walk(Objective(fit.form, fit.table, others), starts, fit.value + RELEVANT * threshold / scale)
    objectives[len(steps)] = fit.value
    statistics = scale * np.maximum(objectives - fit.value, 0.0)
    low = _crossing(thetas[len(steps) :: -1], statistics[len(steps) :: -1], threshold)
    high = _crossing(thetas[len(steps) :], statistics[len(steps) :], threshold)
    status = _status(statistics, low, high)
    direction = _direction(fit, index, others) if status == DIVERGED else ""
    public = [None if end is None else float(np.exp(end)) for end in (low, high)]
    return Profile(
        name=name,
        values=np.exp(thetas),
        objectives=objectives,
        statistics=statistics,
        low=public[0],
        high=public[1],
        status=status,
        direction=direction,
    )


def _walk(objective: Objective, starts: np.ndarray, relevant: float) -> np.ndarray:
    """Return the profile objectives [K] at the fixed values of `starts` [K, P], which lie in order.

    Every point starts from the best fit first; then the minima of its two neighbours are tried as starts, until none
    improves, so that a profile is followed continuously. Points above the objective `relevant` are not refined.
    """
    if not objective.free:
        return objective.value(starts)
    theta, values = descend(objective, starts, tolerance=1e-3, iterations=ITERATIONS)
    fixed = [index for index in range(starts.shape[1]) if index not in objective.free]
    for tolerance in (1e-4, 1e-5, 1e-6):
        before = values.copy()
        for shift in (0, 1, -1):
            points = np.flatnonzero(values < relevant)
            neighbours = theta[(points - shift) % len(theta)]
            neighbours[:, fixed] = starts[points][:, fixed]
            minima, improved = descend(objective, neighbours, tolerance=tolerance, iterations=ITERATIONS)
            better = improved < values[points]
            theta[points[better]] = minima[better]
            values[points[better]] = improved[better]
        if (values >= before * (1 - 1e-4)).all():
            break
    return values


def _crossing(thetas: np.ndarray, statistics: np.ndarray, threshold: float) -> float | None:
    """Return where the statistic exceeds the threshold for good along a walk, by interpolation of its square root."""
    last = int(np.flatnonzero(statistics <= threshold)[-1])
    if last == len(statistics) - 1:
        return None
    end = last + 1
    inner, outer = np.sqrt(statistics[last]), np.sqrt(statistics[end])
    share = (np.sqrt(threshold) - inner) / (outer - inner)
    return float(thetas[end - 1] + share * (thetas[end] - thetas[end - 1]))


def _status(statistics: np.ndarray, low: float | None, high: float | None) -> str:
    """Return what the rows say about a parameter, from its statistics and the logarithms of its interval's ends."""
    if statistics[-1] < NO_OPTIMUM or statistics[0] < NO_OPTIMUM:
        return DIVERGED
    if low is None or high is None or high - low > np.log(WIDE):
        return WEAK
    return DETERMINED


def _direction(fit: Fit, index: int, others: tuple[int, ...]) -> str:
    """Return the limit towards which a parameter diverged, "0" or "infinity": that of the lower objective."""
    limits = np.repeat(fit.theta[None], 2, axis=0)
    limits[:, index] = -THETA_LIMIT, THETA_LIMIT
    at_zero, at_infinity = _walk(Objective(fit.form, fit.table, others), limits, np.inf)
    return "0" if at_zero < at_infinity else "infinity"
