"""Muennighoff's law: repeated tokens and parameters beyond the optimum for the unique tokens lose value."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack

LOG_RATIO_LIMIT = 300.0  # of N over U_N, so that parameters far from any optimum do not overflow


class Repetition(Form):
    """L = E + A / N'^alpha + B / D'^beta with effective parameters N' and tokens D' (Muennighoff et al. 2305.16264).

    D' = U + U R_D* (1 - exp(-R_D / R_D*)), R_D = D / U - 1
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)), R_N = N / U_N - 1

    U_N = min(N, N_opt(U)) is the size that is compute-optimal for U tokens in one epoch by the same A, B, alpha and
    beta: N_opt(U) = G (G U)^(beta / alpha), G = (alpha A / (beta B))^(1 / (alpha + beta)). The law is monotone in
    epochs: it describes no overfitting. The published constants are those of the authors' notebook for C4, where E,
    A, B and alpha = beta are fitted to single-epoch runs first and then frozen.
    """

    name = "repetition"
    equation = (
        "L = E + A / N'^alpha + B / D'^beta, D' = U + U R_D* (1 - exp(-R_D / R_D*)), "
        "N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)), U_N = min(N, N_opt(U))"
    )
    source = "Muennighoff et al. 2305.16264"
    parameters = ("E", "A", "B", "alpha", "beta", "R_D*", "R_N*")
    base = ("E", "A", "B", "alpha", "beta")
    published: ClassVar = {
        "E": float(np.exp(0.6254804)),
        "A": float(np.exp(6.255414)),
        "B": float(np.exp(7.3049974)),
        "alpha": 0.3526596,
        "beta": 0.3526596,
        "R_D*": 15.387756,
        "R_N*": 5.309743,
    }
    grid: ClassVar = {
        "E": (0.3, 0.7),
        "A": (0.05, 0.3),
        "B": (0.05, 0.3),
        "alpha": (0.2, 0.5),
        "beta": (0.2, 0.5),
        "R_D*": (2.0, 15.0, 100.0, 1000.0),
        "R_N*": (2.0, 15.0, 100.0, 1000.0),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        e, a, b, log_alpha, log_beta, log_data_decay, log_size_decay = columns(theta)
        alpha, beta = np.exp(log_alpha), np.exp(log_beta)
        gained, by_decay, _ = self._gained(points.extra_epochs, log_data_decay)
        log_data = points.log_unique + np.log1p(gained)  # log D'
        log_size, size_gradient = self._log_size((a, b, log_alpha, log_beta, log_size_decay), points)  # log N'
        shape = log_data.shape
        parameter_term = -alpha[..., None] * size_gradient
        parameter_term += stack((0, 1, 0, -alpha * log_size, 0, 0, 0), shape)
        data_term = stack((0, 0, 1, 0, -beta * log_data, -beta * by_decay / (1 + gained), 0), shape)
        return log_sum(
            [
                (np.broadcast_to(e, shape), stack((1, 0, 0, 0, 0, 0, 0), shape)),
                (a - alpha * log_size, parameter_term),
                (b - beta * log_data, data_term),
            ]
        )

    def _log_size(self, theta: tuple, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log N' [..., R] and its gradient [..., P, R]."""
        a, b, log_alpha, log_beta, log_size_decay = theta
        alpha, beta = np.exp(log_alpha), np.exp(log_beta)
        total = alpha + beta
        log_g = (a + log_alpha - b - log_beta) / total
        slope = beta / alpha
        log_optimum = log_g + slope * (points.log_unique + log_g)  # log N_opt(U)
        log_ratio = np.clip(points.log_parameters - log_optimum, 0.0, LOG_RATIO_LIMIT)  # log N / U_N
        gained, by_decay, by_extra = self._gained(np.expm1(log_ratio), log_size_decay)
        log_size = points.log_parameters - log_ratio + np.log1p(gained)
        # d log N' / d log N_opt, which is 0 for sizes below the optimum
        by_optimum = np.where(log_ratio > 0, 1 - by_extra * np.exp(log_ratio) / (1 + gained), 0.0)
        bend = slope * (points.log_unique + log_g)
        gradient = stack(
            (
                0,
                by_optimum * (1 + slope) / total,
                -by_optimum * (1 + slope) / total,
                by_optimum * ((1 + slope) * (1 - alpha * log_g) / total - bend),
                by_optimum * ((1 + slope) * (-1 - beta * log_g) / total + bend),
                0,
                by_decay / (1 + gained),
            ),
            log_size.shape,
        )
        return log_size, gradient

    def _gained(self, extra: np.ndarray, log_decay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the value R* (1 - exp(-R / R*)) of R repetitions, its derivative by log R*, and that by R."""
        ratio = extra / np.maximum(np.exp(log_decay), 1e-300)
        left = np.exp(-ratio)
        small = ratio < 1e-4
        safe, tiny = np.maximum(ratio, 1e-4), np.minimum(ratio, 1e-4)
        gained = extra * np.where(small, 1 - tiny / 2 + tiny**2 / 6, -np.expm1(-safe) / safe)
        by_decay = np.where(small, extra * (tiny / 2 - tiny**2 / 3), gained - extra * left)
        return gained, by_decay, left
