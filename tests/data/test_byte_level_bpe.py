"""The fast core of byte-level BPE: the ids of the `tokenizers` library for every text, or no core."""

import itertools
import json
import random
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.data.byte_level_bpe import byte_characters, fast_core, find_words
from megatron.data.sources.standard_library import standard_library
from megatron.data.tokenizer import END, GPT2BPETokenizer, HFTokenizer, train_tokenizer

SPECIAL = [
    "",
    END,
    f"a{END} b",
    "  \n\n  x",
    " " * 50,
    "\t \t\n ",
    "x" * 3000,
    "can't we'll 'S",
    "\r\n\x85\u2028\u3000",
]


@pytest.fixture(scope="module")
def texts():
    return [record.text for record in standard_library()][:60]


@pytest.fixture(scope="module")
def path(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([*texts, "naïve café 漢字 🙂 " * 30], 1200, path)
    return path


def random_text(draw: random.Random) -> str:
    """Return a text of characters of all planes, most of them white space, letters and digits."""
    ascii_only, ranges = [(0, 128), (32, 33), (9, 14), (39, 40)], [(0x80, 0x180), (0x2000, 0x3000), (0, 0x110000)]
    ranges = ascii_only * draw.randrange(1, 9) + ranges[: draw.randrange(4)]
    codes = (draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(200)))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def test_runs_of_white_space_in_every_combination(path):
    """Up to five characters of white space between two words, at the start and at the end."""
    runs = ["".join(run) for size in range(6) for run in itertools.product(" \n\t", repeat=size)]
    assert equal(HFTokenizer(path)._library, [*(f"a{run}b c{run}" for run in runs), *(f"{run}'s" for run in runs)])


def test_a_long_line_without_white_space_takes_linear_time():
    """Such as an image in base64, in a document with other characters than ASCII; quadratic, it takes 8 s."""
    start = time.process_time()
    words = find_words("é " + "ab12/+" * 15_000)
    assert time.process_time() - start < 2
    assert words[:4] == ["é", " ab", "12", "/+"] and len(words) == 1 + 3 * 15_000


def equal(library: Tokenizer, texts: list[str]) -> bool:
    core = fast_core(library)
    assert core is not None
    expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    return [core.encode(text).tolist() for text in texts] == expected


def test_ids_equal_the_librarys(path, texts):
    tokenizer = HFTokenizer(path)
    draw = random.Random(0)
    assert equal(tokenizer._library, [*texts, *SPECIAL, *(random_text(draw) for _ in range(6000))])
    assert tokenizer.lossless
    for text, ids in zip(SPECIAL, tokenizer.encode_arrays(SPECIAL), strict=True):
        assert ids.tolist() == tokenizer.encode(text) and tokenizer.decode(ids) == text


def test_every_code_point_in_the_context_of_words(path):
    """The words of the two libraries come from Unicode tables of different versions."""
    # planes 0 to 3 and the tags; the other planes have private and unassigned code points alone
    codes = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE01F0), *range(0x34000, sys.maxunicode, 97)]
    lines = [
        " ".join(f"a{chr(c)}b {chr(c)}1{chr(c)} {chr(c)}{chr(c)}" for c in codes[i : i + 64])
        for i in range(0, len(codes), 64)
    ]
    assert equal(HFTokenizer(path)._library, lines)


def test_gpt2_files_in_another_order_of_ids(path, tmp_path, texts):
    state = json.loads(path.read_text())
    vocabulary = {token: len(state["model"]["vocab"]) - 1 - index for token, index in state["model"]["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in state["model"]["merges"]))
    tokenizer = GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert equal(tokenizer._library, texts[:20])


def test_the_argument_for_equal_ids_holds_on_small_vocabularies():
    """Random merges: where there is a core, all words of four letters have the library's ids; some have none."""
    draw, words = random.Random(1), [a + b + c + d for a in "abc" for b in "abc" for c in "abc" for d in "abc"]
    cores = 0
    for _ in range(200):
        tokens, merges = list("abc"), []
        for _ in range(8):
            pair = draw.choice(tokens), draw.choice(tokens)
            if pair[0] + pair[1] not in tokens and len(pair[0] + pair[1]) <= 4:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
        vocabulary = {token: index for index, token in enumerate([*byte_characters(), *tokens[3:]])}
        library = byte_level(models.BPE(vocabulary, merges))
        if fast_core(library) is not None:
            cores += 1
            assert equal(library, words)
    assert 20 < cores < 180


def byte_level(model) -> Tokenizer:
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def altered(path, change) -> Tokenizer:
    library = Tokenizer.from_file(str(path))
    change(library)
    return library


@pytest.mark.parametrize(
    "change",
    [
        lambda library: setattr(library, "normalizer", normalizers.NFC()),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda library: setattr(library.model, "dropout", 0.5),
        lambda library: setattr(library.model, "byte_fallback", True),
        lambda library: library.add_tokens(["import"]),
    ],
)
def test_other_tokenizers_have_no_core(path, change):
    assert fast_core(altered(path, change)) is None


def test_a_vocabulary_without_all_bytes_has_no_core_and_is_not_lossless(tmp_path):
    library = byte_level(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    library.add_special_tokens([END])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    assert not tokenizer.lossless
    assert [ids.tolist() for ids in tokenizer.encode_arrays(["abab", ""])] == [[2, 2], []]
    assert tokenizer.encode_arrays(["ab"])[0].dtype == np.int64
