"""The flags of tools/preprocess_data.py."""

import os
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from megatron.config.compatibility_entries import NoOp, Refused, Same, no_op, no_op_value, one_table, refused
from megatron.config.flags import Section, flag, require
from megatron.config.tokenizer_flags import SENTENCE_PIECE, TOKENIZERS, check_tokenizer
from megatron.data.corpus import SPLITS
from megatron.data.sources.base import Source
from megatron.data.sources.json_lines import STANDARD_INPUT
from megatron.data.sources.plain_text import PlainText
from megatron.data.sources.registry import list_sources
from megatron.data.sources.standard_library import StandardLibrary
from megatron.data.sources.tables import HuggingFaceDataset
from megatron.data.tokenizer import SMALLEST_TRAINED, Tokenizer, build_tokenizer, file_hash, tokenizer_path

DEFAULT_TRAINED = 512  # vocabulary size of a trained tokenizer
BYTES_PER_WORKER = 8 << 20  # of text on disk; for less, a process is not worth its start
TABLE: dict[str, Same | NoOp | Refused] = one_table(
    {"--json-key": Same("--json-keys"), "--hf-column": Same("--json-keys")},
    no_op_value("--dataset-impl", "token files are always memory-mapped", "mmap", "only mmap is written; leave it out"),
    no_op_value("--partitions", "--workers share the text in any number, and documents keep their order"),
    no_op("--keep-sequential-samples", "documents keep their order"),
    no_op_value("--log-interval", "progress is shown by time"),
    no_op_value("--seq-length", "documents are never truncated"),
    no_op_value("--make-vocab-size-divisible-by --pad-vocab-size-to", "the model pads its vocabulary, not the data"),
    no_op_value("--lang", "it names the language in which sentences are split"),
    no_op("--keep-newlines", "documents are never split into sentences"),
    refused("--split-sentences", "cuts documents for BERT's objective, which is not here; leave it out"),
    refused("--append-bos", "documents only end with a token (--append-eod); leave it out"),
)


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(Section):
    """Text and tokens."""

    output_dir: Path | None = flag(  # noqa: RUF009
        None, "folder for {train,tuning,validation}.{bin,idx,json} and tokenizer.json", metavar="DIR"
    )
    output_prefix: str | None = flag(
        None, "as in Megatron: write everything to PREFIX_KEY_document.{bin,idx}, without splits", metavar="PREFIX"
    )
    root: Path | None = flag(  # noqa: RUF009
        None, "folder that --output-prefix is relative to", metavar="DIR", needs="output_prefix"
    )
    append_eod: bool = flag(
        False, "with --output-prefix: end every document with the end-of-document token; else it always is"
    )
    input: tuple[str, ...] = flag(
        (),
        "files, folders or quoted patterns ('docs/**/*.md') of .txt, .jsonl or .json lines (also as .gz, .zst, .bz2, "
        ".xz), .parquet or .arrow; - for JSON lines on standard input; default the source of Python's standard library",
        metavar="PATH",
        excludes="hf_dataset",
    )
    txt: bool = flag(False, "read every file of --input as plain text, whatever its suffix", needs="input")
    hf_dataset: str | None = flag(
        None, "data set of the Hugging Face hub, which is streamed, or a local folder of one", metavar="NAME"
    )
    hf_config: str | None = flag(None, "its configuration, such as en", metavar="NAME", needs="hf_dataset")
    hf_split: str = flag("train", "its split", metavar="NAME", needs="hf_dataset")
    json_keys: tuple[str, ...] = flag(
        ("text",),
        "field of a JSON line, or column of a table, that holds the text; several with --output-prefix, which then "
        "writes a data set for each",
        metavar="FIELD",
    )
    on_error: str = flag(
        "stop",
        "what a record that is no text does: stop, or be counted in the summary and left out",
        choices=("stop", "skip"),
    )
    workers: int | None = flag(
        None,
        "processes that tokenise; the files are the same for any number; default one for each core",
        metavar="N",
        within="[1, inf)",
    )
    txt_separator: str | None = flag(
        None,
        "line that ends a document in a plain text file, '' for an empty line; default one document a file",
        metavar="LINE",
        needs="input",
    )
    splits: tuple[float, ...] = flag(
        (80, 10, 10),
        "proportions of the train, tuning and validation splits; a split of share 0 is not written",
        metavar="SHARE",
        needs="output_dir",
    )
    tokenizer_type: str = flag(
        "HFTokenizer", f"type of tokenizer: {', '.join(TOKENIZERS)}", choices=TOKENIZERS, metavar="NAME"
    )
    tokenizer_model: str | None = flag(
        None,
        "existing tokenizer.json, or the name of a tokenizer on the Hugging Face hub, default train one; or "
        "tokenizer.model of a SentencePiece tokenizer",
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
        require(
            (self.output_dir is None) != (self.output_prefix is None),
            "output_dir",
            self.output_dir,
            "give it for splits in a folder, or --output-prefix as in Megatron; one of them",
        )
        keys = " ".join(self.json_keys)
        require(len(set(self.json_keys)) == len(self.json_keys), "json_keys", keys, "names a key twice; leave one out")
        several = "several keys need --output-prefix, and JSON lines or tables; give one key"
        has_keys = self.output_prefix is not None and (self.input or self.hf_dataset)
        require(bool(has_keys) or len(self.json_keys) == 1, "json_keys", keys, several)
        prefix = self.output_prefix
        is_name = prefix is None or os.path.basename(prefix) not in ("", ".", "..")
        require(is_name, "output_prefix", prefix, "ends with no name for the files; append one")
        require("/" not in keys, "json_keys", keys, "a key is part of a file name and has no slash; rename it")
        separator = self.txt_separator or ""
        message = "has a line break, and ends a document as a whole line; give '' for an empty line"
        require(not {*separator} & {*"\r\n"}, "txt_separator", separator, message)
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
    def has_splits(self) -> bool:
        """Whether documents are dealt to splits, instead of all written to one data set for each key."""
        return self.output_dir is not None

    @property
    def outputs(self) -> dict[str, str]:
        """The data sets that are written: split or key -> name of its files."""
        if self.has_splits:
            return {name: name for name, share in zip(SPLITS, self.splits) if share > 0}
        return {key: f"{self._prefix.name}_{key}_document" for key in self.json_keys}

    @property
    def folder(self) -> Path:
        """The folder of the data sets."""
        return self.output_dir if self.output_dir is not None else self._prefix.parent

    @property
    def stage(self) -> Path:
        """The folder of unfinished files."""
        return self.folder / (".partial" if self.has_splits else f".{self._prefix.name}.partial")

    @property
    def record(self) -> str:
        """Name of the file that says of what text and settings all data sets are."""
        return "corpus.json" if self.has_splits else f"{self._prefix.name}_corpus.json"

    @property
    def target(self) -> str:
        """The flag that names the output, for messages."""
        return f"--output-dir {self.output_dir}" if self.has_splits else f"--output-prefix {self.output_prefix}"

    @property
    def appends_eod(self) -> bool:
        """Whether every document ends with the end-of-document token."""
        return self.has_splits or self.append_eod

    def is_blank(self, text: str) -> bool:
        """Return whether a document is left out: white space, or with Megatron's command line an empty one only."""
        return not text or (self.has_splits and text.isspace())

    @property
    def reads_stream(self) -> bool:
        """Whether the text can be read only once."""
        return self.input == (STANDARD_INPUT,)

    @property
    def reading(self) -> dict:
        """How the text is taken from its sources, apart from what --on-error skips."""
        return {"json_keys": self.json_keys, "txt": self.txt, "txt_separator": self.txt_separator}

    @property
    def source(self) -> list[str] | str:
        """Origin of the text, for the metadata."""
        if self.hf_dataset is not None:
            return ":".join(filter(None, (self.hf_dataset, self.hf_config, self.hf_split)))
        return list(self.input) or "python-stdlib"

    @property
    def named(self) -> str:
        """Name of the text in messages."""
        if self.hf_dataset is not None:
            return f"--hf-dataset {self.hf_dataset}"
        return f"--input {' '.join(self.input)}" if self.input else "the standard library's source"

    @property
    def tokenizer_file(self) -> str:
        """Name of the tokenizer's file next to the data."""
        name = "tokenizer.model" if self.tokenizer_type in SENTENCE_PIECE else "tokenizer.json"
        return name if self.has_splits else f"{self._prefix.name}_{name}"

    @property
    def trained_ids(self) -> int | None:
        """Vocabulary size of the tokenizer to train, None if none is trained."""
        trains = self.tokenizer_type == "HFTokenizer" and self.tokenizer_model is None
        return (self.train_tokenizer or DEFAULT_TRAINED) if trains else None

    def build_tokenizer(self, trained: Path) -> Tokenizer:
        """Return the tokenizer; `trained` is the file of one that is trained.

        Raises: ConfigurationError for a file that is missing or unusable.
        """
        return build_tokenizer(
            self.tokenizer_type,
            trained if self.trained_ids else self.tokenizer_model and tokenizer_path(self.tokenizer_model),
            vocab_size=self.vocab_size,
            vocab_file=self.vocab_file,
            merge_file=self.merge_file,
        )

    def sources(self) -> list[Source]:
        """Return the sources of the text, in order.

        Raises: ConfigurationError for an input that does not exist or has an unknown format, and for --json-keys that
        no input has.
        """
        if self.hf_dataset is not None:
            return [HuggingFaceDataset(self.hf_dataset, self.hf_split, self.hf_config)]
        sources: list[Source] = [StandardLibrary()]
        if self.input:
            sources = list_sources(self.input, txt=self.txt, separator=self.txt_separator)
        has_fields = not all(isinstance(source, PlainText | StandardLibrary) for source in sources)
        is_default = self.json_keys == PreprocessOptions.json_keys
        message = "is a field of JSON lines or tables, and all text is plain; leave it out"
        # with --output-prefix it is part of the names of the files
        require(has_fields or is_default or not self.has_splits, "json_keys", " ".join(self.json_keys), message)
        return sources

    def worker_processes(self, sources: list[Source]) -> int:
        """Return how many processes tokenise: fewer than --workers if there is little text."""
        workers = self.workers or len(os.sched_getaffinity(0))
        sizes = [source.size for source in sources]
        known = sum(size for size in sizes if size is not None)
        return workers if None in sizes else max(1, min(workers, known // BYTES_PER_WORKER))

    def settings(self, corpus_hash: str | None) -> dict:
        """Return the settings that determine the written files."""
        model = self.tokenizer_model and file_hash(tokenizer_path(self.tokenizer_model))
        return {
            "hash": corpus_hash,
            "splits": list(self.splits) if self.has_splits else None,
            "json_keys": None if self.has_splits else list(self.json_keys),
            "append_eod": self.appends_eod,
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_model": model,
            "train_tokenizer": self.trained_ids,
            "vocab_size": self.vocab_size,
            "gpt2_files": [file_hash(path) for path in (self.vocab_file, self.merge_file) if path],
        }

    @property
    def _prefix(self) -> Path:
        assert self.output_prefix is not None
        return (self.root or Path()) / self.output_prefix
