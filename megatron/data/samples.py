"""From a run position to token ids: arithmetic on (seed, epoch), nothing remembered but a cache.

Epochs are strict, in all orders but Megatron's: every token of the unique set is read once before any is read twice.
The stream of an epoch order is endless, sample i is its tokens i*S .. i*S + S, and the last of them is only a target.
"""

from copy import copy
from functools import lru_cache

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.data.megatron_order import MegatronOrder
from megatron.errors import ConfigurationError
from megatron.randomness import stream


class _Documents:
    """The documents of the first `total` tokens of a data set in file order, the last one cut.

    With `trailing`, those without tokens at the end of the whole data set too, which Megatron shuffles with the others.
    """

    def __init__(self, dataset: IndexedDataset, total: int, trailing: bool = False):
        self.total = total
        ends = np.cumsum(dataset.sizes, dtype=np.int64)
        self.documents = int(np.searchsorted(ends, self.total)) + 1
        if trailing and self.total == dataset.total_tokens:
            self.documents = len(dataset)
        self.sizes = dataset.sizes[: self.documents].astype(np.int64)
        self.sizes[-1] -= ends[self.documents - 1] - self.total
        self.ends = np.cumsum(self.sizes)
        self._dataset = dataset

    def gather(self, order, ends: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens start .. start+count-1 of the documents laid out in `order`, and the document of each.

        `ends` are the cumulative sizes in that order; the range lies within them.
        """
        tokens, owners = np.empty(count, np.int64), np.empty(count, np.int64)
        slot, done = int(np.searchsorted(ends, start, side="right")), 0
        while done < count:
            document = int(order[slot])
            offset = start + done - (int(ends[slot]) - int(self.sizes[document]))
            part = self._dataset.read(document, offset, min(int(self.sizes[document]), offset + count - done))
            tokens[done : done + len(part)], owners[done : done + len(part)] = part, document
            done, slot = done + len(part), slot + 1
        return tokens, owners


class TrainSamples:
    """Training samples by run position: `samples[i]` is int64 [S+1]."""

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        epoch_order: str = "documents",
        unique_tokens: int | None = None,
    ):
        if unique_tokens is not None and unique_tokens > dataset.total_tokens:
            raise ConfigurationError(
                f"--train-unique-tokens {unique_tokens}: {dataset.prefix}.bin holds {dataset.total_tokens}; "
                "ask for fewer or add text"
            )
        self.unique_tokens, self.seq_length, self._seed = unique_tokens or dataset.total_tokens, seq_length, seed
        _check_length(dataset, self.unique_tokens, seq_length)
        self._dataset = dataset
        if epoch_order != "windows":
            # the other order leaves empty documents at the end out, and what a seed draws there must not change
            self._source = _Documents(dataset, self.unique_tokens, trailing=epoch_order == "megatron")
            self._epoch = lru_cache(maxsize=2)(self._lay_out)
        orders = {"documents": self._documents, "windows": self._windows, "megatron": self._megatron}
        self.epoch_order, self._read = epoch_order, orders[epoch_order]

    def request(self, samples: int) -> None:
        """Say how many samples the run reads in all, before the first is read: Megatron's order depends on it."""
        if self.epoch_order == "megatron":
            self._order = MegatronOrder(self._source.sizes, self.seq_length, self._seed, samples)

    def __getitem__(self, position: int) -> np.ndarray:
        return self._read(position)

    def epochs(self, samples: int) -> list[float]:
        """Return how often the data set has been read after so many samples; a list, as of a blend."""
        return [samples * self.seq_length / self.unique_tokens]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = stream(self._seed, "documents", epoch).permutation(self._source.documents)
        return order, np.cumsum(self._source.sizes[order])

    def _documents(self, position: int) -> np.ndarray:
        """Documents shuffled anew every epoch and packed; the stream runs on across epochs."""
        start, wanted, parts = position * self.seq_length, self.seq_length + 1, []
        while wanted:
            epoch, offset = divmod(start, self.unique_tokens)
            count = min(wanted, self.unique_tokens - offset)
            parts.append(self._source.gather(*self._epoch(epoch), offset, count)[0])
            start, wanted = start + count, wanted - count
        return np.concatenate(parts)

    def _megatron(self, position: int) -> np.ndarray:
        # what fills up a short last batch lies beyond the order; it has no weight
        start = int(self._order.shuffle[position % len(self._order.shuffle)]) * self.seq_length
        return self._source.gather(self._order.documents, self._order.ends, start, self.seq_length + 1)[0]

    def _windows(self, position: int) -> np.ndarray:
        """Cuts of the file as a ring, at an offset redrawn every epoch, in a keyed order: no start-up cost.

        Where the length does not divide the unique tokens, an epoch leaves out less than one window, elsewhere
        each time.
        """
        count = self.unique_tokens // self.seq_length
        epoch, turn = divmod(position, count)
        first = int(stream(self._seed, "window offset", epoch).integers(self.unique_tokens))
        window = _shuffled(turn, count, self._seed, epoch)
        start, wanted, parts = (first + window * self.seq_length) % self.unique_tokens, self.seq_length + 1, []
        while wanted:
            part = min(wanted, self.unique_tokens - start)
            parts.append(self._dataset.stream(start, start + part))
            start, wanted = 0, wanted - part
        return np.concatenate(parts).astype(np.int64)


class ValidationWindows:
    """Windows side by side in file order: `windows[w]` is (ids, document of each id), both int64 [S+1].

    With a limit they are spread evenly over the file, so that few windows still see many documents.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, limit: int | None = None):
        _check_length(dataset, dataset.total_tokens, seq_length)
        self._source = _Documents(dataset, dataset.total_tokens)
        available = (self._source.total - 1) // seq_length
        self.seq_length, self._available, self._length = seq_length, available, min(limit or available, available)
        self.documents = len(dataset)

    def limited(self, count: int) -> "ValidationWindows":
        """Return the same with another limit."""
        other = copy(self)
        other._length = min(count, self._available)
        return other

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * self._available // self._length * self.seq_length
        return self._source.gather(range(self._source.documents), self._source.ends, start, self.seq_length + 1)


def _check_length(dataset: IndexedDataset, tokens: int, seq_length: int) -> None:
    if tokens < seq_length + 1:
        source = f"{dataset.prefix}.bin holds" if tokens == dataset.total_tokens else "--train-unique-tokens leaves"
        raise ConfigurationError(
            f"--seq-length {seq_length}: one sample needs {seq_length + 1} tokens and {source} {tokens}; "
            "shorten it or add text"
        )


def _shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Return where `index` goes in a keyed permutation of range(count), in constant time and memory.

    A four-round Feistel network over the next power of four, walked until it falls inside the range
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    keys = stream(seed, "window order", epoch).integers(1 << 32, size=4).tolist()
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for key in keys:
            mixed = (right * 0x9E3779B1 + key) & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 16) & (1 << half) - 1
        index = left << half | right
        if index < count:
            return index
