"""The data sets of the path flags, their files and --split."""

import codecs
import gzip

import pytest

from megatron.config.sections import DataConfig
from megatron.data.paths import DataSet, read_path_file, requested_sets, split_edges
from megatron.errors import ConfigurationError


def requested(**fields):
    return requested_sets(DataConfig(**fields), with_test=False)


def test_a_prefix_a_blend_and_named_sets():
    assert requested(train_data_path=("a",)) == (DataSet("train", ("a",), (1.0,)), [])
    train, held_out = requested(train_data_path=("0.3", "a", "7e-1", "b"), valid_data_path=("v",))
    assert train == DataSet("train", ("a", "b"), (0.3, 0.7)) and held_out == [DataSet("validation", ("v",), (1.0,))]
    _, held_out = requested(train_data_path=("a",), valid_data_path=("tuning=t", "c4-en_2=/x/lr=3/v"))
    assert held_out == [DataSet("tuning", ("t",), (1.0,)), DataSet("c4-en_2", ("/x/lr=3/v",), (1.0,))]
    _, held_out = requested(train_data_path=("a",), valid_data_path=("1", "v", "2", "w"))
    assert held_out == [DataSet("validation", ("v", "w"), (1.0, 2.0))]
    train = requested(train_data_path=("0.7", "a", "25_000_000", "0.3", "b", "1e7"))[0]
    assert train == DataSet("train", ("a", "b"), (0.7, 0.3), unique_tokens=(25_000_000, 10_000_000))
    train = requested(train_data_path=("1", "a", "3", "b", "C4-100M", "2", "2024"))[0]  # 3 is the weight of b
    assert train == DataSet("train", ("a", "b", "2024"), (1.0, 3.0, 2.0), unique_tokens=(None, 99_952_399, None))
    assert [count and count.subset for count in train.cuts()] == [None, "C4-100M", None]
    single = requested(train_data_path=("1.0", "a", "500"))[0]
    assert single.cuts() == (500,) == requested(train_data_path=("a",), train_unique_tokens=500)[0].cuts()
    many = [word for number in range(400) for word in ("1", f"set{number}")]
    assert len(requested(train_data_path=tuple(many))[0].prefixes) == 400


FILES = {
    '"1.0 data/c4_text_document"': ["1.0", "data/c4_text_document"],
    '"0.3 a" "0.7 b"\n': ["0.3", "a", "0.7", "b"],
    "a": ["a"],
    "# shares\n\n0.3   a\n 0.7 b with spaces \n": ["0.3", "a", "0.7", "b with spaces"],
    "0.3 a 0.7 b": ["0.3", "a", "0.7", "b"],
    '\ufeff"1.0 a"': ["1.0", "a"],
    '"0.3 a 1000" "0.7 b"\n"1 c C4-25M"': ["0.3", "a", "1000", "0.7", "b", "1", "c", "C4-25M"],
    "0.3 a 1000\n0.7 b c 2_000\n# d\n 1   e\n": ["0.3", "a", "1000", "0.7", "b c", "2_000", "1", "e"],
    "0.3 a 1000 0.7 b 1 c SlimPajama-1B": ["0.3", "a", "1000", "0.7", "b", "1", "c", "SlimPajama-1B"],
    "tuning=t\nvalidation=v": ["tuning=t", "validation=v"],
}


@pytest.mark.parametrize("text", FILES)
def test_path_files_of_both_forms(text, tmp_path):
    (tmp_path / "paths.txt").write_text(text)
    assert read_path_file(tmp_path / "paths.txt", "--flag") == FILES[text]
    kind = "train" if {"1000", "C4-25M"} & set(FILES[text]) else "valid"  # only training data have unique tokens
    others = {} if kind == "train" else {"train_data_path": ("a",)}
    by_file = requested(**{f"{kind}_data_path_file": tmp_path / "paths.txt"}, **others)
    assert by_file == requested(**{f"{kind}_data_path": tuple(FILES[text])}, **others)


