"""Compares forms fitted to the same rows: information criteria of the likelihood, errors on held-out budgets."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import erf

from megatron.laws.fit import Fit
from megatron.laws.optimise import HUBER_DELTA, descend

MAX_FOLDS = 10  # budgets are held out one at a time, or in this many ranges where there are more


def log_likelihood(value: float, num_rows: int) -> float:
    """Return the log likelihood of a sum of Huber's losses over `num_rows` residuals, at the best scale s.

    The density of a residual is exp(-huber(r) / s) / Z(s), Huber's least favourable one with a free scale, which is
    nearly Laplace's where residuals exceed delta (Huber 1964; Besiroglu et al. 2404.10102 use the same likelihood):
    Z(s) = sqrt(2 pi s) erf(delta / sqrt(2 s)) + 2 s / delta exp(-delta^2 / (2 s)).
    """

    def negative(log_scale: float) -> float:
        scale = np.exp(log_scale)
        tail = 2 * scale / HUBER_DELTA * np.exp(-(HUBER_DELTA**2) / (2 * scale))
        normaliser = np.sqrt(2 * np.pi * scale) * erf(HUBER_DELTA / np.sqrt(2 * scale)) + tail
        return num_rows * np.log(normaliser) + value / scale

    guess = np.log(max(value / num_rows, 1e-20))
    result = minimize_scalar(negative, bounds=(guess - 3, guess + 3), method="bounded", options={"xatol": 1e-9})
    return -float(result.fun)


def information_criteria(fit: Fit) -> dict[str, float]:
    """Return AIC and BIC of a fit, with the scale counted as a parameter; only differences on equal rows mean anything.

    Runs that differ in their seed only count as one observation for BIC's penalty.
    """
    likelihood = log_likelihood(fit.value, len(fit.table))
    count = len(fit.free) + 1
    return {
        "log_likelihood": likelihood,
        "aic": 2 * count - 2 * likelihood,
        "bic": count * float(np.log(fit.num_groups)) - 2 * likelihood,
    }


@dataclass(frozen=True)
class HeldOut:
    """The error of a fit to all other budgets on the runs of one budget, or of a range of budgets."""

    lowest: float  # unique tokens
    highest: float
    errors: tuple[float, ...]  # predicted minus observed loss of each run, in nats per token


def leave_one_budget_out(fit: Fit) -> list[HeldOut]:
    """Return the prediction errors on each budget of unique tokens from a fit to the others; [] for a single budget.

    A budget is left out of the comparison if the others have too few distinct runs or budgets for the form.
    """
    table = fit.table
    folds = np.array_split(table.budgets, min(len(table.budgets), MAX_FOLDS))
    masks = [np.isin(table.unique_read, budgets) for budgets in folds]
    needed = fit.form.minimum_rows(fit.frozen)
    across = [name for name in fit.form.across_budgets if name in fit.free]
    masks = [
        mask
        for mask in masks
        if (rest := table.select(~mask)).num_distinct >= needed and len(rest.budgets) >= (2 if across else 1)
    ]
    if len(table.budgets) < 2 or not masks:
        return []
    starts = np.repeat(fit.theta[None], len(masks), axis=0)
    theta, _ = descend(fit.objective, starts, weights=np.array([~mask for mask in masks], dtype=float))
    predicted = np.exp(fit.form.log_loss(theta, table))  # [K, R]
    results = []
    for mask, losses in zip(masks, predicted, strict=True):
        errors = losses[mask] - table.loss[mask]
        budgets = table.unique_read[mask]
        results.append(
            HeldOut(
                lowest=float(budgets.min()),
                highest=float(budgets.max()),
                errors=tuple(errors.tolist()),
            )
        )
    return results


def held_out_errors(results: list[HeldOut]) -> dict[str, float] | None:
    """Return root mean square and median of the absolute errors of all held-out runs in nats; None without any."""
    if not results:
        return None
    errors = np.concatenate([result.errors for result in results])
    return {"rms": float(np.sqrt((errors**2).mean())), "median": float(np.median(np.abs(errors)))}
