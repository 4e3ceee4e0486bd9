"""Maps a sample index to token ids, as a function of seed and epoch, without state except a cache.

Epochs are strict, in all orders except Megatron's: every unique token is read once before any is read twice. The token
stream is infinite: sample i is its tokens i*S .. i*S + S, the last of which is only a target.
"""

from copy import copy
from functools import lru_cache

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.data.megatron_order import MegatronOrder
from megatron.errors import ConfigurationError
from megatron.randomness import stream


class _Documents:
    """The documents of the first `total` tokens of a data set in file order, the last document cut.

    `trailing` includes empty documents at the end of the data set, which Megatron shuffles with the others.
    `sizes` are their tokens, int32 [documents].
    """

    def __init__(self, dataset: IndexedDataset, total: int, trailing: bool = False):
        self.total = total
        self.documents = dataset.documents_with(total)
        beyond = dataset.tokens_between(0, self.documents) - total
        if trailing and total == dataset.total_tokens:
            self.documents = len(dataset)
            dataset.check_documents(self.documents)
        self.sizes = dataset.sizes[: self.documents]
        if beyond:
            self.sizes = self.sizes.copy()
            self.sizes[-1] -= beyond
        self._dataset = dataset

    def gather(self, order, ends: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens start .. start+count-1 of the documents concatenated in `order`, and the document of each.

        `ends` are the cumulative sizes in that order; the range is within them. Both results are int64 [count].
        """
        tokens = np.empty(count, np.int64)
        documents = np.empty(count, np.int64)
        slot = int(np.searchsorted(ends, start, side="right"))
        filled = 0
        while filled < count:
            document = int(order[slot])
            size = int(self.sizes[document])
            offset = start + filled - (int(ends[slot]) - size)
            chunk = self._dataset.read(document, offset, min(size, offset + count - filled))
            tokens[filled : filled + len(chunk)] = chunk
            documents[filled : filled + len(chunk)] = document
            filled += len(chunk)
            slot += 1
        return tokens, documents


class TrainSamples:
    """Training samples by sample index: `samples[i]` is int64 [S+1].

    `unique_tokens` are the first ones of the data set, by default all; messages name them `cut_by`. A published subset
    that is given by its name must end where a document ends.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        epoch_order: str = "documents",
        unique_tokens: int | None = None,
        *,
        cut_by: str = "--train-unique-tokens",
    ):
        if unique_tokens is not None:
            _check_cut(dataset, unique_tokens, cut_by)
        self.unique_tokens, self.seq_length, self._seed = unique_tokens or dataset.total_tokens, seq_length, seed
        _check_length(dataset, self.unique_tokens, seq_length, cut_by)
        self._dataset = dataset
        self._first_window = lru_cache(maxsize=2)(self._drawn_offset)
        if epoch_order != "windows":
            # "documents" leaves out empty documents at the end, so that the order that a seed gives does not change
            self._source = _Documents(dataset, self.unique_tokens, trailing=epoch_order == "megatron")
            self._epoch = lru_cache(maxsize=2)(self._shuffled_documents)
        orders = {"documents": self._documents, "windows": self._windows, "megatron": self._megatron}
        self.epoch_order, self._read = epoch_order, orders[epoch_order]

    def request(self, samples: int) -> None:
        """Set the number of samples of the run, before the first is read: Megatron's order depends on it."""
        if self.epoch_order == "megatron":
            self._order = MegatronOrder(self._source.sizes, self.seq_length, self._seed, samples)

    def __getitem__(self, sample_index: int) -> np.ndarray:
        return self._read(sample_index)

    def epochs(self, samples: int) -> list[float]:
        """Return [epochs after `samples` samples], a list as for a blend."""
        return [samples * self.seq_length / self.unique_tokens]

    def _shuffled_documents(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in shuffled order, and their cumulative sizes."""
        order = stream(self._seed, "documents", epoch).permutation(self._source.documents)
        return order, np.cumsum(self._source.sizes[order], dtype=np.int64)

    def _documents(self, sample_index: int) -> np.ndarray:
        """Documents are shuffled again every epoch and packed; a sample may span two epochs."""
        start = sample_index * self.seq_length
        remaining = self.seq_length + 1
        chunks = []
        while remaining:
            epoch, offset = divmod(start, self.unique_tokens)
            count = min(remaining, self.unique_tokens - offset)
            chunks.append(self._source.gather(*self._epoch(epoch), offset, count)[0])
            start += count
            remaining -= count
        return np.concatenate(chunks)

    def _megatron(self, sample_index: int) -> np.ndarray:
        """Megatron's order; samples that only pad a short last batch have no weight, and any sample serves."""
        start = int(self._order.shuffle[sample_index % len(self._order.shuffle)]) * self.seq_length
        return self._source.gather(self._order.documents, self._order.ends, start, self.seq_length + 1)[0]

    def _windows(self, sample_index: int) -> np.ndarray:
        """Windows of the file as a ring, cut at an offset drawn every epoch, in a keyed order: no start-up cost.

        Where the sequence length does not divide the unique tokens, an epoch leaves out less than one window, at
        another place in each epoch.
        """
        windows = self.unique_tokens // self.seq_length
        epoch, index = divmod(sample_index, windows)
        window = _shuffled(index, windows, self._seed, epoch)
        start = (self._first_window(epoch) + window * self.seq_length) % self.unique_tokens
        remaining = self.seq_length + 1
        chunks = []
        while remaining:
            count = min(remaining, self.unique_tokens - start)
            chunks.append(self._dataset.stream(start, start + count))
            start = 0
            remaining -= count
        return np.concatenate(chunks).astype(np.int64)

    def _drawn_offset(self, epoch: int) -> int:
        """Return the token at which the windows of an epoch begin."""
        return int(stream(self._seed, "window offset", epoch).integers(self.unique_tokens))


class ValidationWindows:
    """Consecutive windows in file order: `windows[w]` is (ids, document of each id), both int64 [S+1].

    With a limit they are spread evenly over the file, so that few windows still cover many documents.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, limit: int | None = None):
        _check_length(dataset, dataset.total_tokens, seq_length, "")
        self._source = _Documents(dataset, dataset.total_tokens)
        self._ends = np.cumsum(self._source.sizes, dtype=np.int64)
        available = (self._source.total - 1) // seq_length
        self.seq_length = seq_length
        self._available = available
        self._length = min(limit or available, available)
        self.documents = len(dataset)

    def limited(self, count: int) -> "ValidationWindows":
        """Return the same windows with another limit."""
        windows = copy(self)
        windows._length = min(count, self._available)
        return windows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * self._available // self._length * self.seq_length
        return self._source.gather(range(self._source.documents), self._ends, start, self.seq_length + 1)


def _check_cut(dataset: IndexedDataset, tokens: int, cut_by: str) -> None:
    """Check that a data set holds `tokens` tokens, and a whole number of documents if they are a published subset."""
    subset = getattr(tokens, "subset", None)
    named = f"{cut_by} {subset or tokens}"
    if tokens > dataset.total_tokens:
        raise ConfigurationError(
            f"{named}: {_holds(dataset)} {dataset.total_tokens}"
            + (f" tokens, and the published subset {int(tokens)}" if subset else "")
            + "; lower it or add text"
        )
    if subset and tokens < dataset.total_tokens:
        documents = dataset.documents_with(tokens)
        if dataset.tokens_between(0, documents) != tokens:
            before, after = (dataset.tokens_between(0, count) for count in (documents - 1, documents))
            raise ConfigurationError(
                f"{named}: is the first documents of the data set that it names, of {int(tokens)} tokens, and in "
                f"{dataset.prefix} documents end at tokens {before} and {after}: it has other text, another order or "
                f"another tokenizer; give data in the published order, or the number {int(tokens)}"
            )


def _check_length(dataset: IndexedDataset, tokens: int, seq_length: int, cut_by: str) -> None:
    if tokens < seq_length + 1:
        source = _holds(dataset) if tokens == dataset.total_tokens else f"{cut_by} leaves"
        raise ConfigurationError(
            f"--seq-length {seq_length}: one sample needs {seq_length + 1} tokens and {source} {tokens}; "
            "shorten it or add text"
        )


def _holds(dataset: IndexedDataset) -> str:
    """Return what holds the tokens of a data set, for messages."""
    return f"{dataset.prefix}.bin holds" if dataset.is_whole else f"the share of {dataset.prefix} by --split holds"


def _shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Return the image of `index` under a keyed permutation of range(count), in constant time and memory.

    A four-round Feistel network over the next power of four, applied until the result is in the range: cycle walking
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    keys = _round_keys(seed, epoch)
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


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> list[int]:
    """Return the keys of the four rounds of an epoch's permutation."""
    return stream(seed, "window order", epoch).integers(1 << 32, size=4).tolist()
