"""Tables of runs: quantities, conditions, one row per run, and what is refused."""

import argparse
import json

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from megatron.errors import ConfigurationError
from megatron.laws.rows import Selection
from megatron.laws.table import add_table_arguments, parse_amount, read_runs, read_table, selection_from
from tests.conftest import ROOT
from tests.laws.tables import collected_sweep, point, validations, write_csv

POINTS = ROOT.parent / "shared" / "reference" / "muennighoff_points.csv"
PLAIN = """
params total_tokens unique_tokens val_loss corpus wd
14M    1e9          1e8           4.5      c4     0.1
14M    2e9          1e8           4.25     c4     0.1
44M    1e9          1e8           4.0      dedup  1.0
"""


@pytest.fixture
def plain(tmp_path):
    return write_csv(tmp_path / "runs.csv", PLAIN)


@pytest.fixture
def sweep(tmp_path):
    """Two seeds of a run, their MDM twin, and a run of a second stage that shares a run folder."""
    axes = {"train-epochs": 3, "weight-decay": 0.1}
    sets = [
        {"tuning": [4.0, 3.5, 3.6], "validation": [4.1, 3.7, 3.65]},
        {"tuning": [4.2, 3.6, 3.4], "validation": [4.3, 3.75, 3.55]},
    ]
    runs = [
        (point(f"run{seed}", seed=seed, axes=axes), validations(losses)) for seed, losses in enumerate(sets, start=1)
    ]
    bounds = validations({"tuning": [5, 4, 3], "validation": [5, 4, 3]}, likelihood="mdm", bound=True, num_mc=4)
    runs.append((point("run3", variant="mdm", axes=axes), bounds))
    runs.append((point("run1", seed=1, axes=axes, stage="final"), validations(sets[0])))
    return collected_sweep(tmp_path / "sweep", runs)


# ------------------------------------------------------------------ any table


def test_a_plain_table_is_read_by_the_names_of_its_columns(plain):
    table = read_table(plain, where=["corpus=c4"])
    assert table.parameters.tolist() == [14e6, 14e6]
    assert table.tokens.tolist() == [1e9, 2e9] and table.epochs.tolist() == [10.0, 20.0]
    assert table.loss.tolist() == [4.5, 4.25]
    assert (table.source, table.filters) == (str(plain), ("corpus=c4",))
    assert table.group.tolist() == [0, 1]  # without a column of seeds no run repeats another


def test_parquet_and_csv_give_the_same_rows(plain):
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(plain), plain.with_suffix(".parquet"))
    tables = [read_table(path, where=["wd<0.5"]) for path in (plain, plain.with_suffix(".parquet"))]
    assert np.array_equal(tables[0].loss, tables[1].loss) and len(tables[0]) == 2
    assert np.array_equal(tables[0].parameters, tables[1].parameters)


@pytest.mark.parametrize(
    "condition, losses",
    [
        ("wd=0.1", [4.5, 4.25]),
        ("wd!=0.1", [4.0]),
        ("params=14M", [4.5, 4.25]),
        ("corpus!=c4", [4.0]),
        ("epochs>10", [4.25]),
        ("epochs <= 10", [4.5, 4.0]),
        ("total_tokens>=2B", [4.25]),
        ("loss<4.1", [4.0]),
        ("parameters>20M", [4.0]),
    ],
)
def test_conditions_choose_rows(condition, losses, plain):
    assert read_table(plain, where=[condition], mixed=["corpus"]).loss.tolist() == losses


def test_empty_cells_satisfy_only_the_condition_for_empty_cells(tmp_path):
    path = write_csv(tmp_path / "t.csv", "N U D loss note\n1 1 1 1.5 a\n1 1 1 2.5 NaN\n1 1 1 3.5 b")
    values = {cond: read_table(path, where=[cond]).loss.tolist() for cond in ("note=", "note!=", "note!=a", "note=a")}
    assert values == {"note=": [2.5], "note!=": [1.5, 3.5], "note!=a": [3.5], "note=a": [1.5]}


