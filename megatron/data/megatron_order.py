"""Megatron's order of samples, for runs that must read the samples of a published run.

It is a function of document sizes, sequence length, seed and the number of requested samples, so it changes with the
budget. Its epochs are not strict: the documents of all epochs are shuffled together, so that one document may be read
twice before another is read once. Only a last epoch of which less than 80% is needed is shuffled separately.
"""

from itertools import pairwise

import numpy as np


class MegatronOrder:
    """Document and shuffle index as in Megatron's GPTDataset.

    `sizes`: tokens of each document, [D].
    `documents`: the documents in the order of concatenation, int32 [E * D].
    `shuffle`: for each sample its segment of the concatenation, [n]; segment i is tokens i*S .. i*S + S.
    `ends`: cumulative sizes of `documents`, int64 [E * D].
    Both orders are drawn from one RandomState(seed), the generator of the original.
    """

    def __init__(self, sizes: np.ndarray, seq_length: int, seed: int, requested: int):
        total = int(sizes.sum(dtype=np.int64))
        epochs = _epochs(total, seq_length, requested)
        samples_before_last = ((epochs - 1) * total - 1) // seq_length
        samples_per_epoch = (total - 1) // seq_length
        separate_last = epochs > 1 and requested - samples_before_last < int(0.8 * samples_per_epoch)
        random = np.random.RandomState(seed)
        blocks = [epochs - 1, 1] if separate_last else [epochs]
        self.documents = np.concatenate(
            [_shuffled(np.tile(np.arange(len(sizes), dtype=np.int32), n), random) for n in blocks]
        )
        count = (epochs * total - 1) // seq_length
        dtype = np.uint32 if count < 2**32 - 2 else np.int64
        edges = [0, samples_before_last, count] if separate_last else [0, count]
        self.shuffle = np.concatenate(
            [_shuffled(np.arange(first, last, dtype=dtype), random) for first, last in pairwise(edges)]
        )
        self.ends = np.cumsum(sizes[self.documents], dtype=np.int64)


def _epochs(total: int, seq_length: int, requested: int) -> int:
    """Return the smallest number of epochs with `requested` samples, the last of which needs one token more."""
    epochs = -(-(requested * seq_length + 1) // total)
    while (epochs * total - 1) // seq_length < requested:
        epochs += 1
    return epochs


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values
