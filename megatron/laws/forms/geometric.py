"""The law of 2507.15857: each further epoch is worth a constant share of the one before."""

from typing import ClassVar

import numpy as np

from megatron.laws.forms.repetition import Repetition


class Geometric(Repetition):
    """L = E + A / N'^alpha + B / D'^beta with D' = U (1 - (1 - d)^e) / d over e epochs (Prabhudesai et al. 2507.15857).

    d is the share of its value that a token loses with each repetition, R_D* = (1 - d) / d, and N' is the same formula
    of U_N with R_N*, as in Muennighoff's law. That law's exponential is the limit of small d: at the R_D* of Table 1
    of the paper, 31.19 (AR) and 493.89 (MDM), both give the same D' within 1.6% and 0.1%. The paper prints no A, B,
    alpha, beta and E, so that this form has no published base; its text has 31.93 and 512.85 instead of Table 1's.
    """

    name = "geometric"
    equation = (
        "L = E + A / N'^alpha + B / D'^beta, D' = U (1 - (1 - d)^e) / d, d = 1 / (1 + R_D*), e = D / U, "
        "N' likewise of N / U_N and R_N*, U_N = min(N, N_opt(U))"
    )
    source = "Prabhudesai et al. 2507.15857"
    published: ClassVar = {}

    def _gained(self, extra: np.ndarray, log_decay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the value R* (1 - (1 - d)^R) of R repetitions, its derivative by log R*, and that by R."""
        decay = np.maximum(np.exp(log_decay), 1e-300)
        rate = np.log1p(1 / decay)  # -log(1 - d)
        unit = np.where(decay > 1e8, 1.0, np.minimum(decay, 1e8) * rate)  # R* rate, which approaches 1
        ratio = extra * rate
        left = np.exp(-ratio)
        small = ratio < 1e-4
        safe, tiny = np.maximum(ratio, 1e-4), np.minimum(ratio, 1e-4)
        gained = extra * unit * np.where(small, 1 - tiny / 2 + tiny**2 / 6, -np.expm1(-safe) / safe)
        share = 1 / (1 + 1 / decay)
        exact = gained - extra * left * share
        # for small ratios, of unit - share, the expansion in 1 / R* too
        difference = np.where(decay > 1e4, 0.5 / decay - 2 / (3 * decay**2), unit - share)
        series = extra * (difference - tiny * (unit / 2 - share) + tiny**2 * (unit / 6 - share / 2))
        return gained, np.where(small, series, exact), left * unit
