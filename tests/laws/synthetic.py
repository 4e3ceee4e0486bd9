"""Runs drawn from a planted law: an unbalanced grid of budgets, sizes and epochs, heavy-tailed noise, some seeds."""

import numpy as np

from megatron.laws.base import Law, LawTable
from megatron.laws.registry import FORMS

# constants of the size of published ones, so that every term matters somewhere on the grid
PLANTED = {
    "chinchilla": FORMS["chinchilla"].published,
    "outer-exponent": {"E": 1.7, "A": 2e4, "B": 1e6, "alpha": 0.6, "beta": 0.7, "k": 0.45},
    "repetition": FORMS["repetition"].published,
    "geometric": {**FORMS["repetition"].published, "R_D*": 31.19, "R_N*": 15.0},
    "quokka": {**FORMS["quokka"].published, "E": 1.0},
    "overfitting": {"E": 2.0, "A": 500, "B": 2e4, "alpha": 0.34, "beta": 0.465, "P": 0.06, "d": 0.4, "k": 0.8},
    "overfitting-linear": {"E": 2.0, "A": 500, "B": 2e4, "alpha": 0.34, "beta": 0.465, "P": 0.002},
    "bounded": {
        **{"E": 1.9, "L0": 10.8, "A": 300, "alpha": 0.4, "B": 2e5, "beta": 0.65},
        **{"C": 0.1, "gamma": 0.6, "delta": 0.6},
    },
}


def synthetic(name: str, seed: int = 0, noise: float = 0.005, seeds: int = 1) -> LawTable:
    """Return about 120 groups of `seeds` runs of a planted law; `noise` is the standard deviation of the log loss."""
    rng = np.random.default_rng([seed, 7])
    budgets, sizes, epochs = np.meshgrid(
        np.geomspace(25e6, 2e9, 4), np.geomspace(1e7, 2e9, 7), (1, 2, 4, 8, 16, 40, 100, 250), indexing="ij"
    )
    present = rng.random(budgets.size) < 0.55  # an unbalanced grid
    unique, parameters, repeats = (np.repeat(axis.ravel()[present], seeds) for axis in (budgets, sizes, epochs))
    form = FORMS[name]
    loss = Law(form, form.internal(PLANTED[name])).loss(parameters, unique, unique * repeats)
    loss = loss * np.exp(noise * rng.standard_t(4, len(loss)) / np.sqrt(2))  # variance 2 at 4 degrees of freedom
    group = np.repeat(np.arange(present.sum()), seeds)
    return LawTable(parameters, unique, unique * repeats, loss, group, source="synthetic.csv")
