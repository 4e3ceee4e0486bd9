"""Documents and training samples as text, and the tokenizer that decodes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.config.flags import Section, flag, require
from megatron.config.resolve import check_order_seed
from megatron.config.sections import DataConfig, TrainingConfig
from megatron.config.subsets import TokenCount
from megatron.config.tokenizer_flags import SENTENCE_PIECE, TOKENIZERS, check_tokenizer
from megatron.data.copy_documents import Source
from megatron.data.paths import split_edges
from megatron.data.samples import TrainSamples
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import ConfigurationError

FILE_TOKENIZERS = ("HFTokenizer", *SENTENCE_PIECE)  # with a file that --tokenizer-model names
REMEDY = (
    "give the tokenizer of the data (--tokenizer-type, --tokenizer-model, --vocab-file, --merge-file, --vocab-size)"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags(Section):
    """Tokenizer, by default the one that PREFIX.json records."""

    tokenizer_type: str | None = flag(
        None, f"type of the tokenizer: {', '.join(TOKENIZERS)}", choices=TOKENIZERS, metavar="NAME"
    )
    tokenizer_model: str | None = flag(
        None, "its tokenizer.json or tokenizer.model; without --tokenizer-type an HFTokenizer's", metavar="FILE"
    )
    vocab_size: int | None = flag(
        None, "vocabulary size of a NullTokenizer", metavar="V", within="[1, inf)", needs="tokenizer_type"
    )
    vocab_file: str | None = flag(None, "vocab.json of a GPT2BPETokenizer", metavar="FILE")
    merge_file: str | None = flag(None, "merges.txt of a GPT2BPETokenizer", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class SampleFlags(Section):
    """Training samples, as a run with these flags reads them."""

    sample: tuple[int, ...] = flag((), "show the training samples of these indices", metavar="I")
    seq_length: int = flag(DataConfig.seq_length, "--seq-length of the run", within="[2, inf)", needs="sample")
    seed: int = flag(TrainingConfig.seed, "--seed of the run", needs="sample")
    epoch_order: str = flag(
        DataConfig.epoch_order,
        "--epoch-order of the run",
        choices=("documents", "windows", "megatron"),
        needs="sample",
    )
    train_unique_tokens: TokenCount | None = flag(  # noqa: RUF009
        None, "--train-unique-tokens of the run", metavar="N", within="(0, inf)", needs="sample"
    )
    train_samples: int | None = flag(
        None,
        "number of samples of the run, on which the order megatron depends",
        metavar="N",
        within="(0, inf)",
        needs="sample",
    )
    split: str | None = flag(None, "--split of the run", metavar="TRAIN,VALID,TEST", needs="sample")

    def __post_init__(self):
        super().__post_init__()
        needed = self.epoch_order == "megatron" and self.train_samples is None and bool(self.sample)
        require(not needed, "epoch_order", self.epoch_order, "depends on the budget; give --train-samples too")
        negative = [index for index in self.sample if index < 0]
        require(not negative, "sample", self.sample, "sample indices start at 0; give none below")
        budget = self.train_samples
        message = f"--train-samples {budget} are the samples 0 to {(budget or 0) - 1}; give some of them"
        require(budget is None or all(index < budget for index in self.sample), "sample", self.sample, message)
        check_order_seed(self.epoch_order, self.seed)


def open_tokenizer(source: Source, flags: TokenizerFlags) -> Tokenizer | None:
    """Return the tokenizer that the flags give, else the one recorded with the data, else None.

    Raises: ConfigurationError if the flags contradict each other or the recorded tokenizer, or a file is missing.
    """
    recorded = source.metadata
    kind, model = flags.tokenizer_type, flags.tokenizer_model
    if kind is None and not (model or flags.vocab_file or flags.merge_file):
        kind = recorded.get("tokenizer_type")
        flags = replace(flags, tokenizer_type=kind, vocab_size=recorded.get("vocab_size"))
    elif kind is None:
        kind = "HFTokenizer" if model else "GPT2BPETokenizer"
    if kind == "GPT2BPETokenizer" and not (flags.vocab_file or flags.merge_file):
        kind = "HFTokenizer"  # preprocessing writes GPT-2's as a tokenizer.json next to the data
    if kind in FILE_TOKENIZERS and model is None and recorded.get("tokenizer_model"):
        model = str(Path(source.prefix).parent / recorded["tokenizer_model"])
    if kind is None or (kind in FILE_TOKENIZERS and model is None):
        return None
    flags = replace(flags, tokenizer_type=kind, tokenizer_model=model)
    check_tokenizer(flags)
    tokenizer = build_tokenizer(
        kind,
        model,
        vocab_size=flags.vocab_size,
        vocab_file=flags.vocab_file,
        merge_file=flags.merge_file,
    )
    size = recorded.get("vocabulary_size", tokenizer.vocabulary_size)
    if (size, recorded.get("tokenizer_hash", tokenizer.hash)) != (tokenizer.vocabulary_size, tokenizer.hash):
        raise ConfigurationError(
            f"{source.prefix}: was tokenised with another tokenizer than {tokenizer.flag}, of {size} ids; {REMEDY}"
        )
    return tokenizer


def document_text(source: Source, tokenizer: Tokenizer | None, document: int) -> dict:
    """Return number, length, ids and text of a document, for JSON.

    Raises: ConfigurationError if there is no such document, or no tokenizer.
    """
    if not 0 <= document < len(source.dataset):
        raise ConfigurationError(
            f"--document {document}: {source.prefix} has documents 0 to {len(source.dataset) - 1}; give one of them"
        )
    ids = source.dataset[document]
    text = decode(source, tokenizer, ids, f"--document {document}")
    return {"document": document, "tokens": len(ids), "ids": ids.tolist(), "text": text}


def sample_texts(source: Source, tokenizer: Tokenizer | None, flags: SampleFlags) -> list[dict]:
    """Return index, epoch, ids [S + 1] and text of the training samples of --sample, for JSON.

    Raises: ConfigurationError if a run with these flags could not read the data, or there is no tokenizer.
    """
    data = DataConfig(
        split=flags.split,
        seq_length=flags.seq_length,
        train_unique_tokens=flags.train_unique_tokens,
        epoch_order=flags.epoch_order,
    )
    dataset = source.dataset
    if data.split:
        last = split_edges(data.split_shares, len(dataset))[1]
        if not dataset.sizes[:last].any():
            raise ConfigurationError(f"--split {data.split}: leaves no training tokens; change the shares")
        dataset = dataset.document_range(0, last)
    samples = TrainSamples(
        dataset,
        data.seq_length,
        flags.seed,
        epoch_order=data.epoch_order,
        unique_tokens=data.train_unique_tokens,
    )
    samples.request(flags.train_samples or 1)
    shown = []
    for index in flags.sample:
        ids = samples[index]
        text = decode(source, tokenizer, ids, f"--sample {index}")
        shown.append({"sample": index, "epoch": samples.epochs(index)[0], "ids": ids.tolist(), "text": text})
    return shown


def decode(source: Source, tokenizer: Tokenizer | None, ids: Sequence[int] | np.ndarray, flag_typed: str) -> list[str]:
    """Return the texts between end-of-document tokens; the last is "" if `ids` end with such a token.

    Raises: ConfigurationError without a tokenizer, or for an id that it does not have.
    """
    if tokenizer is None:
        raise ConfigurationError(f"{flag_typed}: no tokenizer is known for {source.prefix}; {REMEDY}")
    ids = np.asarray(ids, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size:
        raise ConfigurationError(
            f"{flag_typed}: has ids from {ids.min()} to {ids.max()}, and {tokenizer.flag} has ids 0 to "
            f"{tokenizer.vocabulary_size - 1}; {REMEDY}"
        )
    ends = np.flatnonzero(ids == tokenizer.eod)
    pieces = np.split(ids, ends)
    return [tokenizer.decode(piece[piece != tokenizer.eod].tolist()) for piece in pieces]
