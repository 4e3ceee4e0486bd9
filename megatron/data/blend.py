"""Several data sets read as one, each at its share of the samples.

Sample n of a member with share w is due at (n + 1/2) / w, and samples are read in the order in which they are due, so
that any stretch of the run holds every member in its share, to within a sample or two. Which sample stands at a run
position follows from arithmetic alone; nothing is built, whatever the length of the run.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence

import numpy as np

from megatron.data.samples import TrainSamples, ValidationWindows


class Shares:
    """Positions dealt to members in proportion to `weights`, positive numbers that need not add up to 1."""

    def __init__(self, weights: Sequence[float]):
        largest = max(weights)  # taken out first, so that no sum overflows
        total = math.fsum(weight / largest for weight in weights)
        self.shares = [weight / largest / total for weight in weights]

    def locate(self, position: int) -> tuple[int, int]:
        """Return (member, which of its samples) of a position."""
        # all that is due well before is counted at once, the few that follow are dealt one by one
        time = max(0.0, position - 2.0 * len(self.shares))
        dealt = [math.ceil(max(0.0, share * time - 0.5)) for share in self.shares]
        queue = [((count + 0.5) / share, member) for member, (count, share) in enumerate(zip(dealt, self.shares))]
        heapq.heapify(queue)
        for _ in range(position - sum(dealt)):
            member = queue[0][1]
            dealt[member] += 1
            heapq.heapreplace(queue, ((dealt[member] + 0.5) / self.shares[member], member))
        member = queue[0][1]
        return member, dealt[member]

    def counts(self, positions: int) -> list[int]:
        """Return how many of the first `positions` fall to each member."""
        if not positions:
            return [0] * len(self.shares)
        member, last = self.locate(positions - 1)
        due = (last + 0.5) / self.shares[member], member
        return [_due_until(due, other, share) for other, share in enumerate(self.shares)]


def _due_until(due: tuple[float, int], member: int, share: float) -> int:
    """Return how many samples of a member are due no later than `due`, (time, member); ties go by member."""
    count = max(0, math.floor(share * due[0] + 0.5) - 1)
    while ((count + 0.5) / share, member) <= due:
        count += 1
    return count


class TrainBlend:
    """Training samples of several data sets by run position; reads like `TrainSamples`."""

    def __init__(self, members: list[TrainSamples], weights: Sequence[float]):
        self.members, self._shares = members, Shares(weights)
        self.unique_tokens = sum(member.unique_tokens for member in members)

    def request(self, samples: int) -> None:
        for member, count in zip(self.members, self._shares.counts(samples)):
            member.request(max(1, count))

    def __getitem__(self, position: int) -> np.ndarray:
        member, index = self._shares.locate(position)
        return self.members[member][index]

    def epochs(self, samples: int) -> list[float]:
        """Return how often each member has been read after so many samples."""
        return [member.epochs(count)[0] for member, count in zip(self.members, self._shares.counts(samples))]


class ValidationBlend:
    """Windows of several data sets, each at its share; reads like `ValidationWindows`, documents numbered on.

    Without a limit, as many as the shares allow without reading any window twice.
    """

    def __init__(self, parts: list[ValidationWindows], weights: Sequence[float], limit: int | None = None):
        shares = Shares(weights)
        most = min(math.floor(len(part) / share) for part, share in zip(parts, shares.shares))
        while any(count > len(part) for count, part in zip(shares.counts(most), parts)):
            most -= 1
        counts = shares.counts(min(limit or most, most))
        self._parts = [part.limited(count) for part, count in zip(parts, counts) if count]
        before = np.cumsum([0, *(part.documents for part in parts)])
        self._documents_before = [int(first) for first, count in zip(before, counts) if count]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.seq_length, self.documents = parts[0].seq_length, int(before[-1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        part = int(np.searchsorted(self._ends, window, side="right"))
        within = window - (int(self._ends[part - 1]) if part else 0)
        ids, documents = self._parts[part][within]
        return ids, documents + self._documents_before[part]


def combined_hash(hashes: Sequence[str], weights: Sequence[float]) -> str:
    """Return one hash of a blend's members and shares; of a single member, its own."""
    if len(hashes) == 1:
        return hashes[0]
    shares = [f"{share:.9g}" for share in Shares(weights).shares]  # the same mixture in another scale has the same
    return hashlib.sha256(repr([*zip(hashes, shares)]).encode()).hexdigest()
