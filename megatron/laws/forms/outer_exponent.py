"""Chinchilla's law with an exponent around its two terms."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack


class OuterExponent(Form):
    """L = (A / N^alpha + B / D^beta)^k + E (Videau 2608.07222, there with k of 0.31 to 0.45).

    k = 1 is Chinchilla's law. It says nothing of repetition: every training token counts as new.
    """

    name = "outer-exponent"
    equation = "L = E + (A / N^alpha + B / D^beta)^k"
    source = "Videau 2608.07222"
    models_repetition = False
    parameters = ("E", "A", "B", "alpha", "beta", "k")
    grid: ClassVar = {
        "E": (0.2, 0.5, 0.8),
        "A": (0.05, 0.3),
        "B": (0.05, 0.3),
        "alpha": (0.3, 0.8),
        "beta": (0.3, 0.8),
        "k": (0.3, 0.6, 1.0),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        e, a, b, log_alpha, log_beta, log_k = columns(theta)
        alpha_log_n = np.exp(log_alpha) * points.log_parameters
        beta_log_d = np.exp(log_beta) * points.log_tokens
        k = np.exp(log_k)
        shape = alpha_log_n.shape
        inner, inner_gradient = log_sum(
            [
                (a - alpha_log_n, stack((0, 1, 0, -alpha_log_n, 0, 0), shape)),
                (b - beta_log_d, stack((0, 0, 1, 0, -beta_log_d, 0), shape)),
            ]
        )
        outer = k[..., None] * inner_gradient + stack((0, 0, 0, 0, 0, k * inner), shape)
        return log_sum([(np.broadcast_to(e, shape), stack((1, 0, 0, 0, 0, 0), shape)), (k * inner, outer)])
