"""Tokenizers under Megatron's names. Special ids never come out of text."""

from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

END = "<|endoftext|>"


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: str | None):
        from tokenizers import Tokenizer as Library

        if path is None or not Path(path).is_file():
            raise ConfigurationError(
                f"--tokenizer-model {path}: no such file; give the tokenizer.json that made the data"
            )
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"--tokenizer-model {path}: is not a tokenizer.json ({error})") from error
        self._library.encode_special_tokens = True  # literal special text stays text
        self.vocabulary_size, self.eod = self._library.get_vocab_size(), self._library.token_to_id(END)
        if self.eod is None:
            raise ConfigurationError(f"--tokenizer-model {path}: has no {END} token; add one to end documents with")

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of text each id stands for, int64 [V]; byte-level BPE spells a byte as one character."""
        lengths = np.zeros(self.vocabulary_size, np.int64)
        for token, index in self._library.get_vocab().items():
            lengths[index] = len(token)
        lengths[self.eod] = 0
        return lengths


class ByteTokenizer:
    """UTF-8 bytes, and one id for the end of a document."""

    vocabulary_size, eod = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0])


class NullTokenizer:
    """Ids that are text already: numbers with spaces between. One more id ends a document, as in Megatron."""

    def __init__(self, vocab_size: int):
        self.vocabulary_size, self.eod = vocab_size + 1, vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def token_bytes(self) -> None:
        return None


Tokenizer = HFTokenizer | ByteTokenizer | NullTokenizer


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer that --tokenizer-type names."""
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    return NullTokenizer(vocab_size) if tokenizer_type == "NullTokenizer" else HFTokenizer(tokenizer_model)


def train_tokenizer(texts, vocabulary_size: int, path: str) -> None:
    """Train a byte-level BPE of exactly `vocabulary_size` ids on `texts` and write it to `path`."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() != vocabulary_size:
        raise ConfigurationError(
            f"--train-tokenizer {vocabulary_size}: this text gives {library.get_vocab_size()} ids; "
            "ask for that many (at least 257), or add text"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
