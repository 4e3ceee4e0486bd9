"""Our tokenizers as transformers loads them: the same ids for every text, literal special text included."""

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

MASKS = ("[MASK]", "<|mask|>")  # what [MASK] is called: the first that is no text token already
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
    """Write into `folder` what AutoTokenizer loads, which is returned, and the file that the run itself reads.

    With `masked`, the id behind the tokenizer's is the mask token. Raises ConfigurationError where transformers cannot
    give the same ids.
    """
    from transformers import AutoTokenizer

    hugging_face_tokenizer(tokenizer, masked=masked, positions=positions).save_pretrained(folder)
    # transformers 5 writes a name that no reader before it knows, and reads this one as the same class
    set_fields(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _probes(tokenizer):
        if loaded(text, verbose=False)["input_ids"] != tokenizer.encode(text):
            raise ConfigurationError(
                f"{tokenizer.named}: transformers gives other ids for the text {text!r}, so that scores would differ; "
                "this run cannot be exported with its tokenizer"
            )
    if tokenizer.source is not None:
        (folder / training_file(tokenizer)).write_bytes(tokenizer.source)
    return loaded


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts whose ids an export compares: those above, and all symbols that the tokenizer has of its own."""
    if isinstance(tokenizer, NullTokenizer):
        yield from ("", "0", f"0 {tokenizer.eod - 1}\n00")
        return
    yield from TEXTS
    symbols = []
    if isinstance(tokenizer, HFTokenizer):
        symbols = [token["content"] for token in json.loads(tokenizer.source)["added_tokens"]]
    elif isinstance(tokenizer, GPTSentencePieceTokenizer):
        symbols = [*sentence_piece.symbols(tokenizer.source, tokenizer.named), *tokenizer.added]
    for symbol in symbols:
        yield symbol
        yield f"a{symbol}b  {symbol} {symbol}{symbol}\n"


def training_file(tokenizer: Tokenizer) -> str:
    """Return under which name the file that the run itself reads travels."""
    return f"training_tokenizer.{'json' if isinstance(tokenizer, HFTokenizer) else 'model'}"


def hugging_face_tokenizer(tokenizer: Tokenizer, *, masked: bool, positions: int) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of transformers: no special tokens around a text, none out of what it spells.

    Raises ConfigurationError where the `tokenizers` library cannot have it.
    """
    from transformers import PreTrainedTokenizerFast

    library, special = _library(tokenizer), {}
    if masked:
        special["mask_token"] = next(name for name in MASKS if library.token_to_id(name) is None)
        library.add_special_tokens([special["mask_token"]])
        if library.token_to_id(special["mask_token"]) != tokenizer.vocabulary_size:
            raise ConfigurationError(
                f"{tokenizer.named}: its ids have gaps, and the tokenizers library would give one to the mask token, "
                f"which is {tokenizer.vocabulary_size}; this run cannot be exported with its tokenizer"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=library.id_to_token(tokenizer.eod),
        pad_token=library.id_to_token(tokenizer.eod),
        **special,
        split_special_tokens=True,  # literal special text stays text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=positions,
    )


def _library(tokenizer: Tokenizer) -> Library:
    """Return the tokenizer of the `tokenizers` library that gives the ids of ours."""
    if isinstance(tokenizer, HFTokenizer):
        return _plain(tokenizer.source)
    if isinstance(tokenizer, GPTSentencePieceTokenizer):
        library = sentence_piece.convert(tokenizer.source, tokenizer.named)
        library.add_special_tokens(list(tokenizer.added))
        return library
    return _bytes() if isinstance(tokenizer, ByteTokenizer) else _numbers(tokenizer)


def _plain(source: bytes) -> Library:
    """Return the tokenizer of a tokenizer.json without what cuts or fills up a text, or puts something around it."""
    state = json.loads(source)
    state |= {"truncation": None, "padding": None}
    if Library.from_buffer(source).num_special_tokens_to_add(is_pair=False):
        state["post_processor"] = None
    return Library.from_str(json.dumps(state))


def _bytes() -> Library:
    """Return a tokenizer whose ids are UTF-8 bytes, which byte-level BPE spells as one character each."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these as they are, the others from 256 on
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
    library = Library(models.BPE(vocab=alphabet, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    return library


def _numbers(tokenizer: NullTokenizer) -> Library:
    """Return a tokenizer of numbers with spaces between; what is no id raises an error, as in ours."""
    library = Library(models.WordLevel({str(index): index for index in range(tokenizer.eod)}))
    library.normalizer = normalizers.Replace(Regex(r"(?<!\S)0+(?=[0-9])"), "")
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([END])
    return library


def keep_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path) -> dict:
    """Write the file of a run's tokenizer into its `folder`, later `output`; return the flags that name it there."""
    if tokenizer.source is None:
        return {}
    file = training_file(tokenizer).removeprefix("training_")
    (folder / file).write_bytes(tokenizer.source)
    # GPT-2's two files are one here, of the same hash
    kind = "HFTokenizer" if isinstance(tokenizer, HFTokenizer) else type(tokenizer).__name__
    named = {"tokenizer_type": kind, "tokenizer_model": str(output.resolve() / file)}
    return named | {"vocab_file": None, "merge_file": None}
