"""What a user asks of tools/preprocess_data.py: its flags, and what they mean together."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from megatron.config.flags import flag, require
from megatron.config.sections import SENTENCE_PIECE, TOKENIZERS, check_tokenizer
from megatron.data.corpus import SPLITS, Document, standard_library
from megatron.data.text_files import read_documents
from megatron.data.tokenizer import SMALLEST_TRAINED, file_hash

TRAINED = 512  # ids of a tokenizer that nothing else is said of


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Text and tokens."""

    output_dir: Path = flag(help="folder for {train,tuning,validation}.{bin,idx,json} and tokenizer.json")
    input: tuple[str, ...] = flag(
        (),
        "your own text: .txt, .jsonl, each also .gz or .zst; without it, the source of Python's standard library",
        metavar="FILE",
    )
    json_key: str = flag("text", "field of a .jsonl line that holds the text", metavar="FIELD")
    txt_separator: str | None = flag(
        None, "the line that ends a document of a .txt file, '' an empty line; default a file is one", metavar="LINE"
    )
    splits: tuple[float, ...] = flag(
        (80, 10, 10), "shares of train, tuning and validation; a split of share 0 is not written", metavar="SHARE"
    )
    tokenizer_type: str = flag(
        "HFTokenizer", f"how text becomes ids: {', '.join(TOKENIZERS)}", choices=TOKENIZERS, metavar="NAME"
    )
    tokenizer_model: str | None = flag(
        None,
        "an existing tokenizer.json, default train one; tokenizer.model of a SentencePieceTokenizer",
        metavar="FILE",
    )
    train_tokenizer: int | None = flag(
        None, f"ids of the byte-level BPE trained on the train split; default {TRAINED}", metavar="V"
    )
    vocab_size: int | None = flag(None, "number of ids of a NullTokenizer, which adds one for end-of-document")
    vocab_file: str | None = flag(
        None, "vocab.json of a GPT2BPETokenizer, which it implies where no --tokenizer-type is given", metavar="FILE"
    )
    merge_file: str | None = flag(None, "merges.txt of a GPT2BPETokenizer, likewise", metavar="FILE")

    def __post_init__(self):
        check_tokenizer(self)
        shares, kind = self.shares, self.tokenizer_type
        model, train = self.tokenizer_model, self.train_tokenizer
        sound = len(self.splits) == 3 and all(isfinite(share) and share >= 0 for share in self.splits)
        require(sound and any(self.splits), "splits", shares, "give three shares, none negative, one above 0")
        both = train is not None and model is not None
        require(not both, "train_tokenizer", train, f"--tokenizer-model {model} is given; drop one")
        needs_model = kind in SENTENCE_PIECE and model is None
        require(not needs_model, "tokenizer_type", kind, "needs --tokenizer-model; give its tokenizer.model")
        rule = f"belongs to HFTokenizer, and --tokenizer-type is {kind}; leave it out"
        require(train is None or kind == "HFTokenizer", "train_tokenizer", train, rule)
        for name in ("vocab_file", "merge_file"):
            path = getattr(self, name)
            require(path is None or Path(path).is_file(), name, path, "no such file; give GPT-2's own")
        enough = train is None or train >= SMALLEST_TRAINED
        require(enough, "train_tokenizer", train, f"give at least {SMALLEST_TRAINED}, for all bytes and the end")
        empty = self.splits[0] == 0 and self.trained_ids is not None
        require(not empty, "splits", shares, "leaves no text to train a tokenizer on; give --tokenizer-model")

    @property
    def shares(self) -> str:
        return " ".join(f"{share:g}" for share in self.splits)

    @property
    def written(self) -> list[str]:
        return [name for name, share in zip(SPLITS, self.splits) if share > 0]

    @property
    def source(self) -> list[str] | str:
        return list(self.input) or "python-stdlib"

    @property
    def named(self) -> str:
        """Return the text as a message names it."""
        return f"--input {' '.join(self.input)}" if self.input else "the standard library's source"

    @property
    def tokenizer_file(self) -> str:
        """Name of the tokenizer's file beside the data."""
        return "tokenizer.model" if self.tokenizer_type in SENTENCE_PIECE else "tokenizer.json"

    @property
    def trained_ids(self) -> int | None:
        """Ids of the tokenizer to be trained, None where there is one."""
        trains = self.tokenizer_type == "HFTokenizer" and self.tokenizer_model is None
        return (self.train_tokenizer or TRAINED) if trains else None

    def documents(self) -> Iterator[Document]:
        """Start to read, anew at each call."""
        if self.input:
            return read_documents(self.input, self.json_key, self.txt_separator)
        return standard_library()

    def settings(self, corpus_hash: str) -> dict:
        """Return all that decides what is written: equal settings, equal files."""
        return {
            "hash": corpus_hash,
            "splits": list(self.splits),
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_model": self.tokenizer_model and file_hash(self.tokenizer_model),
            "train_tokenizer": self.trained_ids,
            "vocab_size": self.vocab_size,
            "gpt2_files": [file_hash(path) for path in (self.vocab_file, self.merge_file) if path],
        }
