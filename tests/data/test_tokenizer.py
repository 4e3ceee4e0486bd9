"""Text to ids and back, and ids that text never becomes."""

import json
import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.data.tokenizer import (
    END,
    ByteTokenizer,
    GPT2BPETokenizer,
    HFTokenizer,
    NullTokenizer,
    build_tokenizer,
    tokenizer_path,
    train_tokenizer,
)
from megatron.errors import ConfigurationError
from tests.conftest import ROOT

TEXTS = [
    "def f(x):\n\treturn x  # two  spaces\r\n\n\n",
    "naïve Übermaß, 東京, 🙂🏳️‍🌈, \u0000\u200b\ufeff",
    f"{END} and {END}\n{END}",
    " leading and trailing ",
    "",
]
CORPUS = ["the quick brown fox jumps over the lazy dog and the bear\n" * 3, "def f(x):\n    return x\n"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(CORPUS, 280, path)
    return path


def changed(path, folder, change) -> str:
    """Return a tokenizer.json modified by `change`."""
    description = json.loads(path.read_text())
    change(description)
    (folder / "changed.json").write_text(json.dumps(description))
    return str(folder / "changed.json")


@pytest.fixture(params=["HFTokenizer", "ByteTokenizer"])
def tokenizer(request, path):
    return build_tokenizer(request.param, str(path))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text + "x"])[0] == ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(0 <= index < tokenizer.vocabulary_size for index in ids)


def test_text_never_becomes_the_end_of_a_document(tokenizer):
    assert tokenizer.eod not in tokenizer.encode("".join(TEXTS))
    assert tokenizer.eod not in tokenizer.encode_batch(TEXTS)[2]
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert len(tokenizer.token_bytes()) == tokenizer.vocabulary_size


def test_sizes(path):
    trained = HFTokenizer(str(path))
    assert (trained.vocabulary_size, trained.decode([trained.eod])) == (280, END)
    assert len(trained.encode(" the")) == 1  # merges are learnt
    assert (ByteTokenizer.vocabulary_size, ByteTokenizer.eod) == (257, 256)
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]


