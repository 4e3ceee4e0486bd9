"""Blends: weighted mixtures of several data sets, its members.

`Shares`: sample n of a member with share w is due at time (n + 1/2) / w, and samples are read by due time. Any stretch
of the run contains every member in its share, to within a sample or two. The member of a sample index is computed
directly; no index is built, whatever the length of the run.

`GreedyShares`: Megatron's order, for runs that must read the samples of a Megatron run. It keeps the shares as well.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron.data.samples import TrainSamples, ValidationWindows


class Shares:
    """Assigns sample indices to members in proportion to `weights`, positive numbers that need not sum to 1."""

    def __init__(self, weights: Sequence[float]):
        largest = max(weights)  # divided out first, so that the sum cannot overflow
        total = math.fsum(weight / largest for weight in weights)
        self.shares = [weight / largest / total for weight in weights]

    def locate(self, sample_index: int) -> tuple[int, int]:
        """Return (member, index of the sample in that member)."""
        # samples due well before this one are counted in closed form, the last few are assigned one by one
        time = max(0.0, sample_index - 2.0 * len(self.shares))
        counts = [math.ceil(max(0.0, share * time - 0.5)) for share in self.shares]
        queue = [((count + 0.5) / share, member) for member, (count, share) in enumerate(zip(counts, self.shares))]
        heapq.heapify(queue)
        for _ in range(sample_index - sum(counts)):
            member = queue[0][1]
            counts[member] += 1
            heapq.heapreplace(queue, ((counts[member] + 0.5) / self.shares[member], member))
        member = queue[0][1]
        return member, counts[member]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples each member has."""
        if not samples:
            return [0] * len(self.shares)
        member, last = self.locate(samples - 1)
        due = (last + 0.5) / self.shares[member], member
        return [_due_until(due, other, share) for other, share in enumerate(self.shares)]

    def requested(self, samples: int) -> list[int]:
        """Return how many samples to request from each member for a run of `samples`; at least one."""
        return [max(1, count) for count in self.counts(samples)]


def _due_until(due: tuple[float, int], member: int, share: float) -> int:
    """Return how many samples of a member are due by `due` = (time, member); ties are ordered by member."""
    count = max(0, math.floor(share * due[0] + 0.5) - 1)
    while ((count + 0.5) / share, member) <= due:
        count += 1
    return count


