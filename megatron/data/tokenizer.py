"""Tokenizers under Megatron's names. Encoding text never gives the end-of-document token or another special token."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megatron.data.byte_level_bpe import FastCore, fast_core
from megatron.errors import ConfigurationError

END = "<|endoftext|>"
SMALLEST_TRAINED = 257  # ids: all bytes, and END
# bytes; longer words (lines of dashes, DNA) are split for BPE training, whose time is quadratic
LONGEST_WORD = 1000


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library; it ends a document with the token it appends, or <|endoftext|>."""

    def __init__(self, path: str | Path | None):
        from tokenizers import Tokenizer as Library

        self.flag, self.hash = f"--tokenizer-model {path}", file_hash(path, "tokenizer.json")
        assert path is not None
        self.source = Path(path).read_bytes()  # to write the same tokenizer next to the data
        try:
            self._library = Library.from_buffer(self.source)
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(
                f"--tokenizer-model {path}: is not a tokenizer.json ({error}); give the one that made the data"
            ) from None
        # the file may enable either, but documents are neither truncated nor padded
        self._library.no_truncation()
        self._library.no_padding()
        self._find_end(appended_token(json.loads(self.source)) or END)

    def _find_end(self, end: str = END) -> None:
        """Set the id of the end-of-document token, and the vocabulary size."""
        self._library.encode_special_tokens = True  # the text of a special token is encoded as text
        self.vocabulary_size = max(self._library.get_vocab().values(), default=-1) + 1  # ids may have gaps
        eod = self._library.token_to_id(end)
        if eod is None or eod in self.encode(end):
            fault = f"has no {end} token" if eod is None else f"reads the text {end} as the end of a document"
            raise ConfigurationError(f'{self.flag}: {fault}; give it one, as an added token with "special": true')
        self.eod = eod

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        with self._encoding():
            return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        with self._encoding():
            return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(
                f"{self.flag}: cannot encode the text ({error}); give it an unknown token, or one for every character"
            ) from None

    @cached_property
    def _fast(self) -> FastCore | None:
        return fast_core(self._library)

    @property
    def lossless(self) -> bool:
        """Whether decoding returns every text: else a normalizer may change it, or the model drop characters."""
        from tokenizers import decoders

        return self._fast is not None and isinstance(self._library.decoder, decoders.ByteLevel)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, computed on one core if it is byte-level BPE."""
        return [self._fast.encode(text) for text in texts] if self._fast else _arrays(self.encode_batch(texts))

    def decode(self, ids) -> str:
        """Return the text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, documents: Sequence[list[int]]) -> list[str]:
        """Return the text of each document's ids, decoded on all cores."""
        return self._library.decode_batch(documents, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray | None:
        """Return the bytes of text of each id, int64 [V]; None if the tokenizer is not byte-level.

        Byte-level BPE writes each byte as one character; added tokens are written as they are.
        """
        from tokenizers import decoders

        if not isinstance(self._library.decoder, decoders.ByteLevel):
            return None
        lengths = np.zeros(self.vocabulary_size, np.int64)
        for token, index in self._library.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)
        for index, added in self._library.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths


class GPT2BPETokenizer(HFTokenizer):
    """GPT-2's byte-level BPE from its two files, vocab.json and merges.txt."""

    def __init__(self, vocab_file: str, merge_file: str):
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        self.flag = f"--vocab-file {vocab_file} and --merge-file {merge_file}"
        for name, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
            if not Path(path).is_file():
                raise ConfigurationError(f"{name} {path}: no such file; give GPT-2's vocab.json and merges.txt")
        try:
            self._library = Library(models.BPE.from_file(str(vocab_file), str(merge_file)))
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"{self.flag}: do not belong together ({error}); give GPT-2's own pair") from None
        self._library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._library.decoder = decoders.ByteLevel()
        if self._library.token_to_id(END) is not None:
            self._library.add_special_tokens([END])  # it keeps the id it has
        self._find_end()
        self.source = self._library.to_str(pretty=True).encode()
        self.hash = hashlib.sha256(self.source).hexdigest()


class GPTSentencePieceTokenizer:
    """A tokenizer.model of the `sentencepiece` library; its end-of-sentence piece is the end-of-document token."""

    lossless: Literal[False] = False  # most models normalise white space at least
    added_pieces: tuple[str, ...] = ()  # pieces of the ids after the model's own

    def __init__(self, path: str | Path | None):
        from sentencepiece import SentencePieceProcessor

        self.flag, self.hash = f"--tokenizer-model {path}", file_hash(path, "tokenizer.model")
        assert path is not None
        self.source = Path(path).read_bytes()
        self._library = SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(self.source)
        except (RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"{self.flag}: is not a SentencePiece model ({str(error).splitlines()[0]}); "
                "give the one that made the data"
            ) from None
        self.vocabulary_size, self.eod, end = self._special_ids()
        if self.eod < 0 or self.eod in self.encode(end):
            fault = "has no end-of-sentence piece" if self.eod < 0 else f"reads the text {end} as the end of a document"
            raise ConfigurationError(f"{self.flag}: {fault}; train it with a control symbol for that")

    def _special_ids(self) -> tuple[int, int, str]:
        """Return the vocabulary size, the end-of-document id, and its piece."""
        eod = self._library.eos_id()
        return self._library.GetPieceSize(), eod, self._library.IdToPiece(eod) if eod >= 0 else ""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self._library.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        return self._library.Encode(list(texts), out_type=int)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return _arrays(self.encode_batch(texts))

    def decode(self, ids) -> str:
        """Return the text of ids; added ids have none."""
        return self._library.DecodeIds([int(index) for index in ids if index < self._library.GetPieceSize()])

    def decode_batch(self, documents: Sequence[list[int]]) -> list[str]:
        """Return the text of each document's ids, without added ids, decoded on all cores."""
        return self._library.Decode(documents)

    def token_bytes(self) -> None:
        """Return None: text is normalised before encoding, so that the ids do not determine its bytes."""
        return None


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """The same with the special tokens that Megatron adds after the model's pieces if they are missing; with <EOD>."""

    def _special_ids(self) -> tuple[int, int, str]:
        library, size = self._library, self._library.GetPieceSize()
        pieces = {library.IdToPiece(index): index for index in range(size)}
        own = ((library.pad_id(), "<PAD>"), (library.bos_id(), "<BOS>"), (library.eos_id(), "<EOS>"))
        named = [library.IdToPiece(index) if index >= 0 else absent for index, absent in own]
        for piece in ("<CLS>", "<SEP>", "<EOD>", "<MASK>", *named):
            pieces.setdefault(piece, len(pieces))
        self.added_pieces = tuple(pieces)[size:]
        return len(pieces), pieces["<EOD>"], "<EOD>"


