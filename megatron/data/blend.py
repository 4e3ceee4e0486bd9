"""Several data sets read as one, each at its share of the samples.

`Shares`: sample n of a member with share w is due at (n + 1/2) / w, and samples are read in the order in which they are
due, so that any stretch of the run holds every member in its share, to within a sample or two. Which sample stands at a
run position follows from arithmetic alone; nothing is built, whatever the length of the run.

`GreedyShares`: Megatron's order, for runs that must read what a Megatron run read. It holds the shares as well.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

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

    def requested(self, positions: int) -> list[int]:
        """Return how many samples each member is to have ready for so many positions; at least one."""
        return [max(1, count) for count in self.counts(positions)]


def _due_until(due: tuple[float, int], member: int, share: float) -> int:
    """Return how many samples of a member are due no later than `due`, (time, member); ties go by member."""
    count = max(0, math.floor(share * due[0] + 0.5) - 1)
    while ((count + 0.5) / share, member) <= due:
        count += 1
    return count


class GreedyShares:
    """Positions dealt as Megatron's build_blending_indices deals them, in the same double-precision arithmetic.

    Position k goes to the member with the largest w max(k, 1) - c, c being the samples it has had; of equals, to the
    first. There is no formula for k, so the state at k follows from all positions before it, in four steps:

    1. Positions are cut into segments of LENGTH, and SEGMENTS of them, a block, are dealt at once, [SEGMENTS, members].
    2. A segment begins with the counts nearest to its shares, a guess; only a block's first begins with known ones.
    3. Where a segment ends with other counts than the next began with, the next is dealt again from these. Different
       beginnings soon come to the same counts, so that this takes a round or two.
    4. When no segment ends otherwise than the next begins, all are as if dealt one by one from the first position.
    """

    LENGTH, SEGMENTS = 256, 1024

    def __init__(self, weights: Sequence[float]):
        # a power of two, which changes no rounding, keeps the sum finite
        scaled = np.ldexp(np.array(weights, np.float64), -math.frexp(max(weights))[1])
        # normalised twice, and summed in two ways, as Megatron-DeepSpeed does: the last bits decide between equals
        self._shares = scaled / np.cumsum(scaled)[-1]
        self._weights = self._shares / self._shares.sum()
        self._known = [np.zeros(len(weights))]  # counts at the beginning of each block
        self._block = lru_cache(maxsize=2)(self._deal)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (member, which of its samples) of a position."""
        counts, members, offset = self._segment(position)
        member = int(members[offset])
        return member, int(counts[member]) + int(np.count_nonzero(members[:offset] == member))

    def counts(self, positions: int) -> list[int]:
        """Return how many of the first `positions` fall to each member."""
        counts, members, offset = self._segment(positions)
        return (counts.astype(np.int64) + np.bincount(members[:offset], minlength=len(counts))).tolist()

    def requested(self, positions: int) -> list[int]:
        """Return the samples that Megatron-DeepSpeed asks each member for: 0.5% more than its share.

        Megatron's order of a member depends on it.
        """
        return [math.ceil(positions * share * 1.005) for share in self._shares.tolist()]

    def _segment(self, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return a position's segment, the counts at its beginning and its members, and the offset in it."""
        segment, offset = divmod(position, self.LENGTH)
        block, segment = divmod(segment, self.SEGMENTS)
        for number in range(len(self._known) - 1, block):
            self._known.append(self._block(number)[0][-1].copy())
        counts, members = self._block(block)
        return counts[segment], members[segment], offset

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts around the segments of a block, [SEGMENTS + 1, members], and their members, uint16."""
        starts = (block * self.SEGMENTS + np.arange(self.SEGMENTS + 1)) * self.LENGTH
        counts = self._nearest(starts)
        counts[0] = self._known[block]
        members = np.empty((self.SEGMENTS, self.LENGTH), np.uint16)
        pending = np.arange(self.SEGMENTS)
        while len(pending):
            ends, members[pending] = self._deal_segments(starts[pending], counts[pending])
            following = pending[(ends != counts[pending + 1]).any(axis=1)] + 1
            counts[pending + 1] = ends
            pending = following[following < self.SEGMENTS]
        return counts, members

    def _deal_segments(self, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts after LENGTH positions from each of `starts`, where `counts` hold, and their members."""
        counts, rows = counts.copy(), np.arange(len(starts))
        members = np.empty((len(starts), self.LENGTH), np.uint16)
        for offset in range(self.LENGTH):
            behind = self._weights * np.maximum(starts + offset, 1)[:, None] - counts
            members[:, offset] = behind.argmax(axis=1)
            counts[rows, members[:, offset]] += 1
        return counts, members

    def _nearest(self, positions: np.ndarray) -> np.ndarray:
        """Return whole counts nearest to the shares at each of `positions` that add up to it, [positions, members]."""
        exact = self._weights * positions[:, None]
        counts = np.floor(exact)
        rank = (counts - exact).argsort(axis=1, kind="stable").argsort(axis=1)
        return counts + (rank < (positions - counts.sum(axis=1))[:, None])


BLEND_ORDERS = {"due-time": Shares, "megatron": GreedyShares}


class TrainBlend:
    """Training samples of several data sets by run position; reads like `TrainSamples`."""

    def __init__(self, members: list[TrainSamples], weights: Sequence[float], order: str = "due-time"):
        self.members, self._shares = members, BLEND_ORDERS[order](weights)
        self.unique_tokens = sum(member.unique_tokens for member in members)

    def request(self, samples: int) -> None:
        for member, count in zip(self.members, self._shares.requested(samples)):
            member.request(count)

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