def test_the_same_text_trains_the_same_tokenizer(path, tmp_path):
    train_tokenizer(iter(CORPUS), 280, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def uncut(texts, vocabulary_size) -> str:
    """Return the tokenizer.json of byte-level BPE as the library trains it, without splitting long words."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return library.to_str(pretty=True)


def test_words_of_usual_length_train_the_librarys_own_tokenizer(tmp_path, monkeypatch):
    texts = [*CORPUS, *TEXTS, (ROOT / "README.md").read_text(), f"{'-' * 1000} {'é' * 499}\n{' ' * 1000}x"]
    train_tokenizer(texts, 600, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == uncut(texts, 600)
    monkeypatch.setattr("megatron.data.tokenizer.LONGEST_WORD", 8)
    train_tokenizer(texts, 600, tmp_path / "cut.json")
    assert (tmp_path / "cut.json").read_text() != uncut(texts, 600)


LONG_RUNS = {
    "dashes": lambda length: "-" * length,
    "white space": lambda length: " " * length,
    "letters": lambda length: "".join(random.Random(1).choices("abcdefghij", k=length)),
    "DNA": lambda length: "".join(random.Random(2).choices("acgt", k=length)),
    "Chinese": lambda length: "".join(random.Random(3).choices("漢字仮名交文", k=length // 3)),
}


@pytest.mark.parametrize("kind", LONG_RUNS)
def test_a_very_long_word_is_cut_to_train_on_and_encoded_whole(kind, tmp_path):
    text = LONG_RUNS[kind](100_000)
    start = time.process_time()
    train_tokenizer([f"a table\n{text}\nand more"], 272, tmp_path / "tokenizer.json")
    assert time.process_time() - start < 3  # 4 to 30 s if the word is not split
    tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"))
    assert max(map(len, json.loads(tokenizer.source)["model"]["vocab"])) <= 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_asks_for_more_than_the_text_gives_is_refused(tmp_path, refused):
    with refused("--train-tokenizer 5000", "gives 308 ids", "at least 257", "add text"):
        train_tokenizer(CORPUS, 5000, tmp_path / "never.json")
    assert list(tmp_path.iterdir()) == []


def test_documents_are_neither_cut_nor_filled_up_whatever_the_file_asks(path, tmp_path):
    def limit(description):
        description["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        description["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": END,
        }  # fmt: skip

    limited = HFTokenizer(changed(path, tmp_path, limit))
    assert limited.decode(limited.encode(CORPUS[0])) == CORPUS[0]
    assert limited.decode(limited.encode_batch(["short", CORPUS[0]])[1]) == CORPUS[0]
    assert len(limited.encode("short")) <= 5


def test_the_token_that_the_file_puts_after_a_text_ends_a_document(path, tmp_path, refused):
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}

    def tokenizer(*single, special=True):
        def change(description):
            added = description["added_tokens"]
            added.append(added[0] | {"id": 280, "content": "</s>", "special": special})
            description["post_processor"] = {
                "type": "TemplateProcessing",
                "single": single,
                "pair": single,
                "special_tokens": {"</s>": {"id": "</s>", "ids": [280], "tokens": ["</s>"]}},
            }

        return HFTokenizer(changed(path, tmp_path, change))

    assert tokenizer(text, end).eod == 280 and 280 not in tokenizer(text, end).encode("a</s>")
    for single in ((end, text), (end, text, end), (text,)):
        assert tokenizer(*single).decode([tokenizer(*single).eod]) == END
    with refused("--tokenizer-model", "changed.json", "reads the text </s> as the end", '"special": true'):
        tokenizer(text, end, special=False)


def test_an_end_that_text_can_spell_is_refused(path, tmp_path, refused):
    def plain(description):
        description["added_tokens"][0]["special"] = False

    with refused("--tokenizer-model", "changed.json", f"reads the text {END} as the end", '"special": true'):
        HFTokenizer(changed(path, tmp_path, plain))


def test_a_tokenizer_without_an_end_is_refused(path, tmp_path, refused):
    def rename(description):
        description["added_tokens"][0]["content"] = "</s>"
        description["model"]["vocab"] = {
            "</s>" if token == END else token: index for token, index in description["model"]["vocab"].items()
        }

    with refused("--tokenizer-model", "changed.json", f"has no {END} token", "give it one"):
        HFTokenizer(changed(path, tmp_path, rename))


def test_added_tokens_and_gaps_between_ids_are_counted(path, tmp_path):
    def add(description):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        description["added_tokens"].append({"id": 280, "content": "<é>", "special": False, **plain})

    added = HFTokenizer(changed(path, tmp_path, add))
    assert added.vocabulary_size == 281
    assert added.encode("<é>") == [280]
    assert added.token_bytes()[280] == 4

    def leave_a_gap(description):
        description["model"]["vocab"]["zz"] = 300

    gap = HFTokenizer(changed(path, tmp_path, leave_a_gap))
    assert gap.vocabulary_size == len(gap.token_bytes()) == 301


def test_ids_that_do_not_spell_bytes_have_no_length(path, tmp_path):
    other = HFTokenizer(changed(path, tmp_path, lambda description: description.update(decoder=None)))
    assert other.token_bytes() is None


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "not json", '{"model": {"type": "Nope"}}', '{"model": {"type": "BPE", "vocab": {"a": 0}'],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, refused, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with refused("--tokenizer-model", "tokenizer.json", "is not a tokenizer.json", "give the one"):
        build_tokenizer("HFTokenizer", str(tmp_path / "tokenizer.json"))


def test_an_empty_vocabulary_is_refused(tmp_path, refused):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with refused("tokenizer.json", f"has no {END} token"):
        HFTokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("missing", [None, "nowhere/tokenizer.json"])
def test_a_missing_tokenizer_is_refused(refused, missing):
    with refused(f"--tokenizer-model {missing}", "no such file", "give the tokenizer.json"):
        HFTokenizer(missing)


@pytest.mark.parametrize("name", ["gpt2", "someone/name", "someone/name-2.5", "someone/name-0.5B.v1"])
def test_a_name_with_a_dot_is_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *words: " ".join(words))
    assert str(tokenizer_path(name)) == f"{name} tokenizer.json"
    for path in ("tokenizer.json", "data/tokenizer.model", "data/some/tokenizer"):
        assert str(tokenizer_path(path)) == path


def test_null_tokenizer_has_one_more_id_and_takes_numbers_only(refused):
    null = build_tokenizer("NullTokenizer", vocab_size=100)
    assert isinstance(null, NullTokenizer)
    assert (null.vocabulary_size, null.eod, null.token_bytes()) == (101, 100, None)
    assert null.encode(" 0 99\n7 ") == [0, 99, 7] == null.encode_batch(["1", "0 99 7"])[1]
    assert null.decode([0, 99, 7]) == "0 99 7"
    for word in ("100", "-1", "1.5", "x", "1_0", "+3", "٣", "²", "9" * 5000):
        with refused("NullTokenizer", word[:40], "0 to 99", "--vocab-size"):
            null.encode(f"1 {word} 2")


@pytest.fixture
def gpt2_files(tmp_path):
    """vocab.json and merges.txt of a small byte-level BPE, in GPT-2's form: the end-of-document token is last."""
    train_tokenizer(["the cat sat on the mat, the end of the matter " * 20], 270, tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    tokens = sorted((token for token in model["vocab"] if token != END), key=model["vocab"].get)
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, END])}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")