def test_columns_are_named_and_epochs_give_the_tokens(tmp_path):
    path = write_csv(tmp_path / "t.csv", "size data_tokens passes nll tokens\n1e6 2e6 4 3.0 7\n1e6 2e6 0.5 4.0 7")
    columns = {"parameters": "size", "unique_tokens": "data_tokens", "epochs": "passes", "loss": "nll"}
    table = read_table(path, columns=columns)
    assert table.tokens.tolist() == [8e6, 1e6]
    # less than an epoch: the budget stays that of the training set, and forms count the tokens that were read
    assert table.unique_tokens.tolist() == [2e6, 2e6]
    assert np.exp(table.log_unique).tolist() == pytest.approx([2e6, 1e6])
    assert table.extra_epochs.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    "text, budgets",
    [
        ("N U D loss consumed_samples\n1 1000 960 4 15\n1 1000 1984 3 31", [1000]),  # samples of 64 tokens
        ("N U D loss consumed_samples\n1 1000 896 4 14\n1 1000 1984 3 31", [896, 1000]),
        ("N U D loss\n1 1000 991 4\n1 1000 4000 3", [1000]),
        ("N U D loss\n1 1000 990 4\n1 1000 4000 3", [990, 1000]),
    ],
)
def test_a_run_that_lacks_less_than_a_sample_has_read_its_data(text, budgets, tmp_path):
    assert read_table(write_csv(tmp_path / "t.csv", text)).budgets.tolist() == budgets


@pytest.mark.parametrize(
    "condition, losses", [("epochs=4", [3.0]), ("epochs<4", [4.0]), ("epochs>=4", [3.0, 2.5]), ("epochs=4.032", [2.5])]
)
def test_a_run_of_whole_samples_satisfies_the_epochs_that_it_was_given(condition, losses, tmp_path):
    """Samples of 64 tokens: four epochs of 1000 tokens are 62 samples, 3968 tokens."""
    text = "N U D loss consumed_samples\n1 1000 3904 4 61\n1 1000 3968 3 62\n1 1000 4032 2.5 63"
    assert read_table(write_csv(tmp_path / "t.csv", text), where=[condition]).loss.tolist() == losses


@pytest.mark.parametrize("column", ["epoch", "epochs"])
def test_validations_of_a_sweep_are_chosen_by_their_epochs(column, tmp_path):
    records = validations({"validation": [4.0, 3.0]})
    records[1] |= {"consumed_samples": 31, "consumed_tokens": 1984, "epoch": 1.984}
    folder = collected_sweep(tmp_path / "sweep", [(point("run1"), records)])
    assert read_table(folder, where=[f"{column}=2"]).loss.tolist() == [3.0]


def test_runs_that_differ_in_their_seed_only_share_a_group(tmp_path):
    text = "N U D loss seed wd\n1 2 4 3.0 1 .1\n1 2 4 3.1 2 .1\n1 2 4 3.2 1 .4\n1 2 8 3.3 2 .1\n1 2 4 3.4 3 .1"
    assert read_table(write_csv(tmp_path / "t.csv", text)).group.tolist() == [0, 0, 1, 2, 0]


def test_results_and_dates_do_not_distinguish_recipes(tmp_path):
    text = """
    N U D loss seed wd train_loss seconds bits_per_byte day
    1 2 4 3.0 1 .1 2.9 61 1.1 2026-01-01
    1 2 4 3.1 2 .1 2.8 62 1.2 2026-01-02
    1 2 4 3.2 1 .4 2.7 63 1.3 2026-01-03"""
    runs = read_runs(write_csv(tmp_path / "t.csv", text), Selection())
    assert runs.group.tolist() == [0, 0, 1] and runs.settings[0] == {"wd": 0.1} and runs.notes == ()


def test_a_column_that_separates_all_seeds_is_named(tmp_path):
    path = write_csv(
        tmp_path / "t.csv", "N U D loss seed wd node\n1 2 4 3.0 1 .1 a\n1 2 4 3.1 2 .1 b\n1 2 8 3.2 1 .1 a"
    )
    table = read_table(path)
    assert table.group.tolist() == [0, 1, 2] and "runs differ in node too" in table.notes[0]
    grid = write_csv(tmp_path / "u.csv", "N U D loss seed\n1 2 4 3.0 1\n1 2 8 3.1 2")
    assert read_table(grid).notes == ()


