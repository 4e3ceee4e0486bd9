"""Blends, path files and --split in whole runs: resume, evaluation and token counts."""

import json

import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.paths import split_edges
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from megatron.training.launcher import main
from tests.conftest import records, run
from tests.test_errors import check_error


def replaced(tiny, *flags) -> list[str]:
    """Return the flags of a tiny run with other data."""
    index = tiny.index("--train-data-path")
    return [*tiny[:index], *flags]


@pytest.fixture
def blended(tiny, corpus, tmp_path):
    (tmp_path / "train.txt").write_text(f'"0.25 {corpus}/train" "0.75 {corpus}/tuning"\n')
    (tmp_path / "valid.txt").write_text(f"# held out\n1 {corpus}/validation\n")
    files = ["--train-data-path-file", f"{tmp_path}/train.txt", "--valid-data-path-file", f"{tmp_path}/valid.txt"]
    return replaced(tiny, *files)


@pytest.mark.parametrize(
    "order", ["documents", *(pytest.param(order, marks=pytest.mark.slow) for order in ("windows", "megatron"))]
)
def test_a_blend_from_a_path_file_is_interrupted_and_resumed(order, blended, tiny, corpus, tmp_path):
    flags = [*blended, "--epoch-order", order, *(["--blend-order", "megatron"] if order == "megatron" else [])]
    done = run("mdm", *flags, "--save", tmp_path / "whole")
    assert "has no effect" not in done.stderr  # there is a held-out set, although not by --valid-data-path
    run("mdm", *flags, "--save", tmp_path / "cut", "--exit-interval", 5)
    run("mdm", *flags, "--save", tmp_path / "cut", processes=2)
    assert [record["iteration"] for record in records(tmp_path / "cut")] == [
        record["iteration"] for record in records(tmp_path / "whole")
    ]
    for resumed, whole in zip(records(tmp_path / "cut"), records(tmp_path / "whole")):
        assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    if order == "documents":  # the same blend given by flags is the same run; other weights are not
        typed = ["--train-data-path", "1", f"{corpus}/train", "3", f"{corpus}/tuning"]
        same = replaced(tiny, *typed, "--valid-data-path", f"{corpus}/validation")
        run("mdm", *same, "--save", tmp_path / "whole")
        typed[1] = "2"
        other = run("mdm", *replaced(tiny, *typed), "--save", tmp_path / "whole", check=False)
        check_error(other.stderr, "--train-data-path", "has other tokens or other shares", "branch")
        (tmp_path / "train.txt").write_text(f"1 {corpus}/train\n2 {corpus}/tuning\n")
        other = run("mdm", *flags, "--save", tmp_path / "whole", check=False)
        check_error(other.stderr, f"--train-data-path-file {tmp_path}/train.txt", "or other shares", "branch")


