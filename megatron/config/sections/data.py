"""The data section."""

from dataclasses import dataclass
from math import isfinite

from megatron.config.flags import Section, flag, require
from megatron.config.subsets import TokenCount
from megatron.config.tokenizer_flags import TOKENIZERS, check_tokenizer


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Data: tokenised documents, the order of samples, and the tokenizer."""

    train_data_path: tuple[str, ...] = flag(
        (),
        "training data: a data prefix (of PREFIX.bin and PREFIX.idx), or weight and data prefix of every data set of a "
        "blend, each with the unique tokens to train on, if not all: 0.7 a 25_000_000 0.3 b C4-100M",
        metavar="[WEIGHT] PREFIX [UNIQUE_TOKENS]",
    )
    train_data_path_file: str | None = flag(
        None,
        'file with the arguments of --train-data-path: one line of "WEIGHT PREFIX" "WEIGHT PREFIX UNIQUE_TOKENS", or '
        "one data set a line",
        metavar="FILE",
        excludes="train_data_path",
    )
    valid_data_path: tuple[str, ...] = flag(
        (),
        "validation data: a data prefix or a blend, or NAME=PREFIX for each of several sets; the first set decides "
        "which checkpoint is best",
        metavar="[NAME=]PREFIX",
    )
    valid_data_path_file: str | None = flag(
        None, "file with the arguments of --valid-data-path", metavar="FILE", excludes="valid_data_path"
    )
    split: str | None = flag(
        None,
        "split the documents of the training data, in file order, into training, validation and test sets by these "
        "proportions, such as 969,30,1; test is read by --skip-train only, and with --valid-data-path neither held-out "
        "set is read",
        metavar="TRAIN,VALID,TEST",
    )
    seq_length: int = flag(2048, "sequence length: tokens per sample", within="[2, inf)")
    train_unique_tokens: TokenCount | None = flag(  # noqa: RUF009
        None,
        "train on the first N tokens only, the last document cut; default all; or on a published subset by its name, "
        "such as C4-100M or SlimPajama-1B (tools/sizes.py lists them), of data that begin with its documents",
        metavar="N",
        within="(0, inf)",
    )
    epoch_order: str = flag(
        "documents",
        "documents: shuffle and pack the documents again every epoch; windows: shuffle windows of --seq-length "
        "tokens, cut at an offset drawn every epoch; megatron: Megatron's order, which mixes epochs and depends on "
        "the budget",
        choices=("documents", "windows", "megatron"),
    )
    blend_order: str = flag(
        "due-time",
        "how a training blend interleaves its data sets, in proportion to their weights either way; due-time: the next "
        "sample of each is due after 1/share samples; megatron: the data set furthest below its share, as Megatron",
        choices=("due-time", "megatron"),
    )
    reset_attention_mask: bool = flag(False, "mask attention across document boundaries")
    reset_position_ids: bool = flag(False, "restart position ids at every document")
    eod_mask_loss: bool = flag(False, "exclude the first token of each document from the loss")
    tokenizer_type: str = flag(
        "HFTokenizer",
        f"tokenizer of the data: {', '.join(TOKENIZERS)}",
        choices=TOKENIZERS,
        metavar="NAME",
    )
    tokenizer_model: str | None = flag(
        None,
        "tokenizer.json of an HFTokenizer, or tokenizer.model of a SentencePiece tokenizer; default the file next to "
        "the data",
        metavar="FILE",
    )
    vocab_size: int | None = flag(
        None,
        "vocabulary size of a NullTokenizer, without the end-of-document id that it adds",
        metavar="V",
        within="[1, inf)",
    )
    vocab_file: str | None = flag(
        None, "vocab.json of a GPT2BPETokenizer; implies that type if --tokenizer-type is not given", metavar="FILE"
    )
    merge_file: str | None = flag(None, "merges.txt of a GPT2BPETokenizer; likewise", metavar="FILE")
    num_workers: int = flag(
        0, "worker processes of the data loader; 0 loads data in the training process", within="[0, inf)"
    )

    def __post_init__(self):
        super().__post_init__()
        shares = self.split_shares
        valid = 1 <= len(shares) <= 3 and all(isfinite(share) and share >= 0 for share in shares) and shares[0] > 0
        message = "give up to three proportions, none negative, the first positive: 969,30,1"
        require(self.split is None or valid, "split", self.split, message)
        check_tokenizer(self)

    @property
    def holds_out(self) -> bool:
        """Whether there is a set to validate on."""
        return bool(self.valid_data_path or self.valid_data_path_file or any(self.split_shares[1:2]))

    @property
    def split_shares(self) -> list[float]:
        """The numbers of --split; [] without the flag or if they are not numbers."""
        try:
            return [float(share) for share in self.split.split(",")] if self.split else []
        except ValueError:
            return []