def test_amounts_written_as_text_compare_as_numbers(tmp_path):
    path = write_csv(tmp_path / "t.csv", "N U D loss\n1 25M 1B 3.0\n1 300M 1B 2.9\n1 1B 1B 2.8")
    assert read_table(path, where=["U<=300M"]).loss.tolist() == [3.0, 2.9]
    assert read_table(path, where=["U=1000M"]).loss.tolist() == [2.8]


def test_the_published_points_are_read():
    if not POINTS.exists():
        pytest.skip(f"{POINTS} is not there")
    table = read_table(POINTS, where=["in_fit=1"])
    assert len(table) == 182 and table.loss.min() > 2 and len(table.budgets) > 5
    with pytest.raises(ConfigurationError, match="mixes corpora: data is c4, dedup"):
        read_table(POINTS)


# ------------------------------------------------------------------ sweeps


def test_the_last_validation_of_a_run_is_read_by_default(sweep):
    table = read_table(sweep, set="validation", where=["variant=ar", "stage=main"])
    assert table.loss.tolist() == [3.65, 3.55] and table.tokens.tolist() == [3000, 3000]
    assert table.group.tolist() == [0, 0]
    assert table.filters == ("variant=ar", "stage=main", "set=validation")
    assert table.source == str(sweep / "results.parquet")


def test_the_best_validation_is_chosen_on_another_set_and_reported_on_this_one(sweep):
    chosen = ["variant=ar", "stage=main"]
    own = read_runs(sweep, Selection(set="validation", where=chosen, at="best"))
    other = read_runs(sweep, Selection(set="validation", where=chosen, at="best", best_on="tuning"))
    assert own.loss.tolist() == [3.65, 3.55]
    assert other.loss.tolist() == [3.7, 3.55]
    assert other.selection_loss.tolist() == [3.5, 3.4] and other.tokens.tolist() == [2000, 3000]
    assert other.group.tolist() == [0, 0]  # although their best points are at different tokens
    assert other.shared["alignment"] == "common" and other.shared["set"] == "validation"
    assert other.settings[0] == {"variant": "ar", "train-epochs": 3.0, "weight-decay": 0.1}


def test_a_run_that_two_stages_share_counts_once(sweep):
    runs = read_runs(sweep, Selection(set="validation", where=["variant=ar"], mixed=["stage"]))
    assert runs.loss.tolist() == [3.65, 3.55]


def test_unfinished_runs_are_left_out_and_counted(sweep):
    (sweep / "results.parquet").unlink()
    text = (sweep / "results.csv").read_text()
    lines = [line.replace('"finished"', '"running"') if '"run2"' in line else line for line in text.splitlines()]
    (sweep / "results.csv").write_text("\n".join(lines) + "\n")
    table = read_table(sweep, set="validation", where=["variant=ar", "stage=main"])
    assert table.loss.tolist() == [3.65] and "state=finished (1 runs left out)" in table.filters
    assert len(read_table(sweep, set="validation", where=["variant=ar", "stage=main", "state!="])) == 2
    (sweep / "results.csv").write_text(text.replace('"finished"', '"failed"'))
    with pytest.raises(ConfigurationError, match="has no finished run"):
        read_table(sweep, set="validation")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "selection, message",
    [
        ({}, r"has the validation sets tuning, validation; choose with --set"),
        (
            {"set": "validaton"},
            r"--set validaton: .* has no such validation set in these rows; did you mean validation",
        ),
        ({"set": "validation", "best_on": "tune"}, r"--best-on tune: .* no such validation set"),
        ({"set": "validation"}, r"mixes evaluations: likelihood is ar, mdm; choose one with --where 'likelihood=ar'"),
        (
            {"set": "validation", "mixed": ["likelihood", "bound", "num_mc"]},
            r"mixes recipes: variant is ar, mdm; .* --mixed v",
        ),
        (
            {"set": "validation", "where": ["varient=ar"]},
            r"--where varient=ar: .* no column varient; did you mean vari",
        ),
        (
            {"set": "validation", "where": ["variant=sar"]},
            r"no row of .* is left; variant is ar, mdm in the rows before",
        ),
        ({"where": ["variant>ar"]}, r"--where variant>ar: the column has text; compare it with = or !="),
        ({"where": ["seed=first"]}, r"--where seed=first: the column has numbers, and first is none"),
        ({"where": ["variant"]}, r"--where variant: must be COLUMN, one of = != < <= > >=, and a value"),
        ({"columns": {"loss": "los"}}, r"--columns loss=los: .* has no such column; did you mean loss\?"),
    ],
)
def test_a_wrong_selection_of_a_sweep_is_one_line(selection, message, sweep):
    check_refused(sweep, message, **selection)


