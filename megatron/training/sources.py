"""The data of a run: opened, and checked against the tokenizer that made it."""

from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections import Config
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import ConfigurationError
from megatron.training.evaluate import ValidationSet


@dataclass(frozen=True)
class Sources:
    """The data of a run, opened and checked."""

    tokenizer: Tokenizer
    train: TrainSamples
    validation: list[ValidationSet]
    corpus: dict  # hash and source of the training text


def open_sources(config: Config) -> Sources:
    """Open training and validation data and the tokenizer that made them."""
    data = config.data
    if not data.train_data_path:
        raise ConfigurationError("--train-data-path is required; tools/preprocess_data.py writes one from text")
    if len(data.train_data_path) > 1:
        raise ConfigurationError(
            f"--train-data-path {' '.join(data.train_data_path)}: blends of several data sets are not available yet; "
            "give one prefix"
        )
    prefix = data.train_data_path[0]
    made = read_metadata(prefix)
    model = data.tokenizer_model
    if model is None and made.get("tokenizer_model"):
        model = str(Path(prefix).parent / made["tokenizer_model"])
    tokenizer = build_tokenizer(data.tokenizer_type, model, data.vocab_size)
    _check_vocabulary(prefix, made, tokenizer)
    train = TrainSamples(
        IndexedDataset(prefix, tokenizer.vocabulary_size),
        data.seq_length,
        config.training.seed,
        data.epoch_order,
        data.train_unique_tokens,
    )
    sets = [_validation_set(item, config, tokenizer) for item in data.valid_data_path]
    if len({found.name for found in sets}) < len(sets):
        raise ConfigurationError(
            f"--valid-data-path {' '.join(data.valid_data_path)}: two sets share a name; give each name=prefix"
        )
    return Sources(tokenizer, train, sets, {"hash": made.get("corpus_hash"), "source": made.get("source")})


def _check_vocabulary(prefix: str, made: dict, tokenizer: Tokenizer) -> None:
    size = made.get("vocabulary_size", tokenizer.vocabulary_size)
    if size != tokenizer.vocabulary_size:
        raise ConfigurationError(
            f"{prefix}: was tokenised with {size} ids, the tokenizer has {tokenizer.vocabulary_size}; "
            "give the tokenizer that made the data (--tokenizer-type, --tokenizer-model, --vocab-size)"
        )


def _validation_set(item: str, config: Config, tokenizer: Tokenizer) -> ValidationSet:
    name, separator, prefix = item.partition("=")
    name, prefix = (name, prefix) if separator else ("validation", item)
    _check_vocabulary(prefix, read_metadata(prefix), tokenizer)
    dataset = IndexedDataset(prefix, tokenizer.vocabulary_size)
    windows = ValidationWindows(dataset, config.data.seq_length, config.validation.eval_samples)
    return ValidationSet(name, windows, len(dataset), tokenizer.token_bytes())
