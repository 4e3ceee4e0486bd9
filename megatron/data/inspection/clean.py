"""Describes the duplicates of a data set, and writes it without them."""

import hashlib
import json
from importlib import metadata as packages
from pathlib import Path

import numpy as np

from megatron.data.copy_documents import Source, new_data_set
from megatron.data.inspection.duplicates import (
    EXACT_OTHER,
    EXACT_WITHIN,
    NEAR_OTHER,
    NEAR_WITHIN,
    REASONS,
    DuplicateOptions,
    Duplicates,
)
from megatron.data.inspection.near_duplicates import NUM_PERM, SEED, Bands
from megatron.data.inspection.ngrams import DocumentTokens
from megatron.data.merge import tokenizer_file
from megatron.errors import ConfigurationError

LARGEST_CLUSTERS = 5
SHOWN_DOCUMENTS = 8  # of a cluster
# of PREFIX.json: no longer known after documents were removed
TEXT_KEYS = ("bytes", "round_trip", "shared_13grams")


def describe(source: Source, tokens: DocumentTokens, duplicates: Duplicates, options: DuplicateOptions) -> dict:
    """Return the counts of duplicates, the largest clusters and examples from the other data set, for JSON.

    A document counts once, under the reason for which it would be removed.
    """
    sizes, reasons = source.dataset.sizes, duplicates.reasons()
    total = source.dataset.total_tokens

    def counted(reason: int) -> dict:
        removed = np.flatnonzero(reasons == reason)
        num_tokens = int(sizes[removed].sum(dtype=np.int64))
        return {"documents": len(removed), "tokens": num_tokens, "share_of_tokens": num_tokens / total}

    summary: dict = {"documents": len(sizes), "tokens": total, "parameters": parameters(options)}
    if options.within:
        summary["within"] = {"equal": counted(EXACT_WITHIN), "near": counted(NEAR_WITHIN)}
        summary["largest_clusters"] = _largest_clusters(tokens, duplicates, options)
    if options.against is not None:
        summary["against"] = {
            "prefix": options.against,
            "equal": counted(EXACT_OTHER),
            "near": counted(NEAR_OTHER),
            "examples": _shared_examples(duplicates),
        }
    if options.near_duplicates is not None:
        summary["compared_pairs"] = duplicates.compared_pairs
        summary["verified_pairs"] = duplicates.verified_pairs
    return summary


def parameters(options: DuplicateOptions) -> dict:
    """Return what determines which documents are duplicates, for JSON."""
    if options.near_duplicates is None:
        return {"threshold": None}
    bands = Bands.of(options.near_duplicates)
    return {
        "threshold": options.near_duplicates,
        "ngram": options.ngram,
        "num_perm": NUM_PERM,
        "seed": SEED,
        "bands": bands.count,
        "rows": bands.rows,
        "recall_at_threshold": bands.recall(options.near_duplicates),
        "library": f"rensa {packages.version('rensa')}",
    }


def similarity(tokens: DocumentTokens, first: int, second: int, length: int) -> float:
    """Return the Jaccard similarity of the n-grams of two documents; 1 for equal ones without any."""
    sets = tokens.ngrams(first, length), tokens.ngrams(second, length)
    shared = len(np.intersect1d(*sets, assume_unique=True))
    union = len(sets[0]) + len(sets[1]) - shared
    return shared / union if union else 1.0


def _largest_clusters(tokens: DocumentTokens, duplicates: Duplicates, options: DuplicateOptions) -> list[dict]:
    """Return the clusters with most documents, largest first, with the similarity of documents to the first one."""
    labels, counts = np.unique(duplicates.clusters, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:LARGEST_CLUSTERS]
    clusters = []
    for label, count in zip(labels[order].tolist(), counts[order].tolist()):
        if count < 2:
            break
        members = np.flatnonzero(duplicates.clusters == label)
        shown = members[:SHOWN_DOCUMENTS].tolist()
        equal = duplicates.first_equal[shown] == duplicates.first_equal[label]
        clusters.append(
            {
                "documents": count,
                "tokens": int(tokens.lengths[members].sum()),
                "first_documents": shown,
                "similarity_to_first": [
                    1.0 if is_equal else similarity(tokens, label, document, options.ngram)
                    for document, is_equal in zip(shown, equal)
                ],
            }
        )
    return clusters


