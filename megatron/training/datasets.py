"""The data of a run: opened, and checked against the tokenizer that made it."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.config.sections import Config, DataConfig
from megatron.data.blend import TrainBlend, ValidationBlend, combined_hash
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.paths import DataSet, requested_sets, split_edges
from megatron.data.round_trip import describe_changes
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import ConfigurationError
from megatron.validation.evaluate import ValidationSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """The data of a run, opened and checked."""

    tokenizer: Tokenizer
    train: TrainSamples | TrainBlend
    train_prefixes: tuple[str, ...]
    validation: list[ValidationSet]
    corpus_hash: str  # of the whole text; of the training tokens, where another system wrote them
    corpus_source: str | list[str]
    corpus_python_version: str | None  # that prepared it; None where another system wrote the data
    fingerprints: dict[str, str]  # of the training tokens ("--train-data-path") and of each validation set by name
    shared_13grams: dict[str, dict]  # by validation set: how much of it stands in the training split too


def open_sources(config: Config) -> Sources:
    """Open training and validation data and the tokenizer that made them."""
    data = config.data
    train, held_out = requested_sets(data, with_test=config.validation.skip_train)
    made = {prefix: read_metadata(prefix) for wanted in (train, *held_out) for prefix in wanted.prefixes}
    tokenizer = _tokenizer(data, made)
    _log_changed_text(made, tokenizer)
    opened = {prefix: IndexedDataset(prefix, tokenizer.vocabulary_size) for prefix in made}
    held_out = [wanted for wanted in held_out if _suffices(wanted, opened, data)]
    train_members = _members(train, opened, data)
    members = {wanted.name: _members(wanted, opened, data) for wanted in held_out}
    fingerprints = {"--train-data-path": _fingerprint(train, train_members)}
    fingerprints |= {wanted.name: _fingerprint(wanted, members[wanted.name]) for wanted in held_out}
    if data.split and (data.valid_data_path or data.valid_data_path_file):
        logger.info("--split %s: keeps its held-out documents out of training, though other data are given", data.split)
    hashes = [made[prefix].get("corpus_hash") for prefix in train.prefixes]
    sources = [made[prefix].get("source", prefix) for prefix in train.prefixes]
    return Sources(
        tokenizer,
        _training(train, train_members, config),
        train.prefixes,
        [_validation_set(wanted, members[wanted.name], config, tokenizer) for wanted in held_out],
        combined_hash(hashes, train.weights) if all(hashes) else fingerprints["--train-data-path"],
        sources[0] if len(sources) == 1 else sources,
        made[train.prefixes[0]].get("python_version"),
        fingerprints,
        _shared_13grams(held_out, made),
    )


def _members(wanted: DataSet, opened: dict[str, IndexedDataset], data: DataConfig) -> list[IndexedDataset]:
    """Return the data sets of a blend, each cut to its part of --split."""
    whole = [opened[prefix] for prefix in wanted.prefixes]
    if wanted.part is None:
        return whole
    parts = []
    for dataset in whole:
        first, last = split_edges(data.split_shares, len(dataset))[wanted.part : wanted.part + 2]
        if not dataset.sizes[first:last].any():
            raise ConfigurationError(
                f"--split {data.split}: leaves no tokens of {dataset.prefix} for {wanted.name}, of {len(dataset)} "
                "documents in all; change the shares or give --valid-data-path"
            )
        parts.append(dataset.part(first, last))
    return parts


def _suffices(wanted: DataSet, opened: dict[str, IndexedDataset], data: DataConfig) -> bool:
    """Return whether a set can be read; of --split's test part, which few ask for, nothing may be left."""
    if wanted.part != 2:
        return True
    for dataset in (opened[prefix] for prefix in wanted.prefixes):
        first, last = split_edges(data.split_shares, len(dataset))[2:]
        if dataset.sizes[first:last].sum(dtype=np.int64) <= data.seq_length:
            logger.info("--split %s: its test part holds too little for one sample and is left out", data.split)
            return False
    return True


