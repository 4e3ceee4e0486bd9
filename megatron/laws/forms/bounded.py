"""A law between two losses: the irreducible one and that of a model that has learned nothing."""

from typing import ClassVar

import numpy as np

from megatron.laws.base import Form, Points, columns, log_sum, stack


class Bounded(Form):
    """L = E + (L0 - E) h / (1 + h), h = A / N^alpha + B / D^beta + C N^gamma / U^delta (2605.09189).

    L0 is the loss of a model that has learned nothing, for a tokenizer of V tokens about log V: freeze it where no run
    comes near. The last term of h is overfitting. The source writes T for our training tokens D and D for our unique
    tokens U; that reading is ours, since only its abstract was available.
    """

    name = "bounded"
    equation = "L = E + (L0 - E) h / (1 + h), h = A / N^alpha + B / D^beta + C N^gamma / U^delta"
    source = "2605.09189 (Practical Scaling Laws)"
    parameters = ("E", "L0", "A", "alpha", "B", "beta", "C", "gamma", "delta")
    across_budgets = ("delta",)
    vanishing = ("E", "C")
    losses = ("E", "L0")
    grid: ClassVar = {
        "E": (0.3, 0.8),
        "L0": (2.0, 4.0),
        "A": (0.05, 0.5),
        "alpha": (0.3, 0.8),
        "B": (0.05, 0.5),
        "beta": (0.3, 0.8),
        "C": (0.01, 0.1),
        "gamma": (0.4, 1.0),
        "delta": (0.4, 1.0),
    }
    amplitudes: ClassVar = {
        "A": (("log_parameters", -1, "alpha"),),
        "B": (("log_tokens", -1, "beta"),),
        "C": (("log_parameters", 1, "gamma"), ("log_unique", -1, "delta")),
    }

    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient [..., P, R]: L is the mean of E and L0 with weights 1 and h."""
        e, l0, a, log_alpha, b, log_beta, c, log_gamma, log_delta = columns(theta)
        alpha_log_n = np.exp(log_alpha) * points.log_parameters
        beta_log_d = np.exp(log_beta) * points.log_tokens
        gamma_log_n = np.exp(log_gamma) * points.log_parameters
        delta_log_u = np.exp(log_delta) * points.log_unique
        shape = alpha_log_n.shape
        log_h, h_gradient = log_sum(
            [
                (a - alpha_log_n, stack((0, 0, 1, -alpha_log_n, *[0] * 5), shape)),
                (b - beta_log_d, stack((0, 0, 0, 0, 1, -beta_log_d, 0, 0, 0), shape)),
                (c + gamma_log_n - delta_log_u, stack((*[0] * 6, 1, gamma_log_n, -delta_log_u), shape)),
            ]
        )
        irreducible = (np.broadcast_to(e, shape), stack((1, *[0] * 8), shape))
        reducible = (l0 + log_h, h_gradient + stack((0, 1, *[0] * 7), shape))
        log_sum_of_losses, gradient = log_sum([irreducible, reducible])
        log_weight = np.logaddexp(0.0, log_h)  # log(1 + h)
        share = np.exp(log_h - log_weight)  # h / (1 + h)
        return log_sum_of_losses - log_weight, gradient - share[..., None, :] * h_gradient
