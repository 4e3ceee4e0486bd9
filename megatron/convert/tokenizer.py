"""Export our tokenizers to transformers: the same ids for every text, including text that spells special tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from megatron.convert import sentence_piece
from megatron.convert.folders import set_fields
from megatron.data.tokenizer import (
    END,
    ByteTokenizer,
    GPTSentencePieceTokenizer,
    HFTokenizer,
    NullTokenizer,
    Tokenizer,
)
from megatron.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKS = ("[MASK]", "<|mask|>")  # names of the mask token; the first that is not already a token is used
TEXTS = (
    "",
    "Hello, world.",
    " a  b\tc\n\n\r\nd  ",
    "na\u00efve \ufb01 \u6f22\u5b57 \u0627\u0644 \U0001f600\u200d\U0001f680 e\u0301 \u0000\ufffd\u2581",
    "<|endoftext|> [MASK] <|mask|> <s></s> <unk> <pad> <EOD> <MASK> [CLS] [SEP] <0x0A>",
    "def f(x): return {'1': 1.5e-3}[x]  # 0123456789",
    "  ",
    "\u2581 x \u2581",
    "\r\n\tx \n",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, masked: bool, positions: int) -> "PreTrainedTokenizerFast":
    """Write the transformers tokenizer and the run's own tokenizer file into `folder`; return the former.

    With `masked`, the first id after the tokenizer's vocabulary is the mask token.

    Raises: ConfigurationError if the ids of transformers differ.
    """
    from transformers import AutoTokenizer

    hugging_face_tokenizer(tokenizer, masked=masked, positions=positions).save_pretrained(folder)
    # transformers 5 writes a class name that older versions do not know; it reads this one as the same class
    set_fields(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _probes(tokenizer):
        if loaded(text, verbose=False)["input_ids"] != tokenizer.encode(text):
            raise ConfigurationError(
                f"{tokenizer.flag}: transformers gives other ids for the text {text!r}, so scores would differ; this "
                "run cannot be exported with its tokenizer"
            )
    if tokenizer.source is not None:
        (folder / training_file(tokenizer)).write_bytes(tokenizer.source)
    return loaded


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts whose ids an export compares: TEXTS, and all added symbols of the tokenizer."""
    if isinstance(tokenizer, NullTokenizer):
        yield from ("", "0", f"0 {tokenizer.eod - 1}\n00")
        return
    yield from TEXTS
    symbols = []
    if isinstance(tokenizer, HFTokenizer):
        symbols = [token["content"] for token in json.loads(tokenizer.source)["added_tokens"]]
    elif isinstance(tokenizer, GPTSentencePieceTokenizer):
        symbols = [*sentence_piece.symbols(tokenizer.source, tokenizer.flag), *tokenizer.added_pieces]
    for symbol in symbols:
        yield symbol
        yield f"a{symbol}b  {symbol} {symbol}{symbol}\n"


def training_file(tokenizer: Tokenizer) -> str:
    """Return the file name of the run's own tokenizer in an export."""
    return f"training_tokenizer.{'json' if isinstance(tokenizer, HFTokenizer) else 'model'}"


def hugging_face_tokenizer(tokenizer: Tokenizer, *, masked: bool, positions: int) -> "PreTrainedTokenizerFast":
    """Return the transformers tokenizer: it adds no special tokens, and reads text that spells one as plain text.

    Raises: ConfigurationError if the `tokenizers` library cannot express it.
    """
    from transformers import PreTrainedTokenizerFast

    library = _library(tokenizer)
    special = {}
    if masked:
        special["mask_token"] = next(name for name in MASKS if library.token_to_id(name) is None)
        library.add_special_tokens([special["mask_token"]])
        if library.token_to_id(special["mask_token"]) != tokenizer.vocabulary_size:
            raise ConfigurationError(
                f"{tokenizer.flag}: its ids have gaps, and the tokenizers library would assign one of them to the "
                f"mask token, which is {tokenizer.vocabulary_size}; this run cannot be exported with its tokenizer"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=library.id_to_token(tokenizer.eod),
        pad_token=library.id_to_token(tokenizer.eod),
        **special,
        split_special_tokens=True,  # text that spells a special token stays text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=positions,
    )


def _library(tokenizer: Tokenizer) -> Library:
    """Return the equivalent tokenizer of the `tokenizers` library."""
    if isinstance(tokenizer, HFTokenizer):
        return _without_extras(tokenizer.source)
    if isinstance(tokenizer, GPTSentencePieceTokenizer):
        library = sentence_piece.convert(tokenizer.source, tokenizer.flag)
        library.add_special_tokens(list(tokenizer.added_pieces))
        return library
    return _byte_level() if isinstance(tokenizer, ByteTokenizer) else _number_words(tokenizer)


def _without_extras(source: bytes) -> Library:
    """Return the tokenizer of a tokenizer.json without truncation, padding and added special tokens."""
    state = json.loads(source)
    state |= {"truncation": None, "padding": None}
    if Library.from_buffer(source).num_special_tokens_to_add(is_pair=False):
        state["post_processor"] = None
    return Library.from_str(json.dumps(state))


def _byte_level() -> Library:
    """Return a tokenizer whose ids are UTF-8 bytes, with the byte-to-character table of byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # map to themselves, the other bytes to 256 + i
    other_bytes = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + index): byte for index, byte in enumerate(other_bytes)}
    library = Library(models.BPE(vocab=alphabet, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    return library


def _number_words(tokenizer: NullTokenizer) -> Library:
    """Return a tokenizer of numbers separated by spaces; anything but an id raises an error, as in ours."""
    library = Library(models.WordLevel({str(index): index for index in range(tokenizer.eod)}))
    library.normalizer = normalizers.Replace(Regex(r"(?<!\S)0+(?=[0-9])"), "")
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([END])
    return library


def copy_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path) -> dict:
    """Write a run's tokenizer file into `folder`, later renamed to `output`; return the flags that name the file."""
    if tokenizer.source is None:
        return {}
    file = training_file(tokenizer).removeprefix("training_")
    (folder / file).write_bytes(tokenizer.source)
    # GPT-2's two files are merged into one, with the same hash
    kind = "HFTokenizer" if isinstance(tokenizer, HFTokenizer) else type(tokenizer).__name__
    flags = {"tokenizer_type": kind, "tokenizer_model": str(output.resolve() / file)}
    return flags | {"vocab_file": None, "merge_file": None}
