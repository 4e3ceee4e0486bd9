"""Merges data sets of one tokenizer: the documents of all, in the order given, and their metadata."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.data.blend import combined_hash
from megatron.data.copy_documents import Source, check_output, new_data_set
from megatron.errors import ConfigurationError

SUMMED = ("documents", "bytes")  # of PREFIX.json, besides the tokens
TOKENIZER_KEYS = ("tokenizer_hash", "vocabulary_size", "eod")  # equal for equal tokenizers
ROUND_TRIP_COUNTS = ("changed_documents", "characters", "missing_characters")

logger = logging.getLogger(__name__)


def input_prefixes(words: Sequence[str]) -> list[str]:
    """Return the data prefixes of --input: prefixes, and folders that stand for all their data sets in sorted order.

    Raises: ConfigurationError for a folder without data sets, or a prefix that is given twice.
    """
    prefixes = []
    for word in words:
        if not Path(word).is_dir():
            prefixes.append(word)
            continue
        paths = [path for path in Path(word).iterdir() if path.suffix in (".bin", ".idx")]
        if not paths:
            raise ConfigurationError(f"--input {word}: is a folder without .bin and .idx files; name another")
        prefixes += sorted({str(path.with_suffix("")) for path in paths})
    resolved = [Path(prefix).resolve() for prefix in prefixes]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ConfigurationError(f"--input: names {prefixes[number]} twice; name it once")
    return prefixes


def merge(prefixes: Sequence[str], output: str) -> dict:
    """Write the data sets of `prefixes`, one after the other, to a new data set; return its metadata.

    Tokens are copied in blocks of 16 MiB; of the indexes up to 60 bytes per document are in memory.

    Raises: ConfigurationError if the dtypes or tokenizers differ, an input is missing or damaged, or the output exists;
    OSError if it cannot be written.
    """
    check_output(output, tuple(prefixes))
    sources = [Source.open(prefix) for prefix in prefixes]
    check_equal(sources)
    dtype = sources[0].dataset.dtype
    metadata, files = merged_metadata(sources, Path(output))
    total = sum(source.dataset.total_tokens for source in sources) * dtype.itemsize
    with new_data_set(output, dtype, total, "merging") as merged:
        for source in sources:
            merged.copy(source)
        merged.finish(metadata, files)
    return metadata


def check_equal(sources: list[Source], action: str = "merge") -> None:
    """Check that all sources have the dtype and, where it is recorded, the tokenizer of the first.

    The message says to `action` data of one tokenizer.

    Raises: ConfigurationError if one has another.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.dataset.dtype != first.dataset.dtype:
            raise ConfigurationError(
                f"{source.prefix}: has ids of {source.dataset.dtype}, and {first.prefix} of {first.dataset.dtype}; "
                f"{action} data of one tokenizer, tokenised in the same way"
            )
    recorded = [source for source in sources if source.metadata]
    for source in sources:
        if not source.metadata and recorded:
            logger.warning("%s.json: is missing; its tokenizer is taken to be that of the others", source.prefix)
    if not recorded:
        logger.warning("no input has a PREFIX.json; whether their tokenizers are equal cannot be checked")
    for source in recorded[1:]:
        differing = _tokenizer_difference(recorded[0].metadata, source.metadata)
        if differing:
            raise ConfigurationError(
                f"{source.prefix}: was tokenised with another tokenizer than {recorded[0].prefix} ({differing}); "
                f"{action} data of one tokenizer"
            )


def _tokenizer_difference(first: dict, second: dict) -> str | None:
    """Return what differs between the tokenizers of two data sets, as text; None if nothing does."""
    # a tokenizer without a file has no hash; its type and vocabulary size determine it
    keys = TOKENIZER_KEYS if first.get("tokenizer_hash") else (*TOKENIZER_KEYS, "tokenizer_type")
    for key in keys:
        if first.get(key) != second.get(key):
            return f"{key} {second.get(key)} and {first.get(key)}"
    return None


def merged_metadata(sources: list[Source], output: Path) -> tuple[dict, dict[str, bytes]]:
    """Return PREFIX.json of the merged data set, and the tokenizer's file by name if it is to be written next to it.

    Counts are added up; what all data sets share stays, what differs is left out. The corpus hash is that of a blend
    with the shares of the merged tokens.
    """
    recorded = [source.metadata for source in sources if source.metadata]
    first = recorded[0] if recorded else {}
    metadata: dict = {key: value for key, value in first.items() if all(other.get(key) == value for other in recorded)}
    tokens = [source.dataset.total_tokens for source in sources]
    for key in (*SUMMED, "round_trip", "shared_13grams", "merged", "removed"):
        metadata.pop(key, None)
    metadata["corpus_hash"] = combined_hash([source.corpus_hash for source in sources], tokens)
    metadata["source"] = [source.metadata.get("source", source.prefix) for source in sources]
    for key in SUMMED:
        if all(key in source.metadata for source in sources):
            metadata[key] = sum(source.metadata[key] for source in sources)
    metadata["documents"] = sum(len(source.dataset) for source in sources)
    metadata["tokens"] = sum(tokens)
    if all(source.metadata.get("round_trip") for source in sources):
        trips = [source.metadata["round_trip"] for source in sources]
        examples = [trip["example"] for trip in trips if trip["example"]]
        example = max(examples, key=lambda example: example["missing_characters"], default=None)
        counts = {key: sum(trip[key] for trip in trips) for key in ROUND_TRIP_COUNTS}
        metadata["round_trip"] = counts | {"example": example}
    metadata["merged"] = [
        {
            "prefix": source.prefix,
            "documents": len(source.dataset),
            "tokens": source.dataset.total_tokens,
            "corpus_hash": source.corpus_hash,
        }
        for source in sources
    ]
    with_tokenizer = [source for source in sources if source.metadata.get("tokenizer_model")]
    name, files = tokenizer_file(with_tokenizer[0], output) if with_tokenizer else (None, {})
    return metadata | {"tokenizer_model": name}, files


def tokenizer_file(source: Source, output: Path) -> tuple[str | None, dict[str, bytes]]:
    """Return the name of the tokenizer's file next to the data set `output`, and its content by name if it is new.

    It has the name it has next to the source, unless another file has that name.
    """
    name = source.metadata.get("tokenizer_model")
    if not name:
        return None, {}
    path = Path(source.prefix).parent / name
    if not path.is_file():
        logger.warning("%s: is missing, so the new data set has no tokenizer file next to it", path)
        return None, {}
    content = path.read_bytes()
    for candidate in (name, f"{output.name}.{name}"):
        target = output.with_name(candidate)
        if not target.exists():
            return candidate, {candidate: content}
        if target.read_bytes() == content:
            return candidate, {}
    raise ConfigurationError(f"{target}: exists and is another tokenizer than {path}; move it away")
