"""Quokka's law: the value of repeated tokens rises, then falls, with the number of epochs."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack

LOG_WEAR_LIMIT = 100.0  # so that parameters far from any optimum do not overflow


class Quokka(Form):
    """L = E + A / N^alpha + B / D'^beta with D' that falls again after many epochs (Ni et al. 2510.03280).

    D' = U e^p exp(-((e - 1) / e_p)^gamma), e_p = c U^m / N^k, over e = D / U epochs (e = 1 below one epoch). The
    exponent p of the epochs is the paper's p_e. The published constants are those for masked diffusion, with E of
    about 0, here 0.
    """

    name = "quokka"
    equation = "L = E + A / N^alpha + B / D'^beta, D' = U e^p exp(-((e - 1) / e_p)^gamma), e_p = c U^m / N^k"
    source = "Ni et al. 2510.03280"
    parameters = ("E", "A", "B", "alpha", "beta", "p", "c", "m", "k", "gamma")
    across_budgets = ("beta", "m")
    published: ClassVar = {
        "E": 0.0,
        "A": 1535.23,
        "B": 54.21,
        "alpha": 0.42,
        "beta": 0.13,
        "p": 1.49,
        "c": 254.35,
        "m": 0.39,
        "k": 0.55,
        "gamma": 0.40,
    }
    grid: ClassVar = {
        "E": (0.1, 0.6),
        "A": (0.05, 0.3),
        "B": (0.1, 0.5),
        "alpha": (0.2, 0.5),
        "beta": (0.1, 0.3),
        "p": (0.7, 1.5),
        "c": (5.0, 100.0),
        "m": (0.4,),
        "k": (0.5,),
        "gamma": (0.4, 1.0),
    }
    amplitudes: ClassVar = {
        "A": (("log_parameters", -1, "alpha"),),
        "B": (("log_unique", -1, "beta"),),
        "c": (("log_unique", 1, "m"), ("log_parameters", -1, "k")),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]."""
        e, a, b, log_alpha, log_beta, log_p, log_c, log_m, log_k, log_gamma = columns(theta)
        beta, p, gamma = np.exp(log_beta), np.exp(log_p), np.exp(log_gamma)
        alpha_log_n = np.exp(log_alpha) * points.log_parameters
        m_log_u = np.exp(log_m) * points.log_unique
        k_log_n = np.exp(log_k) * points.log_parameters
        p_log_epochs = p * np.log1p(points.extra_epochs)
        repeated = points.extra_epochs > 0
        log_age = np.where(repeated, points.log_extra_epochs, 0.0) - log_c - m_log_u + k_log_n  # of (e - 1) / e_p
        wear = np.where(repeated, np.exp(np.minimum(gamma * log_age, LOG_WEAR_LIMIT)), 0.0)
        log_data = points.log_unique + p_log_epochs - wear  # log D'
        shape = log_data.shape
        slope = beta * gamma * wear  # d (b - beta log D') / d log_age
        by_age = (-slope, -slope * m_log_u, slope * k_log_n, slope * log_age)  # by c, m, k and gamma
        data_term = stack((0, 0, 1, 0, -beta * log_data, -beta * p_log_epochs, *by_age), shape)
        return log_sum(
            [
                (np.broadcast_to(e, shape), stack((1, *[0] * 9), shape)),
                (a - alpha_log_n, stack((0, 1, 0, -alpha_log_n, *[0] * 6), shape)),
                (b - beta * log_data, data_term),
            ]
        )