MALFORMED = {
    "": "names no data set",
    "# nothing\n\n": "names no data set",
    '"1.0 a': "is not of the form",
    '"1.0 a" b': "is not of the form",
    '"1.0 a b"': "is not of the form",
    '"a"': "is not of the form",
    '""': "is not of the form",
    "0.3 a\nb": "b is not a weight",
    "0.3 a 100\nb": "b is not a weight",
    '"0.3 a 0.5"': "is not of the form",
    '"0.3 a 5 b"': "is not of the form",
    "a\nb": "a is not a weight",
    "0 a\n1 b": "the weight 0 of a is not a positive number",
    "nan a\n1 b": "the weight nan of a is not a positive number",
    "inf a\n1 b": "the weight inf of a is not a positive number",
    "-1 a\n1 b": "the weight -1 of a is not a positive number",
    "1 a\n2 a": "names a twice",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_path_file_is_named(text, refused, tmp_path):
    path = tmp_path / "paths.txt"
    path.write_text(text)
    with refused(f"--train-data-path-file {path}", MALFORMED[text]):
        requested(train_data_path_file=path)
    with refused(f"--valid-data-path-file {path}", MALFORMED[text]):
        requested(train_data_path=("a",), valid_data_path_file=path)


@pytest.mark.parametrize("name", ["paths.txt", "paths.txt.gz"])
def test_a_path_file_is_read_as_other_text(name, tmp_path):
    data = codecs.BOM_UTF8 + "0.3 daten/ä\r\n0.7 b\r\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_path_file(tmp_path / name, "--flag") == ["0.3", "daten/ä", "0.7", "b"]


def test_a_path_file_that_cannot_be_read(refused, tmp_path):
    with refused(f"--train-data-path-file {tmp_path}/none", "No such file"):
        requested(train_data_path_file=f"{tmp_path}/none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with refused(f"--train-data-path-file {tmp_path}/binary", "is not UTF-8"):
        requested(train_data_path_file=f"{tmp_path}/binary")


@pytest.mark.parametrize(
    "words, message",
    [
        (("0.3", "a", "0.7"), "a weight has no prefix"),
        (("a", "b"), "a is not a weight"),
        (("0", "a"), "the weight 0 of a is not a positive number"),
        (("NaN", "a", "1", "b"), "the weight NaN of a is not a positive number"),
    ],
)
def test_a_malformed_blend_is_refused(words, message, refused):
    with refused(f"--train-data-path {' '.join(words)}", message):
        requested(train_data_path=words)
    with refused(f"--valid-data-path {' '.join(words)}", message):
        requested(train_data_path=("a",), valid_data_path=words)


@pytest.mark.parametrize(
    "words, message",
    [
        (("1", "a", "0", "1", "b"), "the unique tokens 0 of a must be positive"),
        (("1", "a", "-5"), "the unique tokens -5 of a must be positive"),
        (("1", "a", "0.5", "1", "b"), "b is not a weight"),
        (("1", "a", "C4-1M", "1", "b"), "C4-1M is not a weight; write PREFIX, or WEIGHT PREFIX [UNIQUE_TOKENS]"),
        (("1", "a", "10", "20", "1", "b"), "b is not a weight"),
        (("1", "a", "10", "2", "b", "7", "8"), "a weight has no prefix"),
    ],
)
def test_malformed_unique_tokens_are_refused(words, message, refused):
    with refused(f"--train-data-path {' '.join(words)}", message):
        requested(train_data_path=words)


def test_unique_tokens_have_one_place(refused, tmp_path):
    with refused("--valid-data-path 1 v 500", "500 after v", "only training data have", "leave it out"):
        requested(train_data_path=("a",), valid_data_path=("1", "v", "500"))
    (tmp_path / "paths.txt").write_text('"1 v 500"')
    with refused(f"--valid-data-path-file {tmp_path}/paths.txt: 500 after v"):
        requested(train_data_path=("a",), valid_data_path_file=tmp_path / "paths.txt")
    with refused("--train-unique-tokens 9", "cuts one data set", "blends 2", "WEIGHT PREFIX UNIQUE_TOKENS"):
        requested(train_data_path=("1", "a", "2", "b"), train_unique_tokens=9)
    with refused("--train-unique-tokens 9", "--train-data-path 1 a 500 gives the unique tokens 500", "drop one"):
        requested(train_data_path=("1", "a", "500"), train_unique_tokens=9)


def test_nothing_to_train_on_and_two_sets_of_one_name(refused):
    with refused("--train-data-path is required", "tools/preprocess_data.py"):
        requested()
    with refused("--valid-data-path x=a x=b", "share a name"):
        requested(train_data_path=("a",), valid_data_path=("x=a", "x=b"))


# ------------------------------------------------------------------------------------------- --split


def slow_edges(shares: list[float], documents: int) -> list[int]:
    """Return the edges by the published rounding, step by step."""
    shares = [*shares, 0.0, 0.0][:3]
    first = round(shares[0] / sum(shares) * float(documents))
    second = first + round(shares[1] / sum(shares) * float(documents))
    third = second + round(shares[2] / sum(shares) * float(documents))
    difference = third - documents
    return [0, first - difference, second - difference, documents]


@pytest.mark.parametrize("split", ["969,30,1", "969, 30, 1", "1", "80,20", "1,1,1", "98,2,0", "5e1,50"])
def test_split_edges(split):
    shares = DataConfig(split=split).split_shares
    for documents in (1, 2, 3, 10, 33, 100, 999, 12345):
        edges = split_edges(shares, documents)
        assert edges == slow_edges(shares, documents) and sorted(edges) == edges


def test_split_names_its_parts():
    data = DataConfig(train_data_path=("1", "a", "2", "b"), split="8,1,1")
    train, held_out = requested_sets(data, with_test=True)
    assert train == DataSet("train", ("a", "b"), (1.0, 2.0), 0)
    assert held_out == [
        DataSet("validation", ("a", "b"), (1.0, 2.0), 1),
        DataSet("test", ("a", "b"), (1.0, 2.0), 2),
    ]
    assert [held_out_set.name for held_out_set in requested_sets(data, with_test=False)[1]] == ["validation"]
    assert requested(train_data_path=("a",), split="1")[1] == []
    train, held_out = requested(train_data_path=("1", "a", "500"), split="8,2")
    assert (train.unique_tokens, held_out) == ((500,), [DataSet("validation", ("a",), (1.0,), 1)])
    train, held_out = requested(train_data_path=("a",), split="8,2", valid_data_path=("v",))
    assert train.split_index == 0 and held_out == [DataSet("validation", ("v",), (1.0,))]


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,1", "-1,2", "nan,1", "inf", "1;2", "1.2.3"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(ConfigurationError, match="give up to three proportions"):
        DataConfig(split=split)
