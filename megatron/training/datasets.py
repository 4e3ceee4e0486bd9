"""Opens the data sets of a run and checks them against their tokenizer."""

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron.config.flags import spelling
from megatron.config.sections import Config, DataConfig
from megatron.data.blend import TrainBlend, ValidationBlend, combined_hash
from megatron.data.indexed import IndexedDataset, data_files, read_metadata
from megatron.data.paths import DataSet, requested_sets, split_edges
from megatron.data.round_trip import describe_changes
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import ConfigurationError
from megatron.objectives.registry import DOCUMENT_RULES
from megatron.validation.evaluate import ValidationSet

logger = logging.getLogger(__name__)

SEARCHED_TOKENS = 1 << 20  # of a data set, for the end of a document


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The data of a run, opened and checked."""

    tokenizer: Tokenizer
    train: TrainSamples | TrainBlend
    train_prefixes: tuple[str, ...]
    validation: list[ValidationSet]
    corpus_hash: str  # of the whole text; of the training tokens if another system wrote the data
    corpus_source: str | list[str]
    corpus_python_version: str | None  # of preprocessing; None if another system wrote the data
    fingerprints: dict[str, str]  # of the training tokens ("--train-data-path") and of validation sets by name
    shared_13grams: dict[str, dict]  # contamination by validation set: 13-grams that the training split contains too

    @property
    def tokenizer_hash(self) -> str | None:
        """Return the SHA-256 of the tokenizer's file; None for byte tokens and plain ids."""
        return self.tokenizer.hash

    def unique_tokens(self) -> dict[str, int]:
        """Return the tokens of each member of the training set before repetition, by data prefix."""
        members = self.train.members if isinstance(self.train, TrainBlend) else [self.train]
        return {prefix: member.unique_tokens for prefix, member in zip(self.train_prefixes, members, strict=True)}


def check_tokenizer(recorded: dict, tokenizer: Tokenizer, run: str) -> None:
    """Check that a run with config.json `recorded` was trained with this tokenizer; earlier versions kept no hash.

    Raises: ConfigurationError otherwise.
    """
    size, trained_hash = recorded["vocabulary_size"], recorded.get("tokenizer_hash")
    if size != tokenizer.vocabulary_size:
        raise ConfigurationError(
            f"{run}: holds a run over {size} token ids, and this data has {tokenizer.vocabulary_size}; give data of "
            "the same tokenizer, or start another run"
        )
    if tokenizer.hash and trained_hash and tokenizer.hash != trained_hash:
        raise ConfigurationError(
            f"{run}: was trained with another tokenizer of {size} ids than that of this data; tokenise the text with "
            "the tokenizer of the run: tools/preprocess_data.py --tokenizer-model FILE"
        )


def open_sources(config: Config) -> Sources:
    """Open training and validation data and their tokenizer.

    Raises: ConfigurationError if data are missing, damaged or too short, or were tokenised with another tokenizer.
    """
    data = config.data
    train, held_out = requested_sets(data, with_test=config.validation.skip_train)
    metadata = {prefix: read_metadata(prefix) for requested in (train, *held_out) for prefix in requested.prefixes}
    for prefix in metadata:
        data_files(prefix)  # a wrong prefix is reported before the tokenizer that would be next to it
    tokenizer = _tokenizer(data, metadata)
    _log_changed_text(metadata, tokenizer)
    opened = {prefix: IndexedDataset(prefix, tokenizer.vocabulary_size) for prefix in metadata}
    held_out = [requested for requested in held_out if _suffices(requested, opened, data)]
    train_members = _members(train, opened, data)
    _log_idle_rules(train_members, data, tokenizer.eod)
    members = {requested.name: _members(requested, opened, data) for requested in held_out}
    fingerprints = {"--train-data-path": _fingerprint(train, train_members)}
    fingerprints |= {requested.name: _fingerprint(requested, members[requested.name]) for requested in held_out}
    if data.split and (data.valid_data_path or data.valid_data_path_file):
        logger.info("--split %s: keeps its held-out documents out of training, though other data are given", data.split)
    hashes = [metadata[prefix].get("corpus_hash", "") for prefix in train.prefixes]
    sources = [metadata[prefix].get("source", prefix) for prefix in train.prefixes]
    return Sources(
        tokenizer=tokenizer,
        train=_training(train, train_members, config),
        train_prefixes=train.prefixes,
        validation=[_validation_set(requested, members[requested.name], config, tokenizer) for requested in held_out],
        corpus_hash=_combined_hash(train, train_members, hashes) if all(hashes) else fingerprints["--train-data-path"],
        corpus_source=sources[0] if len(sources) == 1 else sources,
        corpus_python_version=metadata[train.prefixes[0]].get("python_version"),
        fingerprints=fingerprints,
        shared_13grams=_shared_13grams(held_out, metadata),
    )


def _members(requested: DataSet, opened: dict[str, IndexedDataset], data: DataConfig) -> list[IndexedDataset]:
    """Return the members of a blend, each cut to its split of --split."""
    datasets = [opened[prefix] for prefix in requested.prefixes]
    if requested.split_index is None:
        return datasets
    splits = []
    for dataset in datasets:
        first, last = split_edges(data.split_shares, len(dataset))[requested.split_index : requested.split_index + 2]
        if not dataset.tokens_between(first, last):
            raise ConfigurationError(
                f"--split {data.split}: leaves no tokens of {dataset.prefix} for {requested.name}, of {len(dataset)} "
                "documents in all; change the shares or give --valid-data-path"
            )
        splits.append(dataset.document_range(first, last))
    return splits


