"""Token ids of contexts and continuations: lm-eval's, or encoded alone where a token spans both."""

import random

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Library
from tokenizers import models

from megatron.data.tokenizer import (
    END,
    ByteTokenizer,
    GPTSentencePieceTokenizer,
    HFTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    train_tokenizer,
)
from megatron.scoring.encoding import EncodingCounts, encode_pair

WORDS = "bo bak baka bakari naka kana sofu 12 121 it's, (naïve) 日本".split()
LINES = [" ".join(random.Random(seed).choices(WORDS, k=9)) for seed in range(60)]
# like Llama's: no normalisation, byte fallback, and a space before every text
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "vocab_size": 330,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")

    def bpe():
        train_tokenizer(LINES, 290, str(folder / "bpe.json"))
        return HFTokenizer(str(folder / "bpe.json"))

    def pieces(kind, **settings):
        prefix = str(folder / "pieces")
        settings = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2} | settings
        SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_prefix=prefix, **settings)
        return kind(f"{prefix}.model")

    constructors = {
        "bpe": bpe,
        "unigram": lambda: pieces(GPTSentencePieceTokenizer),
        "pieces": lambda: pieces(SentencePieceTokenizer, model_type="bpe"),
        "llama": lambda: pieces(GPTSentencePieceTokenizer, **LLAMA),
        "bytes": ByteTokenizer,
    }
    return lambda name: constructors[name]()


@pytest.mark.parametrize("name", ["bpe", "unigram", "pieces", "llama", "bytes"])
def test_an_answer_has_tokens_that_spell_it_wherever_it_begins(build, name):
    tokenizer, spanning = build(name), 0
    text = LINES[0]
    for cut in range(1, len(text)):
        context, suffix = text[:cut], text[cut:]
        for answer in {suffix, suffix[:2], suffix[:1]} - {" "}:
            pair = encode_pair(tokenizer, context, answer)
            joined, before = tokenizer.encode(context + answer), tokenizer.encode(context.rstrip())
            assert pair.continuation and pair.context == before
            assert tokenizer.decode(pair.context + pair.continuation) == tokenizer.decode(joined)
            splits = joined[: len(before)] == before and len(joined) > len(before)
            assert pair.encoded_alone != splits
            if splits:  # as lm-eval
                assert pair.continuation == joined[len(before) :]
            spanning += not splits
    assert (spanning > 10) == (name != "bytes")


def test_an_answer_alone_is_that_of_the_tokenizer_or_lacks_its_first_space(build):
    assert encode_pair(build("bpe"), "bo bak", "a").continuation == build("bpe").encode("a")
    tokenizer = build("llama")
    alone = encode_pair(tokenizer, "bo bak", "a").continuation
    assert [tokenizer._library.IdToPiece(index) for index in alone] == ["a"]
    assert encode_pair(NullTokenizer(200), "5 12", "1").continuation == [1]  # the joined text is 5 and 121


def test_whitespace_between_context_and_answer_belongs_to_the_answer(build):
    tokenizer = build("bpe")
    expected = tokenizer.encode(" baka")
    for context, answer in (("bo ", "baka"), ("bo", " baka")):
        pair = encode_pair(tokenizer, context, answer)
        assert (pair.context, pair.continuation, pair.encoded_alone) == (tokenizer.encode("bo"), expected, False)
    pair = encode_pair(tokenizer, "bo \n", " x")
    assert tokenizer.decode(pair.continuation) == " \n x" and pair.context == tokenizer.encode("bo")
    for context in ("", " ", "\n\n"):
        pair = encode_pair(tokenizer, context, "baka")
        assert pair.context == [] and tokenizer.decode(pair.continuation) == f"{context}baka"
    assert encode_pair(tokenizer, "bo", "").continuation == []
    assert encode_pair(tokenizer, "bo ", "").continuation == tokenizer.encode(" ")


def test_an_answer_that_the_tokenizer_drops_has_no_tokens(build, tmp_path):
    library = Library(models.BPE({"b": 0, "o": 1, " ": 2, "bo": 3, END: 4}, [("b", "o")]))
    library.add_special_tokens([END])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"))
    for context in ("bo", "bo ", "b", "", " "):
        assert encode_pair(tokenizer, context, "日本").continuation == []
        assert encode_pair(tokenizer, context, "日o").continuation  # what is left of it
    assert encode_pair(build("unigram"), "bo", "\n").continuation == []  # it drops whitespace at the ends


def test_counts_add_up_and_are_said_where_there_are_any():
    counts = [EncodingCounts.of_request(0), EncodingCounts.of_request(7), EncodingCounts.of_request(5, True)]
    total = sum(counts, EncodingCounts())
    assert total == EncodingCounts(3, 2, 12, 7, 1)
    truncated, alone = total.lines(64)
    assert truncated == (
        "2 of 3 requests have a context that is truncated on the left to fit --seq-length 64: "
        "12 tokens in total, at most 7 in one request"
    )
    assert alone == (
        "1 of 3 requests have a token that spans context and continuation: their continuations are encoded alone"
    )
    assert counts[0].lines(64) == []