def _shared_examples(duplicates: Duplicates) -> list[dict]:
    """Return the first documents that the other data set contains, equal or nearly equal ones."""
    return [
        {
            "document": document,
            "other_document": int(duplicates.other[document]),
            "similarity": float(duplicates.similarity[document]),
        }
        for document in np.flatnonzero(duplicates.other >= 0)[:LARGEST_CLUSTERS].tolist()
    ]


def write_clean(source: Source, duplicates: Duplicates, options: DuplicateOptions, against: Source | None) -> dict:
    """Write the data set without its duplicates to --output-prefix; return its metadata.

    OUT.removed.jsonl lists each removed document: its number in the source, the reason, the document that it
    duplicates (`of`), and, in the other data set, the similarity.

    Raises: ConfigurationError if no document is left or the output exists; OSError if it cannot be written.
    """
    assert options.output_prefix is not None
    output, reasons = Path(options.output_prefix), duplicates.reasons()
    keep = reasons == 0
    num_tokens = int(source.dataset.sizes[keep].sum(dtype=np.int64))
    if not num_tokens:
        raise ConfigurationError(f"--remove: leaves no tokens of {source.prefix}; compare it with other data")
    metadata = {key: value for key, value in source.metadata.items() if key not in TEXT_KEYS}
    removal = {
        "from": source.prefix,
        "corpus_hash": source.corpus_hash,
        "documents": int((~keep).sum()),
        "tokens": source.dataset.total_tokens - num_tokens,
        "reasons": {REASONS[reason]: int((reasons == reason).sum()) for reason in REASONS},
        "parameters": parameters(options),
    }
    if against is not None:
        removal["against"] = {"prefix": against.prefix, "corpus_hash": against.corpus_hash}
    removed = hashlib.sha256(np.flatnonzero(~keep).tobytes()).hexdigest()
    metadata |= {
        # of the same text with other documents removed it is another one
        "corpus_hash": hashlib.sha256(f"{source.corpus_hash} without {removed}".encode()).hexdigest(),
        "source": source.metadata.get("source", source.prefix),
        "documents": int(keep.sum()),
        "tokens": num_tokens,
        "removed": [*source.metadata.get("removed", []), removal],
    }
    metadata["tokenizer_model"], files = tokenizer_file(source, output)
    files[f"{output.name}.removed.jsonl"] = _removed_lines(duplicates, reasons)
    itemsize = source.dataset.dtype.itemsize
    with new_data_set(str(output), source.dataset.dtype, num_tokens * itemsize, "writing") as clean:
        clean.copy(source, keep)
        clean.finish(metadata, files)
    return metadata


def _removed_lines(duplicates: Duplicates, reasons: np.ndarray) -> bytes:
    """Return a line of JSON for every removed document."""
    left = np.flatnonzero(reasons == 0)
    labels, positions = np.unique(duplicates.clusters[left], return_index=True)
    stays = dict(zip(labels.tolist(), left[positions].tolist()))  # first document left of each cluster
    lines = []
    for document in np.flatnonzero(reasons).tolist():
        line = {"document": document, "reason": REASONS[int(reasons[document])]}
        if duplicates.other[document] >= 0:
            line |= {"of": int(duplicates.other[document]), "similarity": float(duplicates.similarity[document])}
        else:
            line |= {"of": stays[int(duplicates.clusters[document])]}
        lines.append(json.dumps(line))
    return "".join(f"{line}\n" for line in lines).encode()
