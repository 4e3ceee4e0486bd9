"""Finished data sets: their metadata, their move into place, and whether they are complete."""

import json
import os
import platform
from dataclasses import dataclass

from megatron.data.corpus import SPLITS, Fingerprint, corpus_hash
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.sources.base import Source
from megatron.data.staging import clear
from megatron.data.tokenizer import Tokenizer, file_hash
from megatron.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, by data set; `shared` is the contamination of held-out splits, `skipped` counts by reason."""

    fingerprints: dict[str, Fingerprint]
    tokens: dict[str, int]
    round_trips: dict[str, dict]
    shared: dict[str, dict]
    skipped: dict[str, int]


def publish(options: PreprocessOptions, tokenizer: Tokenizer, written: Written) -> dict:
    """Write the metadata of the data sets in the stage, move everything into place, and return corpus.json."""
    if tokenizer.source is not None:  # so that training reads it next to the data, without a flag
        (options.stage / options.tokenizer_file).write_bytes(tokenizer.source)
    record = _describe(options, tokenizer, written)
    _move(options, [*_outputs(options), options.tokenizer_file])
    return record


def check_targets(options: PreprocessOptions, sources: list[Source]) -> None:
    """Check that no source, and no folder, has the name of a file that is written, and the origin of other splits.

    Raises: ConfigurationError if one has, or whether `_move` removes a split cannot be read from its metadata.
    """
    targets = {os.path.realpath(options.folder / name): name for name in (*_outputs(options), options.tokenizer_file)}
    stage = os.path.realpath(options.stage)
    for path in (source.path for source in sources if source.path is not None):
        real = os.path.realpath(path)
        if real in targets or os.path.commonpath([stage, real]) == stage:
            raise ConfigurationError(
                f"--input {path}: would be overwritten, as {options.target} writes a file of that name; write elsewhere"
            )
    for real in filter(os.path.isdir, targets):
        raise ConfigurationError(f"{options.target}: {real} is a folder; name another, or remove it")
    for name in SPLITS if options.has_splits else ():
        if name not in options.outputs:
            read_metadata(options.folder / name)


def _outputs(options: PreprocessOptions) -> list[str]:
    """Return the names of the files of all data sets, also of splits that are not written, and of corpus.json."""
    names = {*options.outputs.values(), *(SPLITS if options.has_splits else ())}
    return [options.record, *(f"{name}{suffix}" for name in sorted(names) for suffix in (".idx", ".bin", ".json"))]


def has_record(options: PreprocessOptions) -> bool:
    """Return whether data sets of the same settings, if not of the same text, are recorded."""
    record = _read_record(options)
    return record is not None and record["settings"] | {"hash": None} == options.settings(None)


def is_complete(options: PreprocessOptions, text_hash: str | None) -> bool:
    """Return whether the data sets of the text with this hash exist and are complete."""
    record = _read_record(options)
    try:
        if record is None or record["settings"] != options.settings(text_hash):
            return False
        for name, size in record["splits"].items():
            dataset = IndexedDataset(str(options.folder / options.outputs[name]))
            metadata = read_metadata(dataset.prefix)
            if (len(dataset), dataset.total_tokens) != (size["documents"], size["tokens"]):
                return False
            if metadata.get("corpus_hash") != text_hash:
                return False
        tokenizer = record["tokenizer_hash"]
        return tokenizer is None or file_hash(options.folder / options.tokenizer_file) == tokenizer
    except (OSError, ValueError, KeyError, TypeError):  # anything unreadable is written again
        return False


def _read_record(options: PreprocessOptions) -> dict | None:
    try:
        record = json.loads((options.folder / options.record).read_bytes())
        return record if isinstance(record["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(options: PreprocessOptions, tokenizer: Tokenizer, written: Written) -> dict:
    """Write NAME.json of each data set and corpus.json; return the latter."""
    path = options.stage / options.tokenizer_file
    origin = {
        "source": options.source,
        "python_version": platform.python_version(),
        "tokenizer_hash": file_hash(path) if path.exists() else None,
    }
    text_hash = corpus_hash(written.fingerprints)
    encoding = {
        "tokenizer_type": options.tokenizer_type,
        "tokenizer_model": path.name if path.exists() else None,
        "vocab_size": options.vocab_size,
        "vocabulary_size": tokenizer.vocabulary_size,
        "eod": tokenizer.eod,
        "corpus_hash": text_hash,
    }
    sizes = {
        name: {**fingerprint.sizes(), "tokens": written.tokens[name]}
        for name, fingerprint in written.fingerprints.items()
    }
    for name, size in sizes.items():
        metadata = encoding | origin | size | {"round_trip": written.round_trips[name]}
        metadata |= {"shared_13grams": written.shared[name]} if name in written.shared else {}
        (options.stage / f"{options.outputs[name]}.json").write_text(json.dumps(metadata, indent=1))
    record = {
        "settings": options.settings(text_hash),
        **origin,
        "splits": sizes,
        "round_trip": written.round_trips,
        "shared_13grams": written.shared,
        "skipped": written.skipped,
    }
    (options.stage / options.record).write_text(json.dumps(record, indent=1))
    return record


def _move(options: PreprocessOptions, names: list[str]) -> None:
    """Move all files into place; in between, no index and no corpus.json is there, so that a mixture is never valid.

    A split of an earlier call from the same text that this call does not write is removed, since its documents are now
    in other splits.
    """
    folder, stage, outputs = options.folder, options.stage, {*options.outputs.values()}
    for name in names:
        dataset = name.partition(".")[0] if options.has_splits else name
        foreign = dataset in SPLITS and dataset not in outputs
        if foreign and _located(read_metadata(folder / dataset).get("source")) != _located(options.source):
            continue
        if name != options.tokenizer_file or not options.has_splits:  # it may be that of another split
            (folder / name).unlink(missing_ok=True)
    written = [name for name in names if (stage / name).exists()]
    for name in sorted(written, key=lambda name: (name == options.record, name.endswith(".idx"), name)):
        os.replace(stage / name, folder / name)
    clear(stage)


def _located(source: list[str] | str | None) -> list[str] | str | None:
    """Return the origin of a text, with the absolute paths of files, which have several spellings."""
    return [os.path.abspath(path) for path in source] if isinstance(source, list) else source
