"""Statistics of a data set: lengths of its documents, use of the vocabulary, end-of-document tokens."""

import numpy as np
from tqdm import tqdm

from megatron.data.copy_documents import Source
from megatron.data.inspection.ngrams import ends_with
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError

CHUNK_TOKENS = 1 << 22  # read at a time
LARGEST_ID = 1 << 24  # larger ids are no vocabulary's, and counting them takes too much memory
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHOWN_TOKENS = 10  # most and least frequent


def summarize(source: Source, tokenizer: Tokenizer | None) -> dict:
    """Return the statistics of a data set, for JSON; those that need a tokenizer are None without one.

    Lengths are in tokens and include the end-of-document token; an entry of the index counts as a document, as in
    training.

    Raises: ConfigurationError if a token id is negative or above 2^24.
    """
    dataset, recorded = source.dataset, source.metadata
    eod = tokenizer.eod if tokenizer else recorded.get("eod")
    vocabulary_size = tokenizer.vocabulary_size if tokenizer else recorded.get("vocabulary_size")
    counts = count_ids(source)
    token_bytes = tokenizer.token_bytes() if tokenizer else None
    known = min(len(counts), 0 if token_bytes is None else len(token_bytes))
    text_bytes = None if token_bytes is None else int(counts[:known] @ token_bytes[:known])
    summary = {
        "prefix": source.prefix,
        "dtype": str(dataset.dtype),
        "documents": len(dataset),
        "grouped_documents": len(source.boundaries) - 1,
        "tokens": dataset.total_tokens,
        "empty_documents": int((dataset.sizes == 0).sum()),
        "eod": eod,
        "documents_without_eod": None if eod is None else int((~ends_with(dataset, eod)).sum()),
        "eod_tokens": None if eod is None else int(counts[eod]) if eod < len(counts) else 0,
        "text_bytes": text_bytes,
        "bytes_per_token": None if text_bytes is None else text_bytes / dataset.total_tokens,
        "lengths": describe_lengths(dataset.sizes),
        "vocabulary": describe_vocabulary(counts, vocabulary_size, tokenizer),
        "tokenizer_type": recorded.get("tokenizer_type"),
        "corpus_hash": recorded.get("corpus_hash"),
        "fingerprint": dataset.fingerprint(),
    }
    return summary


def count_ids(source: Source) -> np.ndarray:
    """Return how often each id occurs, int64 [largest id + 1]."""
    dataset = source.dataset
    counts = np.zeros(1, np.int64)
    with tqdm(desc="counting", total=dataset.total_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        for start in range(0, dataset.total_tokens, CHUNK_TOKENS):
            ids = dataset.stream(start, min(start + CHUNK_TOKENS, dataset.total_tokens))
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or largest > LARGEST_ID:
                invalid = smallest if smallest < 0 else largest
                raise ConfigurationError(
                    f"{dataset.prefix}.bin: contains {invalid}, which is no token id; the index says that ids are "
                    f"{dataset.dtype}, write both again if that is wrong"
                )
            counts = np.pad(counts, (0, max(0, largest + 1 - len(counts))))
            counts += np.bincount(ids, minlength=len(counts))
            bar.update(len(ids))
    return counts


def describe_lengths(sizes: np.ndarray) -> dict:
    """Return mean, extremes, quantiles (lengths that occur) and a histogram of the lengths of documents, [D].

    The bins of the histogram, (first length, last length, documents), double in width; empty documents are one bin.
    """
    quantiles = np.quantile(sizes, QUANTILES, method="inverted_cdf")
    edges = np.concatenate([[0], 2 ** np.arange(int(sizes.max()).bit_length() + 1)])  # 0, 1, 2, 4, 8, ...
    bins = np.histogram(sizes, edges)[0] if len(edges) > 2 else np.array([len(sizes)])
    # numpy's last bin is closed, and holds no length on its right edge here
    histogram = [[int(low), int(high) - 1, int(count)] for low, high, count in zip(edges, edges[1:], bins)]
    occupied = [index for index, (_, _, count) in enumerate(histogram) if count]
    return {
        "mean": float(sizes.mean(dtype=np.float64)),
        "min": int(sizes.min()),
        "max": int(sizes.max()),
        "quantiles": {f"{quantile:g}": int(value) for quantile, value in zip(QUANTILES, quantiles)},
        "histogram": histogram[occupied[0] : occupied[-1] + 1],
    }


def describe_vocabulary(counts: np.ndarray, size: int | None, tokenizer: Tokenizer | None) -> dict:
    """Return the use of the vocabulary by `counts` per id, [largest id + 1].

    `entropy_bits` is the entropy of the distribution of single tokens; least frequent are the ids that occur at all.
    """
    used = np.flatnonzero(counts)
    shares = counts[used] / counts.sum()
    ascending = used[np.argsort(counts[used], kind="stable")]
    descending = used[np.argsort(-counts[used], kind="stable")]

    def listed(ids: np.ndarray) -> list[dict]:
        return [
            {"id": index, "count": int(counts[index]), "text": _token_text(tokenizer, index)} for index in ids.tolist()
        ]

    return {
        "size": size,
        "used": len(used),
        "share_used": None if size is None else int((used < size).sum()) / size,
        "outside": None if size is None else int(counts[size:].sum()),
        "largest_id": int(used[-1]),
        "entropy_bits": float(-(shares * np.log2(shares)).sum()),
        "most_frequent": listed(descending[:SHOWN_TOKENS]),
        "least_frequent": listed(ascending[:SHOWN_TOKENS]),
    }


def _token_text(tokenizer: Tokenizer | None, index: int) -> str | None:
    if tokenizer is None or index >= tokenizer.vocabulary_size:
        return None
    text = "end of document" if index == tokenizer.eod else tokenizer.decode([index])
    return None if "\ufffd" in text else text  # bytes that are no character
