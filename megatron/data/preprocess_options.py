"""The flags of tools/preprocess_data.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from megatron.config.flags import Section, flag, require
from megatron.config.tokenizer_flags import SENTENCE_PIECE, TOKENIZERS, check_tokenizer
from megatron.data.corpus import SPLITS, Document, standard_library
from megatron.data.text_files import read_documents
from megatron.data.tokenizer import SMALLEST_TRAINED, file_hash

DEFAULT_TRAINED = 512  # vocabulary size of a trained tokenizer


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(Section):
    """Text and tokens."""

    output_dir: Path = flag(  # noqa: RUF009
        help="folder for {train,tuning,validation}.{bin,idx,json} and tokenizer.json", metavar="DIR"
    )
    input: tuple[str, ...] = flag(
        (),
        "text files: .txt or .jsonl, also as .gz or .zst; default the source of Python's standard library",
        metavar="FILE",
    )
    json_key: str = flag("text", "field of a .jsonl line that holds the text", metavar="FIELD")
    txt_separator: str | None = flag(
        None,
        "line that ends a document in a .txt file, '' for an empty line; default one document a file",
        metavar="LINE",
    )
    splits: tuple[float, ...] = flag(
        (80, 10, 10),
        "proportions of the train, tuning and validation splits; a split of share 0 is not written",
        metavar="SHARE",
    )
    tokenizer_type: str = flag(
        "HFTokenizer", f"type of tokenizer: {', '.join(TOKENIZERS)}", choices=TOKENIZERS, metavar="NAME"
    )
    tokenizer_model: str | None = flag(
        None,
        "existing tokenizer.json, default train one; or tokenizer.model of a SentencePiece tokenizer",
        metavar="FILE",
    )
    train_tokenizer: int | None = flag(
        None,
        f"vocabulary size of the byte-level BPE trained on the train split; default {DEFAULT_TRAINED}",
        metavar="V",
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

    def __post_init__(self):
        super().__post_init__()
        check_tokenizer(self)
        shares, kind = self.shares, self.tokenizer_type
        model, train = self.tokenizer_model, self.train_tokenizer
        valid = len(self.splits) == 3 and all(isfinite(share) and share >= 0 for share in self.splits)
        require(valid and any(self.splits), "splits", shares, "give three proportions, none negative, one above 0")
        both = train is not None and model is not None
        require(not both, "train_tokenizer", train, f"excludes --tokenizer-model {model}; drop one")
        needs_model = kind in SENTENCE_PIECE and model is None
        require(not needs_model, "tokenizer_type", kind, "needs --tokenizer-model; give its tokenizer.model")
        message = f"belongs to HFTokenizer, and --tokenizer-type is {kind}; leave it out"
        require(train is None or kind == "HFTokenizer", "train_tokenizer", train, message)
        for name in ("vocab_file", "merge_file"):
            path = getattr(self, name)
            require(path is None or Path(path).is_file(), name, path, "no such file; give GPT-2's own")
        enough = train is None or train >= SMALLEST_TRAINED
        require(
            enough,
            "train_tokenizer",
            train,
            f"give at least {SMALLEST_TRAINED}, for all bytes and the end-of-document token",
        )
        empty = self.splits[0] == 0 and self.trained_ids is not None
        require(not empty, "splits", shares, "leaves no text to train a tokenizer on; give --tokenizer-model")

    @property
    def shares(self) -> str:
        """--splits as typed."""
        return " ".join(f"{share:g}" for share in self.splits)

    @property
    def written(self) -> list[str]:
        """Names of the splits that are written."""
        return [name for name, share in zip(SPLITS, self.splits) if share > 0]

    @property
    def source(self) -> list[str] | str:
        """Origin of the text, for the metadata."""
        return list(self.input) or "python-stdlib"

    @property
    def named(self) -> str:
        """Name of the text in messages."""
        return f"--input {' '.join(self.input)}" if self.input else "the standard library's source"

    @property
    def tokenizer_file(self) -> str:
        """Name of the tokenizer's file next to the data."""
        return "tokenizer.model" if self.tokenizer_type in SENTENCE_PIECE else "tokenizer.json"

    @property
    def trained_ids(self) -> int | None:
        """Vocabulary size of the tokenizer to train, None if none is trained."""
        trains = self.tokenizer_type == "HFTokenizer" and self.tokenizer_model is None
        return (self.train_tokenizer or DEFAULT_TRAINED) if trains else None

    def documents(self) -> Iterator[Document]:
        """Return an iterator over the documents, from the first."""
        if self.input:
            return read_documents(self.input, self.json_key, self.txt_separator)
        return standard_library()

    def settings(self, corpus_hash: str) -> dict:
        """Return the settings that determine the written files."""
        return {
            "hash": corpus_hash,
            "splits": list(self.splits),
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_model": self.tokenizer_model and file_hash(self.tokenizer_model),
            "train_tokenizer": self.trained_ids,
            "vocab_size": self.vocab_size,
            "gpt2_files": [file_hash(path) for path in (self.vocab_file, self.merge_file) if path],
        }
