"""The objective of a fit, Huber's loss on log losses, and its minimisation from many starts at once.

Minimisation has two steps. `descend` takes S starts, or S bootstrap resamples, through iteratively re-weighted
Gauss-Newton steps with Levenberg-Marquardt damping, all in the same array operations. `polish` then runs scipy's
L-BFGS-B with exact gradients and tight tolerances from the best of them.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from megatron.laws.base import Form, LawTable

HUBER_DELTA = 1e-3  # of log loss; Hoffmann et al. 2203.15556 and every later fit of the field
THETA_LIMIT = 100.0  # bounds of every logarithm; what reaches them diverged
LONGEST_STEP = 3.0  # of a logarithm in one Gauss-Newton step
POLISH_TOLERANCE = 1e-14  # relative change of the objective at which L-BFGS-B stops


def huber(residuals: np.ndarray) -> np.ndarray:
    """Return Huber's loss of each residual: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    sizes = np.abs(residuals)
    clipped = np.minimum(sizes, HUBER_DELTA)
    return clipped * (sizes - clipped / 2)


@dataclass(frozen=True, eq=False)
class Objective:
    """sum(weights * huber(log L(theta) - log loss)) over the rows of a table: a sum, not a mean.

    Divided by the number of rows the objective is so small that an optimiser's default tolerances stop it early:
    that is the error of Hoffmann's published fit (Besiroglu et al. 2404.10102).
    """

    form: Form
    table: LawTable
    free: tuple[int, ...]  # indices of the parameters that are fitted

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L - log loss [S, R] and its gradient by the free parameters [S, F, R], for theta [S, P]."""
        with np.errstate(over="ignore"):  # of steps far from all optima
            log_loss, gradient = self.form.log_loss_and_gradient(theta, self.table)
        return log_loss - np.log(self.table.loss), gradient[..., self.free, :]

    def value(self, theta: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the objective [S] for theta [S, P] and weights [S, R]."""
        return (weights * huber(self.residuals(theta)[0])).sum(axis=-1)


def descend(
    objective: Objective,
    theta: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-7,
    iterations: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """Return S local minima theta [S, P] and their objectives [S], from S starts theta [S, P].

    `weights` [S, R] weighs the rows, for each start by its own. A start stops after four steps that improve its
    objective by less than the relative `tolerance`, or after `iterations`.
    """
    free = np.array(objective.free)
    theta = theta.copy()
    rows = np.ones((len(theta), len(objective.table))) if weights is None else weights
    residuals, gradient = objective.residuals(theta)
    values = (rows * huber(residuals)).sum(axis=-1)
    damping = np.full(len(theta), 1e-2)
    stalled = np.zeros(len(theta), dtype=int)
    active = np.arange(len(theta))
    for _ in range(iterations):
        if not len(active):
            break
        step = _gauss_newton(rows[active], residuals[active], gradient[active], damping[active])
        trial = theta[active]
        trial[:, free] = np.clip(trial[:, free] + step, -THETA_LIMIT, THETA_LIMIT)
        trial_residuals, trial_gradient = objective.residuals(trial)
        trial_values = (rows[active] * huber(trial_residuals)).sum(axis=-1)
        better = trial_values < values[active]
        progress = np.where(better, values[active] - trial_values, 0.0) > tolerance * values[active]
        accepted = active[better]
        theta[accepted] = trial[better]
        residuals[accepted] = trial_residuals[better]
        gradient[accepted] = trial_gradient[better]
        values[accepted] = trial_values[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-9), np.minimum(damping[active] * 6, 1e9))
        stalled[active] = np.where(progress, 0, stalled[active] + 1)
        active = active[stalled[active] < 4]
    return theta, values


def _gauss_newton(rows: np.ndarray, residuals: np.ndarray, gradient: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """Return damped least-squares steps [S, F] with Huber's weights min(1, delta / |r|) (Holland and Welsch 1977)."""
    weights = rows * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals), np.finfo(float).tiny))
    weighted = gradient * weights[:, None]
    curvature = weighted @ gradient.transpose(0, 2, 1)  # [S, F, F]
    slope = weighted @ residuals[..., None]  # [S, F, 1]
    diagonal = np.einsum("sii->si", curvature)
    scale = diagonal + 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300
    damped = curvature + np.einsum("si,ij->sij", damping[:, None] * scale, np.eye(curvature.shape[-1]))
    return np.clip(-np.linalg.solve(damped, slope)[..., 0], -LONGEST_STEP, LONGEST_STEP)


def polish(objective: Objective, theta: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a local minimum theta [P] and its objective by L-BFGS-B from theta [P]."""
    free = np.array(objective.free)
    unit = max(float(objective.value(theta)), 1e-300)  # scipy's tolerance is absolute for objectives below 1

    def value_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        point = theta.copy()
        point[free] = values
        residuals, gradient = objective.residuals(point)
        slope = gradient @ np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return float(huber(residuals).sum()) / unit, slope / unit

    result = minimize(
        value_and_gradient,
        theta[free],
        jac=True,
        method="L-BFGS-B",
        bounds=[(-THETA_LIMIT, THETA_LIMIT)] * len(free),
        options={"ftol": POLISH_TOLERANCE, "gtol": 1e-9, "maxiter": 3000, "maxcor": 20},
    )
    best = theta.copy()
    best[free] = result.x
    return best, float(result.fun) * unit