def _fingerprint(wanted: DataSet, members: list[IndexedDataset]) -> str:
    return combined_hash([member.fingerprint() for member in members], wanted.weights)


def _training(wanted: DataSet, members: list[IndexedDataset], config: Config) -> TrainSamples | TrainBlend:
    data = config.data
    if len(members) > 1 and data.train_unique_tokens:
        raise ConfigurationError(
            f"--train-unique-tokens {data.train_unique_tokens}: cuts one data set, and --train-data-path blends "
            f"{len(members)}; drop it, or cut the members when they are made"
        )
    if len(members) == 1 and data.blend_order != DataConfig.blend_order:
        raise ConfigurationError(
            f"--blend-order {data.blend_order}: orders the members of a blend, and the training data are one data set; "
            "leave it out"
        )
    arguments = (data.seq_length, config.training.seed, data.epoch_order, data.train_unique_tokens)
    samples = [TrainSamples(member, *arguments) for member in members]
    return samples[0] if len(samples) == 1 else TrainBlend(samples, wanted.weights, data.blend_order)


def _tokenizer(data: DataConfig, made: dict[str, dict]) -> Tokenizer:
    """Return the tokenizer, after a check that it made all the data."""
    tokenizer = tokenizer_beside(data, *next(iter(made.items())))
    for prefix, recorded in made.items():
        size = recorded.get("vocabulary_size", tokenizer.vocabulary_size)
        if size != tokenizer.vocabulary_size:
            fault = f"was tokenised with {size} ids, the tokenizer has {tokenizer.vocabulary_size}"
        elif recorded.get("tokenizer_hash", tokenizer.hash) != tokenizer.hash:
            fault = f"was tokenised with another tokenizer than {tokenizer.named}"
        else:
            continue
        raise ConfigurationError(
            f"{prefix}: {fault}; give the tokenizer that made the data "
            "(--tokenizer-type, --tokenizer-model, --vocab-file, --merge-file, --vocab-size)"
        )
    return tokenizer


def _log_changed_text(made: dict[str, dict], tokenizer: Tokenizer) -> None:
    """Name the data sets whose documents do not come back from their tokens, as preprocessing counted."""
    for prefix, recorded in made.items():
        changes = recorded.get("round_trip")
        if changes and changes["changed_documents"]:
            effect = "" if tokenizer.token_bytes() is None else "; bits per byte count the bytes that are left"
            logger.info("%s: %s%s", prefix, describe_changes(recorded["documents"], changes), effect)


def tokenizer_beside(data: DataConfig, prefix: str, recorded: dict) -> Tokenizer:
    """Return the tokenizer that flags name, else the file beside the data set `prefix`, as its metadata `recorded`."""
    model = data.tokenizer_model
    if model is None and recorded.get("tokenizer_model"):
        model = str(Path(prefix).parent / recorded["tokenizer_model"])
    return build_tokenizer(data.tokenizer_type, model, data.vocab_size, data.vocab_file, data.merge_file)


def _validation_set(
    wanted: DataSet, members: list[IndexedDataset], config: Config, tokenizer: Tokenizer
) -> ValidationSet:
    limit = config.validation.eval_samples
    if len(members) == 1:
        windows = ValidationWindows(members[0], config.data.seq_length, limit)
    else:
        parts = [ValidationWindows(member, config.data.seq_length) for member in members]
        windows = ValidationBlend(parts, wanted.weights, limit)
    return ValidationSet(wanted.name, windows, windows.documents, tokenizer.token_bytes())


def _shared_13grams(held_out: list[DataSet], made: dict[str, dict]) -> dict[str, dict]:
    """Return how much of each held-out set stands in its training split too, where its preparation measured it."""
    alone = {wanted.name: made[wanted.prefixes[0]] for wanted in held_out if len(wanted.prefixes) == 1}
    return {name: recorded["shared_13grams"] for name, recorded in alone.items() if "shared_13grams" in recorded}
