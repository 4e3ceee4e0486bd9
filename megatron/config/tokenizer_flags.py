"""The rules of the tokenizer's flags, which training and preprocessing share."""

from megatron.config.flags import require, spelling

SENTENCE_PIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer")
TOKENIZERS = ("HFTokenizer", "GPT2BPETokenizer", *SENTENCE_PIECE, "ByteTokenizer", "NullTokenizer")


def check_tokenizer(section) -> None:
    """Check that the flags fit --tokenizer-type; training and preprocessing share them."""
    kind = section.tokenizer_type
    needed = {"NullTokenizer": ("vocab_size",), "GPT2BPETokenizer": ("vocab_file", "merge_file")}
    owners = {
        "tokenizer_model": ("HFTokenizer", *SENTENCE_PIECE),
        "vocab_size": ("NullTokenizer",),
        "vocab_file": ("GPT2BPETokenizer",),
        "merge_file": ("GPT2BPETokenizer",),
    }
    required = needed.get(kind, ())
    absent = [name for name in required if getattr(section, name) is None]
    for name in required:  # one of the two files may have implied the type, so the message starts with the given flag
        value = getattr(section, name)
        require(value is None or not absent, name, value, f"needs {' and '.join(map(spelling, absent))}; give both")
    message = f"needs {' and '.join(map(spelling, required))}; give {'both' if len(required) > 1 else 'it'}"
    require(not absent, "tokenizer_type", kind, message)
    for name, kinds in owners.items():
        value = getattr(section, name)
        message = f"belongs to {', '.join(kinds)}, and --tokenizer-type is {kind}; leave it out, or give "
        require(value is None or kind in kinds, name, value, f"{message}--tokenizer-type {kinds[0]}")


def implied_tokenizer(given: set[str]) -> dict:
    """Return the settings that --vocab-file and --merge-file imply among the flags `given`: GPT-2's tokenizer."""
    if "--tokenizer-type" in given or not given & {"--vocab-file", "--merge-file"}:
        return {}
    return {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, "vocab_size": None}
