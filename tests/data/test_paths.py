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
    many = [word for number in range(400) for word in ("1", f"set{number}")]
    assert len(requested(train_data_path=tuple(many))[0].prefixes) == 400


FILES = {
    '"1.0 data/c4_text_document"': ["1.0", "data/c4_text_document"],
    '"0.3 a" "0.7 b"\n': ["0.3", "a", "0.7", "b"],
    "a": ["a"],
    "# shares\n\n0.3   a\n 0.7 b with spaces \n": ["0.3", "a", "0.7", "b with spaces"],
    "0.3 a 0.7 b": ["0.3", "a", "0.7", "b"],
    '\ufeff"1.0 a"': ["1.0", "a"],
    "tuning=t\nvalidation=v": ["tuning=t", "validation=v"],
}


@pytest.mark.parametrize("text", FILES)
def test_path_files_of_both_forms(text, tmp_path):
    (tmp_path / "paths.txt").write_text(text)
    assert read_path_file(tmp_path / "paths.txt", "--flag") == FILES[text]
    (tmp_path / "train.txt").write_text("a")
    by_file = requested(train_data_path_file=tmp_path / "train.txt", valid_data_path_file=tmp_path / "paths.txt")
    assert by_file == requested(train_data_path=("a",), valid_data_path=tuple(FILES[text]))


MALFORMED = {
    "": "names no data set",
    "# nothing\n\n": "names no data set",
    '"1.0 a': "is not of the form",
    '"1.0 a" b': "is not of the form",
    '"1.0 a b"': "is not of the form",
    '"a"': "is not of the form",
    '""': "is not of the form",
    "0.3 a\nb": "b is not a weight",
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
    train, held_out = requested(train_data_path=("a",), split="8,2", valid_data_path=("v",))
    assert train.split_index == 0 and held_out == [DataSet("validation", ("v",), (1.0,))]


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,1", "-1,2", "nan,1", "inf", "1;2", "1.2.3"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(ConfigurationError, match="give up to three proportions"):
        DataConfig(split=split)