@pytest.mark.parametrize("column, values", [("alignment", '"published"'), ("num_mc", "8"), ("set", '"other"')])
def test_losses_of_different_evaluations_are_refused(column, values, tmp_path):
    runs = [(point(f"run{number}", seed=number), validations({"validation": [4.0]})) for number in (1, 2)]
    runs[1][1][0][column] = json.loads(values)
    folder = collected_sweep(tmp_path / "sweep", runs)
    message = "has the validation sets" if column == "set" else f"mixes evaluations: {column} is"
    check_refused(folder, message)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "parms U D loss\n1 1 1 1",
            r"no column for parameters among parms, U, D, loss; did you mean --columns parameters",
        ),
        ("N U loss\n1 1 1", r"no column for tokens \(or epochs\) among N, U, loss; name it: --columns tokens=COLUMN"),
        ("N U D score\n1 1 1 1", r"no column for loss among N, U, D, score"),
        ("N U D loss\n1 1 1 1\n1 1 1 nan", r"row 2: loss is empty or NaN; loss must be positive and finite"),
        ("N U D loss\n1 1 1 inf\n1 1 1 inf", r"row 1: loss is inf \(and 1 more rows\); loss must be positive"),
        ("N U D loss\n1 1 -5 2", r"row 1: D is -5; tokens must be positive and finite"),
        ("N U D loss\n1 0 5 2", r"row 1: U is 0; unique_tokens must be"),
        ("N U D loss\nbig 1 5 2", r"row 1: N is big; parameters must be positive"),
        ("N U D loss", r"has no row"),
        ("N U D loss\n1 1 1 1 1", r"is no CSV or Parquet table"),
        ("N U D loss data\n1 1 1 1 c4\n1 1 1 1 fineweb", r"mixes corpora: data is c4, fineweb; choose one with"),
    ],
)
def test_a_bad_table_is_one_line(text, message, tmp_path):
    check_refused(write_csv(tmp_path / "t.csv", text), message)


def test_a_file_that_is_no_table_is_one_line(tmp_path):
    (tmp_path / "t.parquet").write_text("no table")
    check_refused(tmp_path / "t.parquet", "is no CSV or Parquet table")
    check_refused(tmp_path / "none.csv", "cannot be read")
    check_refused(tmp_path, "has no results.csv; run tools/sweep.py collect")


def check_refused(path, message, **selection):
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_table(path, **selection)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ flags


def test_flags_give_the_selection():
    parser = argparse.ArgumentParser()
    add_table_arguments(parser)
    line = "--columns loss=nll,tokens=seen --where a=1 --where b>2 --set v --at best --best-on t --mixed trial"
    assert selection_from(parser.parse_args(line.split())) == Selection(
        columns={"loss": "nll", "tokens": "seen"},
        where=("a=1", "b>2"),
        set="v",
        at="best",
        best_on="t",
        mixed=("trial",),
    )
    assert selection_from(parser.parse_args([])) == Selection()
    for words in ("los=x", "loss"):
        with pytest.raises(ConfigurationError, match=f"--columns {words}: must be NAME=COLUMN"):
            selection_from(parser.parse_args(["--columns", words]))


@pytest.mark.parametrize("text, value", [("100M", 1e8), ("2.5e9", 2.5e9), (".5k", 500), ("1 B", 1e9), ("7", 7)])
def test_amounts_have_suffixes(text, value):
    assert parse_amount(text, "--flops") == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1G", "1e999", "nan", "100MB"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ConfigurationError, match=f"--flops {text}: must be a positive number"):
        parse_amount(text, "--flops")
