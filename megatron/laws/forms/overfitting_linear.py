"""Lovelace's law of one overfitting parameter."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Points
from megatron.laws.forms.overfitting import Overfitting


class OverfittingLinear(Overfitting):
    """L = E + A / N^alpha + B / (U (1 + R))^beta + P R N / U (Lovelace et al. 2605.01640): d = k = 1.

    The optimal number of epochs follows in closed form where the data term is B / D^beta: proportional to
    U^((1 - beta) / (1 + beta)) / N^(1 / (1 + beta)), up to R = D / U.
    """

    name = "overfitting-linear"
    equation = "L = E + A / N^alpha + B / D^beta + P R N / U, R = D / U - 1"
    source = "Lovelace et al. 2605.01640, form of one parameter"
    parameters = ("E", "A", "B", "alpha", "beta", "P")
    grid: ClassVar = {name: values for name, values in Overfitting.grid.items() if name not in ("d", "k")}
    amplitudes: ClassVar = {
        **Overfitting.amplitudes,
        "P": (("log_extra_epochs", 1, 1.0), ("log_parameters", 1, 1.0), ("log_unique", -1, 1.0)),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        exponents = np.zeros((*theta.shape[:-1], 2))  # log d = log k = 0
        log_loss, gradient = super().log_loss_and_gradient(np.concatenate([theta, exponents], axis=-1), points)
        return log_loss, gradient[..., :6, :]