def _suffices(requested: DataSet, opened: dict[str, IndexedDataset], data: DataConfig) -> bool:
    """Return whether a set holds at least one sample; only the test split of --split may be smaller."""
    if requested.split_index != 2:
        return True
    for dataset in (opened[prefix] for prefix in requested.prefixes):
        first, last = split_edges(data.split_shares, len(dataset))[2:]
        if dataset.tokens_between(first, last) <= data.seq_length:
            logger.info("--split %s: the test split holds less than one sample and is skipped", data.split)
            return False
    return True


def _fingerprint(requested: DataSet, members: list[IndexedDataset]) -> str:
    return _combined_hash(requested, members, [member.fingerprint() for member in members])


def _combined_hash(requested: DataSet, members: list[IndexedDataset], hashes: list[str]) -> str:
    """Return the hash of a set whose whole members have `hashes`; a cut to all tokens is none."""
    cuts = [None if cut == member.total_tokens else cut for cut, member in zip(requested.cuts(), members, strict=True)]
    return combined_hash(hashes, requested.weights, cuts)


def _training(requested: DataSet, members: list[IndexedDataset], config: Config) -> TrainSamples | TrainBlend:
    data = config.data
    if len(members) == 1 and data.blend_order != DataConfig.blend_order:
        raise ConfigurationError(
            f"--blend-order {data.blend_order}: orders the members of a blend, and the training data are one data set; "
            "leave it out"
        )
    arguments = (data.seq_length, config.training.seed, data.epoch_order)
    flag = f"--train-data-path-file {data.train_data_path_file}:" if data.train_data_path_file else "--train-data-path"
    samples = []
    for member, cut, prefix in zip(members, requested.cuts(), requested.prefixes, strict=True):
        cut_by = "--train-unique-tokens" if data.train_unique_tokens else f"{flag} {prefix}"
        samples.append(TrainSamples(member, *arguments, unique_tokens=cut, cut_by=cut_by))
    return samples[0] if len(samples) == 1 else TrainBlend(samples, requested.weights, data.blend_order)


def _tokenizer(data: DataConfig, metadata: dict[str, dict]) -> Tokenizer:
    """Return the tokenizer after checking that it tokenised all the data."""
    tokenizer = tokenizer_of_data(data, *next(iter(metadata.items())))
    for prefix, recorded in metadata.items():
        size = recorded.get("vocabulary_size", tokenizer.vocabulary_size)
        if size != tokenizer.vocabulary_size:
            fault = f"was tokenised with {size} ids, the tokenizer has {tokenizer.vocabulary_size}"
        elif recorded.get("tokenizer_hash", tokenizer.hash) != tokenizer.hash:
            fault = f"was tokenised with another tokenizer than {tokenizer.flag}"
        else:
            continue
        raise ConfigurationError(
            f"{prefix}: {fault}; give the tokenizer of the data "
            "(--tokenizer-type, --tokenizer-model, --vocab-file, --merge-file, --vocab-size)"
        )
    return tokenizer


def _log_changed_text(metadata: dict[str, dict], tokenizer: Tokenizer) -> None:
    """Log the data sets whose documents did not survive the tokenizer round trip in preprocessing."""
    for prefix, recorded in metadata.items():
        changes = recorded.get("round_trip")
        if changes and changes["changed_documents"]:
            effect = "" if tokenizer.token_bytes() is None else "; bits per byte count the bytes that are left"
            logger.info("%s: %s%s", prefix, describe_changes(recorded["documents"], changes), effect)


def _log_idle_rules(members: list[IndexedDataset], data: DataConfig, eod: int) -> None:
    """Log the data sets in which document flags do nothing, since no `eod` separates their documents."""
    flags = " and ".join(spelling(name) for name in DOCUMENT_RULES if getattr(data, name))
    for member in members if flags else ():
        tokens = member.stream(0, min(member.total_tokens, SEARCHED_TOKENS))
        if not (tokens == eod).any():
            logger.info(
                "%s: has no end-of-document token (id %d) among its first %s tokens; without any, %s does nothing: "
                "write it again with tools/preprocess_data.py --append-eod",
                *(member.prefix, eod, f"{len(tokens):,}", flags),
            )


def tokenizer_of_data(data: DataConfig, prefix: str, recorded: dict) -> Tokenizer:
    """Return the tokenizer given by flags, else the one next to the data `prefix` that `recorded` metadata names.

    Raises: ConfigurationError if there is none.
    """
    model = data.tokenizer_model
    if model is None and recorded.get("tokenizer_model"):
        model = str(Path(prefix).parent / recorded["tokenizer_model"])
    if model is None and data.tokenizer_type == "HFTokenizer":
        raise ConfigurationError(
            f"{prefix}: no tokenizer file is next to the data; give the tokenizer of the data "
            "(--tokenizer-type, --tokenizer-model, --vocab-file, --merge-file, --vocab-size)"
        )
    return build_tokenizer(
        data.tokenizer_type,
        model,
        vocab_size=data.vocab_size,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
    )


def _validation_set(
    requested: DataSet, members: list[IndexedDataset], config: Config, tokenizer: Tokenizer
) -> ValidationSet:
    limit = config.validation.eval_samples
    if len(members) == 1:
        windows = ValidationWindows(members[0], config.data.seq_length, limit)
    else:
        member_windows = [ValidationWindows(member, config.data.seq_length) for member in members]
        windows = ValidationBlend(member_windows, requested.weights, limit)
    return ValidationSet(requested.name, windows, windows.documents, tokenizer.token_bytes())


def _shared_13grams(held_out: list[DataSet], metadata: dict[str, dict]) -> dict[str, dict]:
    """Return the contamination of each held-out set that is not a blend, if preprocessing measured it."""
    single = {requested.name: metadata[requested.prefixes[0]] for requested in held_out if len(requested.prefixes) == 1}
    return {name: recorded["shared_13grams"] for name, recorded in single.items() if "shared_13grams" in recorded}