def test_gpt2_from_its_two_files_equals_transformers(gpt2_files):
    from transformers import GPT2Tokenizer

    ours, theirs = GPT2BPETokenizer(*gpt2_files), GPT2Tokenizer(*gpt2_files)
    text = "the cat's mat:\n\tdef f(x):  return 'é — 漢字' # the end"
    assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text
    assert (ours.vocabulary_size, ours.eod) == (270, 269)
    assert ours.eod not in ours.encode(f"literal {END}") and ours.decode(ours.encode(END)) == END
    assert ours.token_bytes()[ours.encode(text)].sum() == len(text.encode())


def test_gpt2_saved_as_tokenizer_json_is_the_same(gpt2_files, tmp_path):
    ours = GPT2BPETokenizer(*gpt2_files)
    (tmp_path / "saved.json").write_bytes(ours.source)
    again, text = HFTokenizer(str(tmp_path / "saved.json")), f"the cat {END} sat"
    assert again.encode(text) == ours.encode(text)
    assert (again.vocabulary_size, again.eod) == (ours.vocabulary_size, ours.eod)


def test_gpt2_files_that_do_not_fit_are_refused_in_one_line(gpt2_files, tmp_path):
    vocab, merges = gpt2_files
    (tmp_path / "other.txt").write_text("#version: 0.2\nq zz\n")
    for files, message in (
        ((str(tmp_path / "none.json"), merges), "--vocab-file .*none.json: no such file"),
        ((vocab, str(tmp_path / "none.txt")), "--merge-file .*none.txt: no such file"),
        ((vocab, str(tmp_path / "other.txt")), "do not belong together"),
        ((merges, merges), "do not belong together"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            GPT2BPETokenizer(*files)


# ------------------------------------------------------------------------------------ SentencePiece


def sentencepiece_model(folder, **options) -> str:
    """Train a small SentencePiece model and return its file."""
    import sentencepiece

    (folder / "text.txt").write_text("\n".join(CORPUS) + "\n")
    settings = {"vocab_size": 300, "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "model"), **settings
    )
    return str(folder / "model.model")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("pieces"))


def test_sentencepiece_ids_are_the_librarys_and_text_comes_back(pieces):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=pieces)
    tokenizer = build_tokenizer("GPTSentencePieceTokenizer", pieces)
    assert (tokenizer.vocabulary_size, tokenizer.eod) == (len(library), library.eos_id())
    texts = ["the quick brown fox", "naïve 東京 🙂", "</s> and <s> and <unk>", ""]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert ids == tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode([*ids, tokenizer.eod]) == text
        assert not {library.eos_id(), library.bos_id()} & set(ids)
    assert tokenizer.token_bytes() is None


def test_megatrons_sentencepiece_tokenizer_adds_its_ids_behind_the_models(pieces):
    plain = build_tokenizer("GPTSentencePieceTokenizer", pieces)
    tokenizer = build_tokenizer("SentencePieceTokenizer", pieces)
    # <CLS> <SEP> <EOD> <MASK>, and a padding piece are missing in this model; it has <s> and </s>
    assert tokenizer.vocabulary_size == plain.vocabulary_size + 5
    assert tokenizer.eod == plain.vocabulary_size + 2
    ids = tokenizer.encode("the <EOD> fox <CLS>")
    assert ids == plain.encode("the <EOD> fox <CLS>") and max(ids) < plain.vocabulary_size
    assert tokenizer.decode([*ids, tokenizer.eod]) == "the <EOD> fox <CLS>"


def test_a_sentencepiece_model_that_cannot_serve_is_refused(pieces, tmp_path, refused):
    with refused(f"--tokenizer-model {tmp_path}/none", "no such file", "tokenizer.model"):
        build_tokenizer("GPTSentencePieceTokenizer", f"{tmp_path}/none")
    for content in (b"", b"nonsense", b"{}"):
        (tmp_path / "other").write_bytes(content)
        with refused(f"--tokenizer-model {tmp_path}/other", "is not a SentencePiece model"):
            build_tokenizer("GPTSentencePieceTokenizer", f"{tmp_path}/other")
    endless = sentencepiece_model(tmp_path, eos_id=-1)
    with refused(f"--tokenizer-model {endless}", "has no end-of-sentence piece"):
        build_tokenizer("GPTSentencePieceTokenizer", endless)
    spelled = sentencepiece_model(tmp_path, user_defined_symbols=["<EOD>"])
    with refused(f"--tokenizer-model {spelled}", "reads the text <EOD> as the end of a document"):
        build_tokenizer("SentencePieceTokenizer", spelled)
