"""Exported tokenizers: transformers gives the same ids, and no ids that text cannot have in ours."""

import inspect
import json
import textwrap

import pytest
from sentencepiece import SentencePieceTrainer

from megatron.convert.tokenizer import hugging_face_tokenizer, training_file, write_tokenizer
from megatron.data.tokenizer import END, build_tokenizer, train_tokenizer
from megatron.errors import ConfigurationError

LINES = (
    inspect.getsource(textwrap).splitlines()
    + ["na\u00efve \u6f22\u5b57 \u00e4", "<s> 0x0A </s> [MASK] <|endoftext|>"] * 5
)
TEXTS = [
    "",
    "The quick brown fox",
    "  two  spaces\t\r\n and \u00a0 more \n\n",
    "na\u00efve \u00dcberma\u00df, \u6f22\u5b57, \U0001f600\U0001f3f3\ufe0f\u200d\U0001f308 \ufb01 e\u0301 \u2581x",
    "<|endoftext|>",
    f"a{END}b [MASK] <s></s><unk><EOD> <MASK>\n{END}",
    inspect.getsource(inspect.getsource),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer file of every kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(LINES, 400, folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    for kind in ("unigram", "bpe", "char"):
        for fallback in (False, True):
            SentencePieceTrainer.train(
                sentence_iterator=iter(LINES * 3),
                model_prefix=str(folder / f"{kind}{'_bytes' * fallback}"),
                vocab_size=500 if fallback else 300,
                model_type=kind,
                byte_fallback=fallback,
                hard_vocab_limit=False,
                minloglevel=2,
            )
    return folder


def our_tokenizer(name: str, folder):
    """Return one of our tokenizers by a short name."""
    pieces = {"spm": "GPTSentencePieceTokenizer", "megatron": "SentencePieceTokenizer"}
    kind, _, file = name.partition(" ")
    return {
        "hf": lambda: build_tokenizer("HFTokenizer", str(folder / "tokenizer.json")),
        "gpt2": lambda: build_tokenizer(
            "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
        ),
        "bytes": lambda: build_tokenizer("ByteTokenizer"),
        **{short: lambda: build_tokenizer(pieces[kind], str(folder / f"{file}.model")) for short in pieces},
    }[kind]()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name", ["hf", "gpt2", "bytes", "spm unigram", "spm unigram_bytes", "spm bpe", "spm bpe_bytes", "megatron bpe"]
)
def test_ids_equal_ours(name, masked, folder, tmp_path):
    ours = our_tokenizer(name, folder)
    theirs = write_tokenizer(tmp_path, ours, masked=masked, positions=16)
    for text in TEXTS:
        assert theirs(text, verbose=False)["input_ids"] == ours.encode(text), text
        assert ours.eod not in theirs.encode(text)
        if "spm" not in name and "megatron" not in name:
            assert theirs.decode(ours.encode(text)) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # exists in every version of transformers
    assert theirs.eos_token_id == ours.eod and len(theirs) == ours.vocabulary_size + masked
    assert theirs.mask_token_id == (ours.vocabulary_size if masked else None)
    assert sorted(theirs("a")) == ["attention_mask", "input_ids"]
    if ours.source is None:
        assert not [*tmp_path.glob("training_tokenizer*")]
    else:  # the run's own file gives the same tokenizer, with the same hash
        kind = "HFTokenizer" if name in ("hf", "gpt2") else type(ours).__name__
        restored = build_tokenizer(kind, str(tmp_path / training_file(ours)))
        assert restored.hash == ours.hash and restored.encode(TEXTS[-1]) == ours.encode(TEXTS[-1])


def test_ids_that_are_text_already(tmp_path):
    ours = build_tokenizer("NullTokenizer", vocab_size=300)
    theirs = write_tokenizer(tmp_path, ours, masked=True, positions=16)
    for text in ("", "0", " 1  2\n\t299 ", "007 000 10 0"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.mask_token_id, len(theirs)) == (300, 301, 302)
    for text in ("300", "x", END, "[MASK]", "-1", "1.5"):
        with pytest.raises(ConfigurationError):
            ours.encode(text)
        with pytest.raises(Exception, match="WordLevel"):
            theirs(text)


def edited_tokenizer(folder, target, change):
    """Return our tokenizer of the folder's tokenizer.json after `change` was applied to its contents."""
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (target / "changed.json").write_text(json.dumps(state))
    return build_tokenizer("HFTokenizer", str(target / "changed.json"))


def test_what_a_file_puts_around_a_text_or_cuts_is_left_out(folder, tmp_path):
    def change(state):
        state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        token = {"SpecialToken": {"id": END, "type_id": 0}}
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, token],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
        }

    ours = edited_tokenizer(folder, tmp_path, change)
    theirs = write_tokenizer(tmp_path, ours, masked=False, positions=16)
    assert theirs("one two three four")["input_ids"] == ours.encode("one two three four")
    assert len(ours.encode("one two three four")) > 3


def test_a_text_token_called_mask_keeps_its_id(folder, tmp_path):
    def change(state):
        state["added_tokens"].append(state["added_tokens"][0] | {"id": 400, "content": "[MASK]", "special": False})

    ours = edited_tokenizer(folder, tmp_path, change)
    theirs = write_tokenizer(tmp_path, ours, masked=True, positions=16)
    assert theirs("[MASK]")["input_ids"] == ours.encode("[MASK]") == [400]
    assert (theirs.mask_token, theirs.mask_token_id) == ("<|mask|>", 401)


def test_what_transformers_cannot_have_is_refused(folder, tmp_path):
    def gap(state):
        state["model"]["vocab"]["unused"] = 450

    with_gap = edited_tokenizer(folder, tmp_path, gap)
    with pytest.raises(ConfigurationError, match="its ids have gaps"):
        hugging_face_tokenizer(with_gap, masked=True, positions=16)
    with pytest.raises(ConfigurationError, match="is a SentencePiece model of type char, and transformers supports"):
        write_tokenizer(tmp_path, our_tokenizer("spm char", folder), masked=False, positions=16)
    ours = our_tokenizer("hf", folder)
    ours.encode = lambda text: [1]  # ids that no library tokenizer gives
    with pytest.raises(ConfigurationError, match="transformers gives other ids for the text ''"):
        write_tokenizer(tmp_path, ours, masked=False, positions=16)
