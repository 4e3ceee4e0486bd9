"""Chinchilla's law, without repetition: every training token counts as new."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack


class Chinchilla(Form):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2203.15556, approach 3).

    The published constants are those of the replication by Besiroglu et al., whose fit from a grid of starts rejects
    Hoffmann's (E 1.69, A 406.4, B 410.7, alpha 0.34, beta 0.28): those come from an optimiser that stopped early.
    """

    name = "chinchilla"
    equation = "L = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2203.15556; constants of Besiroglu et al. 2404.10102"
    models_repetition = False
    parameters = ("E", "A", "B", "alpha", "beta")
    published: ClassVar = {"E": 1.8172, "A": 477.84, "B": 2143.86, "alpha": 0.3473, "beta": 0.3672}
    grid: ClassVar = {
        "E": (0.3, 0.6, 0.9),
        "A": (0.05, 0.3),
        "B": (0.05, 0.3),
        "alpha": (0.2, 0.4, 0.8),
        "beta": (0.2, 0.4, 0.8),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        e, a, b, log_alpha, log_beta = columns(theta)
        alpha_log_n = np.exp(log_alpha) * points.log_parameters
        beta_log_d = np.exp(log_beta) * points.log_tokens
        shape = alpha_log_n.shape
        return log_sum(
            [
                (np.broadcast_to(e, shape), stack((1, 0, 0, 0, 0), shape)),
                (a - alpha_log_n, stack((0, 1, 0, -alpha_log_n, 0), shape)),
                (b - beta_log_d, stack((0, 0, 1, 0, -beta_log_d), shape)),
            ]
        )
