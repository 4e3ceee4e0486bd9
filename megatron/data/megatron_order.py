"""Megatron's order of samples, for runs that must read what a published run read.

It is a function of document sizes, sequence length, seed and the number of samples asked for, so it changes with the
budget. Its epochs are not strict: the copies of all documents from all epochs are shuffled together, so that one
document may come back before another was read. Only where the last epoch is needed to less than 80% is it shuffled
apart from the others.
"""

import numpy as np


class MegatronOrder:
    """Document, sample and shuffle indices as Megatron's GPT data set builds them, and where a sample lies.

    sizes: tokens of each document [D]. Of the indices, `documents` holds the documents in the order they are
    concatenated, int32 [E * D], and `shuffle` which stretch of the concatenation each sample is, [n]; stretch i is its
    tokens i*S .. i*S + S. Both are drawn from one RandomState(seed), the generator of the original.
    """

    def __init__(self, sizes: np.ndarray, seq_length: int, seed: int, requested: int):
        total = int(sizes.sum(dtype=np.int64))
        epochs = _epochs(total, seq_length, requested)
        without_last = ((epochs - 1) * total - 1) // seq_length
        whole = (total - 1) // seq_length
        apart = epochs > 1 and requested - without_last < int(0.8 * whole)
        random = np.random.RandomState(seed)
        blocks = [epochs - 1, 1] if apart else [epochs]
        self.documents = np.concatenate(
            [_shuffled(np.tile(np.arange(len(sizes), dtype=np.int32), n), random) for n in blocks]
        )
        count = (epochs * total - 1) // seq_length
        kind = np.uint32 if count < 2**32 - 2 else np.int64
        edges = [0, without_last, count] if apart else [0, count]
        self.shuffle = np.concatenate(
            [_shuffled(np.arange(first, last, dtype=kind), random) for first, last in zip(edges, edges[1:])]
        )
        self.ends = np.cumsum(sizes[self.documents], dtype=np.int64)  # of the documents in the concatenation


def _epochs(total: int, seq_length: int, requested: int) -> int:
    """Return the smallest number of epochs whose tokens give enough samples, each of which borrows one token more."""
    epochs = -(-(requested * seq_length + 1) // total)
    while (epochs * total - 1) // seq_length < requested:
        epochs += 1
    return epochs


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values