class ByteTokenizer:
    """UTF-8 bytes, and an end-of-document token."""

    lossless: Literal[True] = True
    vocabulary_size, eod = 257, 256
    flag, hash, source = "--tokenizer-type ByteTokenizer", None, None

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids) -> str:
        """Return the text of ids; the end-of-document token has none."""
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of text of each id, [V]."""
        return np.array([1] * 256 + [0])


class NullTokenizer:
    """Text that consists of ids, separated by spaces. One more id is the end-of-document token, as in Megatron."""

    lossless: Literal[True] = True  # except for leading zeros and white space

    def __init__(self, vocab_size: int):
        self.vocabulary_size, self.eod = vocab_size + 1, vocab_size
        self.flag, self.hash, self.source = f"--vocab-size {vocab_size}", None, None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [self._id(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return _arrays(self.encode_batch(texts))

    def decode(self, ids) -> str:
        """Return ids as text."""
        return " ".join(map(str, ids))

    def token_bytes(self) -> None:
        """Return None: ids do not stand for text."""
        return None

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit() and len(word) < 20 and int(word) < self.eod):
            raise ConfigurationError(
                f"--tokenizer-type NullTokenizer: the text contains {word[:40]!r}, and ids are whole numbers from 0 to "
                f"{self.eod - 1}; fix the text or raise --vocab-size"
            )
        return int(word)


def _arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int64) for ids in documents]


Tokenizer = HFTokenizer | GPTSentencePieceTokenizer | ByteTokenizer | NullTokenizer


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    *,
    vocab_size: int | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> Tokenizer:
    """Return the tokenizer of --tokenizer-type.

    Raises: ConfigurationError for a file that is missing or unusable.
    """
    if tokenizer_type == "GPT2BPETokenizer":
        assert vocab_file is not None and merge_file is not None
        return GPT2BPETokenizer(vocab_file, merge_file)
    if tokenizer_type == "NullTokenizer":
        assert vocab_size is not None
        return NullTokenizer(vocab_size)
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    constructors = {
        "HFTokenizer": HFTokenizer,
        "GPTSentencePieceTokenizer": GPTSentencePieceTokenizer,
        "SentencePieceTokenizer": SentencePieceTokenizer,
    }
    return constructors[tokenizer_type](tokenizer_model)


def tokenizer_path(name: str | Path) -> Path:
    """Return the file of --tokenizer-model: itself, that of a folder, or that of a tokenizer on the hub, downloaded.

    Raises: ConfigurationError if there is none.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    # names on the hub have dots too: Qwen/Qwen2.5-0.5B
    if path.exists() or path.suffix in (".json", ".model") or str(name).count("/") > 1:
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name), "tokenizer.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"--tokenizer-model {name}: no such file, and the hub gives no tokenizer.json of that name ({reason}); "
            "give the tokenizer.json that made the data"
        ) from None


def appended_token(state: dict) -> str | None:
    """Return the special token that a tokenizer.json appends to a text; None if it adds none or others too."""
    match (state.get("post_processor") or {}).get("single"):
        case [{"Sequence": _}, {"SpecialToken": {"id": token}}]:
            return token
    return None


def file_hash(path: str | Path | None, kind: str = "tokenizer.json") -> str:
    """Return the SHA-256 of a tokenizer's file.

    Raises: ConfigurationError if it does not exist.
    """
    if path is None or not Path(path).is_file():
        raise ConfigurationError(f"--tokenizer-model {path}: no such file; give the {kind} that made the data")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, path: str | Path) -> None:
    """Train a byte-level BPE of exactly `vocabulary_size` ids on `texts` and write it to `path`.

    Raises: ConfigurationError if the texts give fewer ids.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.pre_tokenizer = words  # encoding takes linear time, whatever the length of a word
    if library.get_vocab_size() != vocabulary_size:
        raise ConfigurationError(
            f"--train-tokenizer {vocabulary_size}: this text gives {library.get_vocab_size()} ids; "
            f"give that number (at least {SMALLEST_TRAINED}), or add text"
        )
    Path(path).write_text(library.to_str(pretty=True), encoding="utf-8")
