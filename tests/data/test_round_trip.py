"""Lossy tokenizers: preprocessing counts the characters they drop, and refuses a document that becomes blank."""

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.preprocess import preprocess
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.tokenizer import END, train_tokenizer
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from tests.data.test_tokenizer import CORPUS, sentencepiece_model
from tools.preprocess_data import main

LATIN = ["the cat sat on the mat, a dog lay on the log. " * 20]


@pytest.fixture
def preprocess_texts(tmp_path):
    """Return a function that preprocesses texts and returns the round trip of train in corpus.json."""

    def run(texts, tokenizer_type="HFTokenizer", **options) -> dict:
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = preprocess(
            PreprocessOptions(
                output_dir=tmp_path / "data",
                input=(str(tmp_path / "text.jsonl"),),
                splits=(100, 0, 0),
                tokenizer_type=tokenizer_type,
                **options,
            )
        )
        changes = summary["round_trip"]["train"]
        assert read_metadata(tmp_path / "data" / "train")["round_trip"] == changes
        return changes

    return run


def byte_level(folder, change=lambda description: None) -> str:
    """Write a byte-level BPE modified by `change`; return its tokenizer.json."""
    train_tokenizer(CORPUS, 280, folder / "bytes.json")
    description = json.loads((folder / "bytes.json").read_text())
    change(description)
    (folder / "changed.json").write_text(json.dumps(description))
    return str(folder / "changed.json")


def latin(folder, **options) -> str:
    """Train a BPE on Latin letters, white space included, without other bytes; return its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, trainers

    library = Tokenizer(models.BPE(**options))
    library.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=[END, "!"], show_progress=False)
    library.train_from_iterator(LATIN, trainer)
    library.save(str(folder / "latin.json"))
    return str(folder / "latin.json")


def test_lost_characters_are_counted_with_the_worst_document_as_example(preprocess_texts, tmp_path):
    texts = ["the cat sat", "a cat 漢字 lay", "THE DOG sat on the 東京 mat\n", "the dog lay"]
    changes = preprocess_texts(texts, tokenizer_model=latin(tmp_path))
    assert changes == {
        "changed_documents": 2,
        "characters": sum(map(len, texts)),
        "missing_characters": 2 + len("THEDOG東京\n"),
        "example": {
            "document": f"{tmp_path}/text.jsonl:3",
            "missing_characters": 9,
            "character": 0,
            "text": "THE DOG sat on the 東",
            "decoded": "  sat on the  mat",
        },
    }


def missing(changes: dict) -> tuple[int, int]:
    return changes["changed_documents"], changes["missing_characters"]


@pytest.mark.parametrize(
    "normalizer, text, lost",
    [
        ({"type": "Lowercase"}, "The Cat\n", 2),
        ({"type": "NFC"}, "cafe\u0301", 2),  # two characters become one
        ({"type": "NFC"}, "caf\u00e9", 0),
        ({"type": "Strip", "strip_left": True, "strip_right": True}, " x\r\n", 3),
        ({"type": "Replace", "pattern": {"String": "\n"}, "content": ""}, "a\nb\n", 2),
    ],
)
def test_normalizers_of_byte_level_tokenizers(preprocess_texts, tmp_path, normalizer, text, lost):
    model = byte_level(tmp_path, lambda description: description.update(normalizer=normalizer))
    assert missing(preprocess_texts([text, "fine"], tokenizer_model=model)) == (int(lost > 0), lost)


def test_bytes_that_a_vocabulary_lacks(preprocess_texts, tmp_path):
    def drop(description):
        del description["model"]["vocab"]["Ċ"]  # the line end

    model = byte_level(tmp_path, drop)
    assert missing(preprocess_texts(["a\r\nb\n", "a b"], tokenizer_model=model)) == (1, 2)
    vocabulary = json.loads(Path(model).read_text())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    assert missing(preprocess_texts(["a\r\nb\n", "a b"], "GPT2BPETokenizer", **files)) == (1, 2)


def test_unknown_tokens_stand_for_what_is_lost(preprocess_texts, tmp_path):
    changes = preprocess_texts(["the 漢字 cat", "東京"], tokenizer_model=latin(tmp_path, unk_token="!", fuse_unk=False))
    assert missing(changes) == (2, 4)


def test_a_tokenizer_that_lacks_the_unknown_token_it_needs_is_refused(preprocess_texts, tmp_path, refused):
    model = latin(tmp_path, unk_token="?")
    with refused(f"--tokenizer-model {model}: cannot encode the text (Unk token `?`", "give it an unknown token"):
        preprocess_texts(["the cat"], tokenizer_model=model)


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer"])
def test_sentencepiece_models_lose_white_space_unless_they_keep_it(preprocess_texts, tmp_path, kind):
    texts = ["the  quick\nfox ", "the quick fox", "東京"]
    assert missing(preprocess_texts(texts, kind, tokenizer_model=sentencepiece_model(tmp_path))) == (1, 2)
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    assert missing(preprocess_texts(texts, kind, tokenizer_model=sentencepiece_model(tmp_path, **options))) == (0, 0)


def test_tokenizers_that_give_everything_back(preprocess_texts, tmp_path):
    texts = ["naïve 東京 🙂\r\n", f" {END}\u0000\u200b", "\ufeffx\u2028"]
    assert missing(preprocess_texts(texts, train_tokenizer=260)) == (0, 0)
    assert missing(preprocess_texts(texts, "ByteTokenizer")) == (0, 0)
    assert missing(preprocess_texts([" 007\n1 ", "5"], "NullTokenizer", vocab_size=9)) == (0, 0)


@pytest.mark.parametrize("kind", ["no token", "white space alone", "SentencePiece"])
def test_a_document_of_which_nothing_is_left_is_refused(preprocess_texts, tmp_path, refused, kind):
    texts = ["the cat", "a\n\n", "漢字 かな" if kind == "white space alone" else "漢字"]
    options = {"tokenizer_model": latin(tmp_path)}
    if kind == "SentencePiece":
        texts[2] = "\u200b\u200b"  # removed by the model's normalisation
        model = sentencepiece_model(tmp_path)
        options = {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": model}
    parts = [f"--tokenizer-model {options['tokenizer_model']}: leaves nothing of {tmp_path}/text.jsonl:3", "begins"]
    with refused(*parts, repr(texts[2]), "remove the document"):
        preprocess_texts(texts, **options)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_summary_and_the_start_of_training_name_the_loss(tmp_path, monkeypatch, capsys, caplog):
    normalizer = {"type": "Lowercase"}
    model = byte_level(tmp_path, lambda description: description.update(normalizer=normalizer))
    (tmp_path / "text.jsonl").write_text('{"text": "the CAT"}\n{"text": "the cat"}\n')
    flags = ["--input", tmp_path / "text.jsonl", "--output-dir", tmp_path / "data", "--splits", "1", "0", "0"]
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, flags), "--tokenizer-model", model])
    main()
    counts = "1 of 2 documents are not the same after encoding and decoding, 21.43% of the characters are missing"
    example = f"{tmp_path}/text.jsonl:1, character 4: 'CAT' becomes 'cat'"
    assert f"train: {counts}; {example}\n" in capsys.readouterr().out
    assert len(IndexedDataset(tmp_path / "data" / "train")) == 2

    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --train-iters 1"
    with caplog.at_level(logging.INFO, "megatron"):
        open_sources(parse("ar", [*flags.split(), "--train-data-path", f"{tmp_path}/data/train"]))
    assert f"{tmp_path}/data/train: {counts}; bits per byte count the bytes that are left" in caplog.text
