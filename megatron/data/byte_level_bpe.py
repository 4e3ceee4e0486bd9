"""Byte-level BPE through tiktoken's core and a table of words, with the ids of the `tokenizers` library.

`tokenizers` merges a pair of tokens by the priority of the rule (left, right); tiktoken by that of the bytes that they
form. The two agree if every token of the vocabulary, encoded alone, is one token: suppose that `tokenizers` has the
adjacent tokens L and R and that LR is a token. No merge has crossed the ends of LR so far, so encoding LR alone passes
through the same state, and it ends in the token LR; hence (L, R) is a rule, and the only one that forms LR. `fast_core`
checks the condition, and everything else that the argument needs; tokenizers that fail it keep their own library.
"""

import json
import re

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models

# the words of GPT-2 (openai/gpt-2, encoder.py), which the `tokenizers` library's ByteLevel pre-tokenizer cuts as well;
# possessive quantifiers and the first of the alternatives for white space change no match, only the time
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# the same for ASCII; an alternative that begins with a character or a set of them is passed over fastest
ASCII_WORDS = "|".join(
    [r" [A-Za-z]+|[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| [0-9]+|[0-9]+", r" [^\sA-Za-z0-9]+|[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"]
)
find_ascii_words = re.compile(ASCII_WORDS, re.ASCII).findall
# for text whose white space is ASCII: what is not ASCII is matched with all characters up to white space; tried only
# after white space, as trying it at each word of a long line without any would take quadratic time
find_words = re.compile(rf" ?(?<!\S)\S*[^\x00-\x7f]\S*|{ASCII_WORDS}", re.ASCII).findall
has_other_space = re.compile(r"[^\S\x00-\x7f]").search
CACHED_WORDS, CACHED_LENGTH = 1 << 20, 40  # words in memory, and characters of the longest


class FastCore:
    """Encodes text by ranks, which are merge priorities; `ids` maps them to token ids, uint32 [V].

    Words recur: the ids of those seen before are looked up, and the core encodes the others. A word is encoded by
    itself, since no merge crosses its ends; words with characters that are not ASCII may be several.
    """

    def __init__(self, encoding: tiktoken.Encoding, ids: np.ndarray):
        self._encoding, self._ids = encoding, ids
        self._id_bytes = [index.tobytes() for index in ids]
        self._cache = _Cache(self)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint32 [N]."""
        if not text.isascii() and has_other_space(text):
            return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]
        words = find_ascii_words(text) if text.isascii() else find_words(text)
        return np.frombuffer(b"".join(map(self._cache.__getitem__, words)), np.uint32)

    def encode_word(self, word: str) -> bytes:
        """Return the ids of a word, as bytes, from the core."""
        return b"".join(map(self._id_bytes.__getitem__, self._encoding.encode_ordinary(word)))


class _Cache(dict[str, bytes]):
    """The ids of words, as bytes."""

    def __init__(self, core: FastCore):
        super().__init__()
        self._core = core

    def __missing__(self, word: str) -> bytes:
        data = self._core.encode_word(word)
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = data
        return data


def fast_core(library: Tokenizer) -> FastCore | None:
    """Return a core that gives the ids of a tokenizer for all text; None if there is none."""
    state = json.loads(library.to_str())
    if not _is_plain(state):
        return None
    special = {token["content"] for token in state["added_tokens"]}
    vocabulary, model = state["model"]["vocab"], state["model"]
    characters = byte_characters()
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    merged = [left + right for left, right in merges]
    if len({*merged, *characters}) != len(merged) + 256 or not {*merged, *characters} <= vocabulary.keys():
        return None
    tokens = [*characters, *merged]
    if special & set(tokens) or not _encodes_itself(vocabulary, merges, tokens[256:]):
        return None
    to_byte = {character: value for value, character in enumerate(characters)}
    ranks = {bytes(to_byte[character] for character in token): rank for rank, token in enumerate(tokens)}
    ids = np.array([vocabulary[token] for token in tokens], np.uint32)
    encoding = tiktoken.Encoding("byte-level BPE", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return FastCore(encoding, ids)


def byte_characters() -> list[str]:
    """Return the character for each byte in the vocabulary of a byte-level tokenizer, [256].

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value if value in printable else next(others)) for value in range(256)]


def _is_plain(state: dict) -> bool:
    """Return whether a tokenizer does nothing but cut GPT-2's words and merge bytes."""
    model, words = state["model"], state["pre_tokenizer"] or {}
    return (
        state["normalizer"] is None
        and words.get("type") == "ByteLevel"
        and not words["add_prefix_space"]
        and words.get("use_regex", True)
        and model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(model.get(name) for name in ("byte_fallback", "ignore_merges"))
        and all(token["special"] for token in state["added_tokens"])
    )


def _encodes_itself(vocabulary: dict[str, int], merges: list[tuple[str, str]], tokens: list[str]) -> bool:
    model = models.BPE(vocabulary, merges)
    return all(len(model.tokenize(token)) == 1 for token in tokens)
