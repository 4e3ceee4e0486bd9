"""Ranges of numbers, as flags declare them, messages state them and --help shows them."""

import re
from dataclasses import dataclass
from math import inf

INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval of numbers, in the notation of mathematics: `[0, 1)` has 0 and not 1."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Return the interval that `text` writes, such as "[0, 1)" or "[1, inf)".

        Raises: TypeError if it is none.
        """
        match = INTERVAL.fullmatch(text)
        if not match:
            raise TypeError(f"{text}: is not an interval")
        opening, low, high, closing = match.groups()
        return cls(low=float(low), high=float(high), open_low=opening == "(", open_high=closing == ")")

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """The range in words, as in "positive", "at least 1" or "in [0, 1)"."""
        if self.high < inf:
            opening, closing = "[("[self.open_low], "])"[self.open_high]
            return f"in {opening}{self.low:g}, {self.high:g}{closing}"
        if self.open_low:
            return "positive" if self.low == 0 else f"above {self.low:g}"
        return "not negative" if self.low == 0 else f"at least {self.low:g}"

    @property
    def requirement(self) -> str:
        """What a value must be, as in "must be at least 1" or "must not be negative"."""
        words = str(self)
        return "must not be negative" if words == "not negative" else f"must be {words}"
