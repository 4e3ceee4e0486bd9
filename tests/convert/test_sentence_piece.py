"""SentencePiece models of many kinds in transformers: the same ids on texts chosen to expose differences."""

import inspect
import random
import textwrap
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron.convert.tokenizer import write_tokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigurationError

LINES = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
LINES += ["na\u00efve \u6f22\u5b57 \u00e4 \ufb01 \u00e9 0123456789 <s> </s> <unk> <0x0A> <user> ##"] * 5
IDENTITY = {"normalization_rule_name": "identity"}
KEEP = {"remove_extra_whitespaces": False}
# the settings of Llama 1 and 2, Mistral and TinyLlama; Gemma's has no dummy prefix
LLAMA = {**IDENTITY, **KEEP, "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
SYMBOLS = {"user_defined_symbols": ["<user>", "<u", "##"], "control_symbols": ["<ctl>"]}
NO_PREFIX = {"add_dummy_prefix": False}
EXPORTED = {
    "bpe llama": LLAMA,
    "bpe gemma": {**LLAMA, **NO_PREFIX, **SYMBOLS},
    "bpe keep": KEEP,
    "bpe identity": IDENTITY,
    "bpe nfkc": {"normalization_rule_name": "nfkc"},
    "bpe whole lines": {"split_by_whitespace": False},
    "unigram llama": LLAMA,
    "unigram no prefix": {**LLAMA, **NO_PREFIX},
    "unigram keep": KEEP,
    "unigram keep identity": {**KEEP, **IDENTITY},
    "unigram identity": {**IDENTITY, **NO_PREFIX},
    "unigram symbols": {**LLAMA, **SYMBOLS},
}
REFUSED = {
    "bpe suffix": {"treat_whitespace_as_suffix": True},
    # the library treats the text after a symbol as a new text: it adds a dummy prefix and strips spaces
    "bpe prefix symbols": {**LLAMA, **SYMBOLS},
    "bpe strip symbols": {**IDENTITY, **NO_PREFIX, **SYMBOLS},
    # SentencePiece does not normalize its symbols
    "unigram normalized symbol": {"user_defined_symbols": ["\ufb01"]},
}
FRAGMENTS = [
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "\u2581", "\u2581\u2581", "\u00a0", "\u3000"),
    *("def", "x", "(", "1", "007", "    return", "the", "Hello", "aaa"),
    *("\u00e9", "e\u0301", "\u6f22", "\ufb01", "\u00df", "\u0627", "\u03a3"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "<user>", "<u", "##", "<ctl>", "[MASK]", "<|endoftext|>"),
    *("\0", "\x1f", "\x7f", "\u0085", "\u2028", "\ufffd", "\uffff", "\U0001f600", "\U000f0001", "\U0010ffff"),
]


def trained(name: str, settings: dict, folder: Path):
    """Return our tokenizer of a model trained with `settings`."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "model"),
        model_type=name.split()[0],
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return build_tokenizer("GPTSentencePieceTokenizer", str(folder / "model.model"))


def texts() -> list[str]:
    """Return fragments, random concatenations of them, lines of code and runs of spaces and newlines."""
    generator = random.Random(0)
    mixed = ["".join(generator.choices(FRAGMENTS, k=generator.randint(1, 10))) for _ in range(300)]
    lines = [line[generator.randint(0, 9) :] + "\n" for line in LINES[:100]]
    runs = [character * count for character in " \n" for count in range(1, 9)]
    return [*FRAGMENTS, *mixed, *lines, *runs, *(f" {text} " for text in mixed[:50])]


@pytest.mark.parametrize("name", EXPORTED)
def test_ids_and_texts_equal_ours(name, tmp_path):
    ours = trained(name, EXPORTED[name], tmp_path)
    theirs = write_tokenizer(tmp_path / "hf", ours, masked=False, positions=16)
    ties = 0
    for text in texts():
        ids = ours.encode(text)
        if theirs(text, verbose=False)["input_ids"] != ids:
            assert name.startswith("unigram"), text
            ties += equally_likely(theirs(text)["input_ids"], ids, tmp_path / "model.model", text)
        if "byte_fallback" in EXPORTED[name] and "\u2581" not in text:
            assert theirs.decode(ids) == ours.decode(ids), text
    assert ties < 10


def equally_likely(first: list[int], second: list[int], model: Path, text: str) -> bool:
    """Check that two segmentations tie: SentencePiece adds scores in float32, the tokenizers library in float64."""
    library = SentencePieceProcessor(model_file=str(model))
    first, second = (sum(map(library.GetScore, ids)) for ids in (first, second))
    assert first == pytest.approx(second, rel=1e-6), text
    return True


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_cannot_express_is_refused_in_one_line(name, tmp_path):
    ours = trained(name, REFUSED[name], tmp_path)
    with pytest.raises(ConfigurationError) as error:
        write_tokenizer(tmp_path / "hf", ours, masked=False, positions=16)
    assert "transformers gives other ids for the text " in str(error.value) and "\n" not in str(error.value)
