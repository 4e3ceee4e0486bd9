"""Training compute of a law: C = 6 M D FLOPs for D training tokens, M being the parameters that a token passes through.

N of a law are the parameters of the model, each counted once. M equals N unless blocks run in loops, where M counts a
block once for each use, or the objective passes every sample through the model several times, where M counts all
passes. Records have the FLOPs, so that M = FLOPs / 6D is known at the sizes of the runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.errors import ConfigurationError

SAME = 1e-6  # relative difference of equal M


@dataclass(frozen=True, eq=False)
class Compute:
    """M as a function of N: log M is linear in log N between the sizes of the runs, M / N constant beyond them."""

    log_sizes: np.ndarray  # [K] log N, ascending
    log_computed: np.ndarray  # [K] log M, ascending

    def computed(self, log_parameters: Any) -> Any:
        """Return log M at log N."""
        return log_parameters + self._log_factor(log_parameters)

    def parameters(self, log_computed: Any) -> Any:
        """Return log N at log M, the inverse of `computed`."""
        if self is PLAIN:
            return log_computed
        return log_computed + np.interp(log_computed, self.log_computed, self.log_sizes - self.log_computed)

    def flops(self, parameters: Any, tokens: Any) -> Any:
        """Return C in FLOPs at N parameters and D training tokens."""
        return 6 * (parameters * np.exp(self._log_factor(np.log(parameters)))) * tokens

    def _log_factor(self, log_parameters: Any) -> Any:
        """Return log(M / N) at log N."""
        if self is PLAIN:
            return 0.0
        return np.interp(log_parameters, self.log_sizes, self.log_computed - self.log_sizes)

    def note(self) -> tuple[str, ...]:
        """Return a line on M for the header of a fit; none where M is N."""
        if self is PLAIN:
            return ()
        factors = np.exp(self.log_computed - self.log_sizes)
        span = " to ".join(dict.fromkeys(f"{factor:.3g}" for factor in (factors.min(), factors.max())))
        return (f"compute counts every use of a block and every pass: {span} times 6 N D, as in the FLOPs of the runs",)

    def to_json(self) -> dict[str, list[float]] | None:
        """Return what `from_json` reads: N and M of the runs; None where M is N."""
        if self is PLAIN:
            return None
        return {"parameters": np.exp(self.log_sizes).tolist(), "computed": np.exp(self.log_computed).tolist()}

    @classmethod
    def from_json(cls, record: dict[str, list[float]] | None) -> "Compute":
        """Return the compute of a record that `to_json` wrote."""
        return cls(np.log(record["parameters"]), np.log(record["computed"])) if record else PLAIN


PLAIN = Compute(np.zeros(1), np.zeros(1))  # M = N


def compute_of(parameters: np.ndarray, tokens: np.ndarray, flops: np.ndarray, source: str) -> Compute:
    """Return the compute of runs from their N, D and FLOPs, [R] each; `PLAIN` where FLOPs are 6 N D or not recorded.

    Raises: ConfigurationError if M is no increasing function of N: runs with several numbers of loops or passes.
    """
    computed = flops / (6 * tokens)
    if not np.isfinite(computed).all() or np.allclose(computed, parameters, rtol=SAME, atol=0):
        return PLAIN
    sizes = np.unique(parameters)
    lowest, highest = (np.array([end(computed[parameters == size]) for size in sizes]) for end in (np.min, np.max))
    if (highest > lowest * (1 + SAME)).any() or (lowest[1:] <= highest[:-1]).any():
        factors = computed / parameters
        raise ConfigurationError(
            f"{source}: mixes loops or passes: runs take {factors.min():.3g} to {factors.max():.3g} times 6 N D FLOPs, "
            "and N does not decide how many; choose with --where, such as 'num-loops=2', or count 6 N D: --mixed flops"
        )
    return Compute(np.log(sizes), np.log(lowest))