class GreedyShares:
    """Assigns sample indices as Megatron's build_blending_indices does, in the same double-precision arithmetic.

    Sample k goes to the member with the largest w max(k, 1) - c, where c counts the samples it has; ties go to the
    first. There is no closed form, so the state at k depends on all samples before it. It is computed in four steps:

    1. Sample indices are cut into segments of LENGTH; SEGMENTS of them, a block, are assigned at once, [SEGMENTS,
       members].
    2. Each segment starts from the counts nearest to its shares, a guess; only the first of a block starts from known
       counts.
    3. Where a segment ends with other counts than the next started from, the next is assigned again from these.
       Different starting counts soon converge, so that this takes a round or two.
    4. When every segment starts from the counts at which the one before ends, the result equals assigning the samples
       one by one from the first.
    """

    LENGTH, SEGMENTS = 256, 1024

    def __init__(self, weights: Sequence[float]):
        # scaling by a power of two does not change the rounding and keeps the sum finite
        scaled = np.ldexp(np.array(weights, np.float64), -math.frexp(max(weights))[1])
        # normalised twice, and summed in two ways, as in Megatron-DeepSpeed: the last bits decide ties
        self._shares = scaled / np.cumsum(scaled)[-1]
        self._weights = self._shares / self._shares.sum()
        self._block_counts = [np.zeros(len(weights))]  # at the start of each block that was reached
        self._block = lru_cache(maxsize=2)(self._assign)

    def locate(self, sample_index: int) -> tuple[int, int]:
        """Return (member, index of the sample in that member)."""
        counts, members, offset = self._segment(sample_index)
        member = int(members[offset])
        return member, int(counts[member]) + int(np.count_nonzero(members[:offset] == member))

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples each member has."""
        counts, members, offset = self._segment(samples)
        return (counts.astype(np.int64) + np.bincount(members[:offset], minlength=len(counts))).tolist()

    def requested(self, samples: int) -> list[int]:
        """Return how many samples Megatron-DeepSpeed requests from each member: 0.5% more than its share.

        Megatron's order of a member depends on this number.
        """
        return [math.ceil(samples * share * 1.005) for share in self._shares.tolist()]

    def _segment(self, sample_index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the counts at the start of a sample's segment, the members of the segment, and the offset in it."""
        segment, offset = divmod(sample_index, self.LENGTH)
        block, segment = divmod(segment, self.SEGMENTS)
        for number in range(len(self._block_counts) - 1, block):
            self._block_counts.append(self._block(number)[0][-1].copy())
        counts, members = self._block(block)
        return counts[segment], members[segment], offset

    def _assign(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts before and after the segments of a block and the members of its samples.

        Shapes: counts [SEGMENTS + 1, members], members uint16 [SEGMENTS, LENGTH].
        """
        starts = (block * self.SEGMENTS + np.arange(self.SEGMENTS + 1)) * self.LENGTH
        counts = self._nearest(starts)
        counts[0] = self._block_counts[block]
        members = np.empty((self.SEGMENTS, self.LENGTH), np.uint16)
        pending = np.arange(self.SEGMENTS)
        while len(pending):
            ends, members[pending] = self._assign_segments(starts[pending], counts[pending])
            following = pending[(ends != counts[pending + 1]).any(axis=1)] + 1
            counts[pending + 1] = ends
            pending = following[following < self.SEGMENTS]
        return counts, members

    def _assign_segments(self, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts after the LENGTH samples from each of `starts`, and their members.

        `counts` are the counts at `starts`, [len(starts), members].
        """
        counts, segments = counts.copy(), np.arange(len(starts))
        members = np.empty((len(starts), self.LENGTH), np.uint16)
        for offset in range(self.LENGTH):
            deficits = self._weights * np.maximum(starts + offset, 1)[:, None] - counts
            members[:, offset] = deficits.argmax(axis=1)
            counts[segments, members[:, offset]] += 1
        return counts, members

    def _nearest(self, samples: np.ndarray) -> np.ndarray:
        """Return the whole counts nearest to the shares, which sum to each of `samples`, [len(samples), members]."""
        exact = self._weights * samples[:, None]
        counts = np.floor(exact)
        rank = (counts - exact).argsort(axis=1, kind="stable").argsort(axis=1)
        return counts + (rank < (samples - counts.sum(axis=1))[:, None])


BLEND_ORDERS = {"due-time": Shares, "megatron": GreedyShares}


class TrainBlend:
    """Training samples of several data sets by sample index, with the interface of `TrainSamples`."""

    def __init__(self, members: list[TrainSamples], weights: Sequence[float], order: str = "due-time"):
        self.members, self._shares = members, BLEND_ORDERS[order](weights)
        self.unique_tokens = sum(member.unique_tokens for member in members)

    def request(self, samples: int) -> None:
        """Set the number of samples of the run, before the first is read."""
        for member, count in zip(self.members, self._shares.requested(samples)):
            member.request(count)

    def __getitem__(self, sample_index: int) -> np.ndarray:
        member, index = self._shares.locate(sample_index)
        return self.members[member][index]

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs of each member after `samples` samples."""
        return [member.epochs(count)[0] for member, count in zip(self.members, self._shares.counts(samples))]


class ValidationBlend:
    """Windows of several data sets in proportion to their shares, with the interface of `ValidationWindows`.

    Documents are numbered through all members. Without a limit, there are as many windows as the shares allow without
    repeating any.
    """

    def __init__(self, members: list[ValidationWindows], weights: Sequence[float], limit: int | None = None):
        shares = Shares(weights)
        most = min(math.floor(len(member) / share) for member, share in zip(members, shares.shares))
        while any(count > len(member) for count, member in zip(shares.counts(most), members)):
            most -= 1
        counts = shares.counts(min(limit or most, most))
        self._members = [member.limited(count) for member, count in zip(members, counts) if count]
        first_documents = np.cumsum([0, *(member.documents for member in members)])
        self._first_documents = [int(first) for first, count in zip(first_documents, counts) if count]
        self._ends = np.cumsum([len(member) for member in self._members])
        self.seq_length = members[0].seq_length
        self.documents = int(first_documents[-1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        member = int(np.searchsorted(self._ends, window, side="right"))
        index = window - (int(self._ends[member - 1]) if member else 0)
        ids, documents = self._members[member][index]
        return ids, documents + self._first_documents[member]


def combined_hash(
    hashes: Sequence[str], weights: Sequence[float], unique_tokens: Sequence[int | None] | None = None
) -> str:
    """Return a hash of the members and shares of a blend; for a single member, its own hash.

    `unique_tokens` has the number of tokens to which each member is cut, None where it is whole.
    """
    if len(hashes) == 1:
        return hashes[0]
    cuts = unique_tokens or [None] * len(hashes)
    hashes = [member if cut is None else f"{member} {cut}" for member, cut in zip(hashes, cuts, strict=True)]
    shares = [f"{share:.9g}" for share in Shares(weights).shares]  # shares, so that scaled weights give the same hash
    return hashlib.sha256(repr([*zip(hashes, shares)]).encode()).hexdigest()