def test_unique_tokens_of_members_are_recorded_and_kept(tiny, corpus, tmp_path, capsys):
    def flags(first: int, second: int) -> list[str]:
        blend = ["1", f"{corpus}/train", str(first), "3", f"{corpus}/tuning", str(second)]
        return [*map(str, replaced(tiny, "--train-data-path", *blend))]

    main("ar", [*flags(2000, 1000), "--save", str(tmp_path / "run"), "--exit-interval", "2"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["unique_tokens"] == 3000
    assert config["unique_tokens_by_data_set"] == {f"{corpus}/train": 2000, f"{corpus}/tuning": 1000}
    main("ar", [*flags(2000, 1000), "--dry-run"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["epochs_by_data_set"][f"{corpus}/tuning"] == pytest.approx(0.75 * 93 * 32 / 1000, rel=0.02)
    for other in (flags(1900, 1100), flags(2000, 1100)):
        with pytest.raises(SystemExit) as left:
            main("ar", [*other, "--save", str(tmp_path / "run")])
        message = capsys.readouterr().err
        assert left.value.code == 2 and f"the run in {tmp_path}/run was started with" in message, message
    hashes = [open_sources(parse("ar", line)).corpus_hash for line in (flags(2000, 1000), flags(1900, 1100))]
    assert hashes[0] == config["corpus_hash"] != hashes[1]
    with pytest.raises(SystemExit):
        main("ar", [*flags(10**9, 1000), "--dry-run"])
    assert f"--train-data-path {corpus}/train 1000000000: {corpus}/train.bin holds" in capsys.readouterr().err
    (tmp_path / "paths.txt").write_text(f"1 {corpus}/train 20\n3 {corpus}/tuning\n")
    with pytest.raises(SystemExit):
        main("ar", [*map(str, replaced(tiny, "--train-data-path-file", f"{tmp_path}/paths.txt")), "--dry-run"])
    expected = f"--train-data-path-file {tmp_path}/paths.txt: {corpus}/train leaves 20"
    assert expected in capsys.readouterr().err


def test_split_cuts_whole_documents_and_leaves_the_test_part_for_evaluation(tiny, corpus, tmp_path):
    flags = replaced(tiny, "--data-path", f"{corpus}/train", "--split", "80,10,10")
    whole = IndexedDataset(f"{corpus}/train")
    run("ar", *flags, "--save", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edges = split_edges([80, 10, 10], len(whole))
    assert config["unique_tokens"] == whole.sizes[: edges[1]].sum()
    assert {record["set"] for record in records(tmp_path, "valid")} == {"validation"}
    done = run("ar", "--skip-train", "--load", tmp_path)
    assert [json.loads(line)["set"] for line in done.stdout.splitlines()] == ["validation", "test"]
    other = [
        "--skip-train",
        "--load",
        str(tmp_path),
        "--valid-data-path",
        f"other={corpus}/tuning",
        "--eval-iters",
        "1",
    ]
    (line,) = run("ar", *other).stdout.splitlines()
    assert json.loads(line)["set"] == "other" and json.loads(line)["epoch"] == records(tmp_path)[-1]["epoch"]
    assert parse("ar", other).validation.eval_samples == 8  # one batch of the run's size
    sources = open_sources(parse("ar", [*map(str, flags), "--skip-train"]))
    assert [data.documents for data in sources.validation] == [edges[2] - edges[1], edges[3] - edges[2]]
    ids, documents = sources.validation[0].windows[0]
    assert ids.tolist() == whole.stream(*(config["unique_tokens"] + edge for edge in (0, 33))).tolist()
    assert documents[0] == 0
    moved = run("ar", "--skip-train", "--load", tmp_path, "--split", "90,5,5", check=False)
    check_error(moved.stderr, "--split 90,5,5", "started with --split 80,10,10", "leave the flag out")


def test_a_test_part_of_nothing_does_not_keep_the_others_from_being_evaluated(tiny, corpus, tmp_path):
    run("ar", *replaced(tiny, "--data-path", f"{corpus}/train", "--split", "90,9.9,0.1"), "--save", tmp_path)
    done = run("ar", "--skip-train", "--load", tmp_path)
    assert [json.loads(line)["set"] for line in done.stdout.splitlines()] == ["validation"]
    assert "--split 90,9.9,0.1: the test split holds less than one sample" in done.stderr


def test_a_held_out_set_may_be_named_train(tiny, corpus):
    names = ["--valid-data-path", f"validation={corpus}/validation", f"train={corpus}/tuning"]
    sources = open_sources(parse("ar", [*map(str, replaced(tiny, "--train-data-path", f"{corpus}/train", *names))]))
    assert sources.train.unique_tokens == IndexedDataset(f"{corpus}/train").total_tokens
    assert len(set(sources.fingerprints.values())) == 3


def test_document_flags_on_data_without_ends_of_documents_are_logged(tiny, corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    text = IndexedDataset(f"{corpus}/train")
    with IndexedDatasetWriter(tmp_path / "joined", 257) as writer:
        writer.add_document([int(token) for document in (text[0], text[1]) for token in document[:-1]])
    rules = ["--reset-position-ids", "--eod-mask-loss"]
    for prefix, flags, lines in (
        (f"{corpus}/train", rules, 0),
        (tmp_path / "joined", rules, 1),
        (tmp_path / "joined", [], 0),
    ):
        open_sources(parse("ar", [*map(str, replaced(tiny, "--train-data-path", prefix)), *flags]))
        messages = [line for line in caplog.messages if "has no end-of-document token (id 256)" in line]
        assert len(messages) == lines, caplog.messages
        assert not lines or "--reset-position-ids and --eod-mask-loss does nothing" in messages[0]
        caplog.clear()


def test_a_dry_run_says_how_often_each_member_is_read(tiny, corpus, capsys):
    blend = ["--train-data-path", "1", f"{corpus}/train", "3", f"{corpus}/tuning"]
    main("ar", [*map(str, replaced(tiny, *blend)), "--dry-run"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    sizes = {name: IndexedDataset(f"{corpus}/{name}").total_tokens for name in ("train", "tuning")}
    assert plan["unique_tokens"] == sum(sizes.values())
    read = {name: plan["epochs_by_data_set"][f"{corpus}/{name}"] * sizes[name] / 32 for name in sizes}
    assert sum(read.values()) == pytest.approx(93)
    assert read["tuning"] == pytest.approx(0.75 * 93, abs=1)
    main("ar", [*map(str, tiny), "--dry-run"])
    alone = json.loads(capsys.readouterr().out)["plan"]
    assert alone["epochs_by_data_set"] == {f"{corpus}/train": pytest.approx(alone["epochs"])}
