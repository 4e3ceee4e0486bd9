"""The key of evaluation noise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationNoise:
    """The key of one replicate of an evaluation's noise; training seed, batch size and step have no part in it."""

    seed: int
    set_name: str
    replicate: int
