"""Passages of a run's validation data, the texts that are scored."""

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.training.load_run import Trained


def passages(run: Trained, sizes: list[int], seed: int) -> list[list[int]]:
    """Return token sequences from the validation data of a run, each within one document."""
    dataset = IndexedDataset(run.config.data.valid_data_path[-1].split("=")[-1], run.vocabulary.size)
    documents = [np.asarray(dataset[index])[:-1].tolist() for index in range(len(dataset))]
    random = np.random.default_rng(seed)
    texts = []
    for size in sizes:
        candidates = [document for document in documents if len(document) >= size]
        document = candidates[random.integers(len(candidates))]
        start = random.integers(len(document) - size + 1)
        texts.append(document[start : start + size])
    return texts
