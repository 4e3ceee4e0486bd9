"""The data of a run: opened, and checked against the tokenizer that made it."""

from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections import Config, DataConfig
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.preparation import file_hash
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
    corpus_hash: str  # of the whole text; of the training tokens, where another system wrote them
    corpus_source: str | list[str]
    corpus_python_version: str | None  # that prepared it; None where another system wrote the data
    fingerprints: dict[str, str]  # of the training tokens ("--train-data-path") and of each validation set by name
    shared_13grams: dict[str, dict]  # by validation set: how much of it stands in the training split too


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
    held_out = _held_out(data.valid_data_path)
    made = {each: read_metadata(each) for each in (prefix, *held_out.values())}
    tokenizer = _tokenizer(data, prefix, made)
    dataset = IndexedDataset(prefix, tokenizer.vocabulary_size)
    train = TrainSamples(dataset, data.seq_length, config.training.seed, data.epoch_order, data.train_unique_tokens)
    opened = {name: IndexedDataset(each, tokenizer.vocabulary_size) for name, each in held_out.items()}
    fingerprints = {name: each.fingerprint() for name, each in [("--train-data-path", dataset), *opened.items()]}
    return Sources(
        tokenizer,
        train,
        [_validation_set(name, each, config, tokenizer) for name, each in opened.items()],
        made[prefix].get("corpus_hash", fingerprints["--train-data-path"]),
        made[prefix].get("source", prefix),
        made[prefix].get("python_version"),
        fingerprints,
        {name: made[each]["shared_13grams"] for name, each in held_out.items() if "shared_13grams" in made[each]},
    )


def _held_out(items: tuple[str, ...]) -> dict[str, str]:
    """Return the prefix of each --valid-data-path item by name; without a name it is "validation"."""
    pairs = [item.split("=", 1) if "=" in item else ("validation", item) for item in items]
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ConfigurationError(f"--valid-data-path {' '.join(items)}: two sets share a name; give each name=prefix")
    return named


def _tokenizer(data: DataConfig, prefix: str, made: dict[str, dict]) -> Tokenizer:
    """Return the tokenizer, after a check that it made all the data."""
    model = data.tokenizer_model
    if model is None and made[prefix].get("tokenizer_model"):
        model = str(Path(prefix).parent / made[prefix]["tokenizer_model"])
    tokenizer = build_tokenizer(data.tokenizer_type, model, data.vocab_size, data.vocab_file, data.merge_file)
    hashed = file_hash(model) if data.tokenizer_type == "HFTokenizer" else None
    for each, recorded in made.items():
        size = recorded.get("vocabulary_size", tokenizer.vocabulary_size)
        if size != tokenizer.vocabulary_size:
            fault = f"was tokenised with {size} ids, the tokenizer has {tokenizer.vocabulary_size}"
        elif hashed and recorded.get("tokenizer_hash", hashed) != hashed:
            fault = f"was tokenised with another file than {model}"
        else:
            continue
        raise ConfigurationError(
            f"{each}: {fault}; give the tokenizer that made the data "
            "(--tokenizer-type, --tokenizer-model, --vocab-size)"
        )
    return tokenizer


def _validation_set(name: str, dataset: IndexedDataset, config: Config, tokenizer: Tokenizer) -> ValidationSet:
    windows = ValidationWindows(dataset, config.data.seq_length, config.validation.eval_samples)
    return ValidationSet(name, windows, len(dataset), tokenizer.token_bytes())
