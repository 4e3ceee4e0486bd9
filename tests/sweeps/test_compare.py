"""Differences to a baseline: best steps on the tuning set, pairs by seed, standard errors over seeds; refusals."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.sweeps.compare import Selection, compare, markdown, read_table, unfinished
from megatron.sweeps.results import COST_COLUMNS, POINT_COLUMNS, RECORD_COLUMNS, RUN_COLUMNS

ROOT = Path(__file__).resolve().parents[2]
SETS = Selection()
VARIANTS, LOOPS, SEEDS, STEPS = ("ar", "mdm"), ("1", "2"), ("1", "2", "3"), ("10", "20", "30")


@pytest.fixture
def losses() -> np.ndarray:
    """Return losses [variant, loops, seed, step, set]; the tuning set is the first."""
    return np.random.default_rng(0).normal(4.0, 0.5, (2, 2, 3, 3, 2))


@pytest.fixture
def table(tmp_path, losses) -> Path:
    return write(tmp_path / "results.csv", losses)


def write(path: Path, losses: np.ndarray, **changes: str) -> Path:
    """Write a table of `losses`; `changes` are cells of its last row."""
    columns = [*POINT_COLUMNS, *RUN_COLUMNS, *COST_COLUMNS, "num-loops", *RECORD_COLUMNS]
    rows = []
    for (variant, loops, seed, step, number), loss in np.ndenumerate(losses):
        row = dict.fromkeys(columns, "") | {"stage": "main", "variant": VARIANTS[variant], "num-loops": LOOPS[loops]}
        row |= {
            "id": f"{variant}{loops}{seed}",
            "seed": SEEDS[seed],
            "iteration": STEPS[step],
            "epoch": STEPS[step],
            "set": ["tuning", "validation"][number],
        }
        row |= {
            "corpus_hash": "c",
            "state": "finished",
            "alignment": "common",
            "bound": str(variant == 1),
            "num_mc": "8" if variant else "1",
        }
        rows.append(row | {"loss": repr(float(loss))})
    rows[-1] |= changes
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_runs_that_have_not_finished_are_counted_and_can_be_left_out(table):
    rows = read_table(table)
    for row in rows:
        row |= {"state": "running"} if row["id"] == "112" else {}
    assert unfinished(rows, Selection(variants="ar")) == []
    assert unfinished(rows, SETS)[0].startswith("1 of 12 runs have not finished (1 running): they are taken at the")
    finished = Selection(where={"state": "finished"})
    assert unfinished(rows, finished) == []
    for selection, number in ((SETS, 3), (finished, 2)):
        assert len(compare(rows, {"variant": "ar"}, selection)[-1].runs) == number


def test_differences_are_paired_by_seed_at_the_best_step_on_the_tuning_set(table, losses):
    best = losses[..., 0].argmin(-1)  # [variant, loops, seed]
    reported = np.take_along_axis(losses[..., 1], best[..., None], -1)[..., 0]
    entries = compare(read_table(table), {"num-loops": "1"}, SETS)
    assert [(entry.names["variant"], entry.names["num-loops"]) for entry in entries] == [
        (variant, loops) for variant in VARIANTS for loops in LOOPS
    ]
    for index, entry in enumerate(entries):
        variant, loops = divmod(index, 2)
        assert [run.loss for run in entry.runs.values()] == reported[variant, loops].tolist()
        expected = reported[variant, 1] - reported[variant, 0]
        assert bool(entry.baseline) == bool(loops)
        cells = entry.cells()[len(entry.names) :]
        sign = "<= " if variant else ""
        assert cells[0] == f"{sign}{reported[variant, loops].mean():.4f}" and cells[3] == "3"
        assert cells[1] == f"{reported[variant, loops].std(ddof=1) / np.sqrt(3):.4f}"
        assert cells[2] == f"{np.array([10.0, 20.0, 30.0])[best[variant, loops]].mean():.1f}"
        if loops:
            assert cells[4:6] == [f"{expected.mean():+.4f}", f"{expected.std(ddof=1) / np.sqrt(3):.4f}"]
            assert cells[6] == f"{(expected < 0).sum()} of 3"


def test_the_best_of_a_column_is_chosen_on_the_tuning_set(table, losses):
    flat = losses.transpose(0, 2, 1, 3, 4).reshape(2, 3, -1, 2)  # [variant, seed, loops and step, set]
    best = flat[..., 0].argmin(-1)
    reported = np.take_along_axis(flat[..., 1], best[..., None], -1)[..., 0]
    ar, mdm = compare(read_table(table), {"variant": "ar"}, Selection(best_over=["num-loops"]))
    assert [run.loss for run in ar.runs.values()] == reported[0].tolist()
    assert [run.loss for run in mdm.runs.values()] == reported[1].tolist()
    assert ar.cells()[3].startswith(f"{reported[0].mean():.4f}")
    assert mdm.cells()[3] == f"<= {reported[1].mean():.4f}"  # a bound says so
    assert mdm.cells()[-3] == f"{(reported[1] - reported[0]).mean():+.4f}"


def test_only_selected_rows_are_compared(table):
    entries = compare(read_table(table), {"variant": "ar"}, Selection(where={"num-loops": "2"}))
    assert [entry.names["num-loops"] for entry in entries] == ["2", "2"]
    whole = compare(read_table(table), {"variant": "ar"}, SETS)
    assert [entry.cells() for entry in entries] == [entry.cells() for entry in whole if entry.names["num-loops"] == "2"]


@pytest.mark.parametrize("written", ["1000000", "1e6", "1_000_000", "1e+06"])
def test_values_may_be_written_as_any_of_the_tools_writes_them(tmp_path, losses, monkeypatch, written):
    monkeypatch.setattr(sys.modules[__name__], "LOOPS", ("1000000", "1000001"))
    table = write(tmp_path / "results.csv", losses)
    rows = compare(read_table(table), {"num-loops": written}, SETS)
    assert [row.names["num-loops"] for row in rows] == ["1000000", "1000001"] * 2
    assert [bool(row.baseline) for row in rows] == [False, True] * 2
    selected = compare(read_table(table), {"variant": "ar"}, Selection(where={"num-loops": written}))
    assert {row.names["num-loops"] for row in selected} == {"1000000"}


def test_a_set_that_no_run_has_next_to_the_other_is_refused(tmp_path, losses):
    table = write(tmp_path / "results.csv", losses[:1, :1, :1, :1])
    lines = table.read_text().replace("validation", "other").splitlines()
    table.write_text("\n".join([*lines, lines[-1].replace("other", "validation").replace(",10,", ",20,")]) + "\n")
    with pytest.raises(ConfigurationError, match="^tuning, validation: no run has losses of both sets at one step"):
        compare(read_table(table), {"variant": "ar"}, SETS)


def test_a_second_likelihood_is_a_set_of_its_own(table):
    rows = list(csv.DictReader(table.open()))
    lower = [row | {"set": f"{row['set']}.mdm", "loss": repr(float(row["loss"]) - 1)} for row in rows]
    (first, *_) = compare([*rows, *lower], {"variant": "ar"}, SETS)
    selection = Selection(tuning="tuning.mdm", validation="validation.mdm")
    (second, *_) = compare([*rows, *lower], {"variant": "ar"}, selection)
    for seed, best in first.runs.items():
        assert second.runs[seed].loss == pytest.approx(best.loss - 1)


def test_only_shared_seeds_are_paired(tmp_path, losses):
    losses[0, 0, 2] = np.inf  # written, but this seed's rows are removed below
    path = write(tmp_path / "results.csv", losses)
    lines = [line for line in path.read_text().splitlines() if ",inf," not in line]
    path.write_text("\n".join(lines) + "\n")
    baseline, other, *_ = compare(read_table(path), {"num-loops": "1"}, SETS)
    assert list(baseline.runs) == ["1", "2"] and len(other.runs) == 3 and other.cells()[-1].endswith("of 2")


def test_without_a_shared_seed_means_are_compared(tmp_path, losses):
    path = write(tmp_path / "results.csv", losses[:1, :, :, :1])
    rows = read_table(path)
    for row in rows:
        row["seed"] = row["seed"] + ("0" if row["num-loops"] == "2" else "")
    _, other = compare(rows, {"num-loops": "1"}, SETS)
    first, second = losses[0, :, :, 0, 1]
    errors = [side.std(ddof=1) / np.sqrt(3) for side in (first, second)]
    assert other.cells()[-3:] == [f"{second.mean() - first.mean():+.4f}", f"{np.hypot(*errors):.4f}", "unpaired"]


def test_the_command_prints_a_markdown_table(table):
    command = [sys.executable, "tools/sweep.py", "compare", str(table.parent), "--baseline", "num-loops=1"]
    result = subprocess.run([*command, "--variants", "m*"], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = markdown(compare(read_table(table), {"num-loops": "1"}, Selection(variants="m*")))
    assert result.stdout == expected + "\n" and "variant" not in expected
    assert (
        expected.splitlines()[0].split()
        == "| num-loops | best loss | se | epoch | runs | difference | se | lower |".split()
    )


@pytest.mark.parametrize(
    "baseline, more, message",
    [
        ({"loops": "1"}, {}, "--baseline loops=1: names no column; give one of stage, variant, trial, num-loops"),
        ({"num-loops": "4"}, {}, "--baseline num-loops=4: no run has that value of num-loops; see the table"),
        (
            {"num-loops": "1"},
            {"variants": "x"},
            "--variants x: matches no variant of the table; see its column variant",
        ),
        (
            {"num-loops": "1"},
            {"tuning": "dev"},
            "dev: is no set of the table; give --tuning and --validation of tuning, validation",
        ),
        (
            {"num-loops": "1"},
            {"where": {"stage": "final"}},
            "--where stage=final: no run has that value of stage; see the table",
        ),
        (
            {"variant": "ar"},
            {"best_over": ["lr"]},
            "--best-over lr: names no column; give one of stage, variant, trial, num-loops",
        ),
        (
            {"num-loops": "1"},
            {"best_over": ["num-loops"]},
            "--baseline num-loops=1: names no column; give one of stage, variant, trial",
        ),
    ],
)
def test_what_does_not_fit_the_table_is_refused(table, baseline, more, message):
    with pytest.raises(ConfigurationError) as caught:
        compare(read_table(table), baseline, Selection(**more))
    assert str(caught.value) == message


@pytest.mark.parametrize("changes", [{"corpus_hash": "d"}, {"alignment": "published"}, {"num_mc": "16"}])
def test_losses_of_other_text_or_noise_are_not_compared(tmp_path, losses, changes):
    path = write(tmp_path / "results.csv", losses, **changes)
    with pytest.raises(ConfigurationError, match=f"its losses differ in {next(iter(changes))} .* cannot be compared"):
        compare(read_table(path), {"num-loops": "1"}, SETS)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is missing; tools/sweep.py collect SWEEP writes it"):
        read_table(tmp_path)
    for content, message in (
        ("a,b\n1,2\n", "has no column stage"),
        ("", "is not a table"),
        ("a,b\n1\n", "is not a table"),
    ):
        (tmp_path / "results.csv").write_text(content)
        with pytest.raises(ConfigurationError, match=message):
            read_table(tmp_path)
