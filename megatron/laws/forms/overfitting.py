"""Lovelace's general law: Chinchilla's over all training tokens, plus a term for overfitting."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack


class Overfitting(Form):
    """L = E + A / N^alpha + B / (U (1 + R))^beta + P R^d (N / U)^k with R = D / U - 1 (Lovelace et al. 2605.01640).

    The last term grows with repetitions and parameters per unique token, so that the law turns up after the optimal
    number of epochs. A run of at most one epoch has R = 0 and no such term. Stronger weight decay lowers P.
    """

    name = "overfitting"
    equation = "L = E + A / N^alpha + B / D^beta + P R^d (N / U)^k, R = D / U - 1"
    source = "Lovelace et al. 2605.01640, general form"
    parameters = ("E", "A", "B", "alpha", "beta", "P", "d", "k")
    base = ("E", "A", "B", "alpha", "beta")
    vanishing = ("E", "P")
    losses = ("E", "A", "B", "P")
    grid: ClassVar = {
        "E": (0.3, 0.8),
        "A": (0.05, 0.3),
        "B": (0.05, 0.3),
        "alpha": (0.2, 0.5),
        "beta": (0.2, 0.5),
        "P": (0.01, 0.1),
        "d": (0.5, 1.0, 2.0),
        "k": (0.5, 1.0, 2.0),
    }
    amplitudes: ClassVar = {
        "A": (("log_parameters", -1, "alpha"),),
        "B": (("log_tokens", -1, "beta"),),
        "P": (("log_extra_epochs", 1, "d"), ("log_parameters", 1, "k"), ("log_unique", -1, "k")),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        e, a, b, log_alpha, log_beta, log_p, log_d, log_k = columns(theta)
        alpha_log_n = np.exp(log_alpha) * points.log_parameters
        beta_log_d = np.exp(log_beta) * points.log_tokens
        k_log_ratio = np.exp(log_k) * (points.log_parameters - points.log_unique)
        repeated = points.extra_epochs > 0
        d_log_r = np.exp(log_d) * np.where(repeated, points.log_extra_epochs, 0.0)
        shape = alpha_log_n.shape
        return log_sum(
            [
                (np.broadcast_to(e, shape), stack((1, *[0] * 7), shape)),
                (a - alpha_log_n, stack((0, 1, 0, -alpha_log_n, 0, 0, 0, 0), shape)),
                (b - beta_log_d, stack((0, 0, 1, 0, -beta_log_d, 0, 0, 0), shape)),
                (
                    np.where(repeated, log_p + d_log_r + k_log_ratio, -np.inf),
                    stack((0, 0, 0, 0, 0, 1, d_log_r, k_log_ratio), shape),
                ),
            ]
        )
