"""Reports on sweeps: groups of seeds, best per method and budget, contours, and what other tools computed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.reporting.attachments import read_attachments
from megatron.reporting.conclusions import caveats
from megatron.reporting.contours import contour_figures, contour_lines
from megatron.reporting.figures import report_figures
from megatron.reporting.groups import best_by_budget, group_runs, headline, summarise
from megatron.reporting.report import Report, write_report
from megatron.reporting.runs import paired_difference
from megatron.reporting.sources import load
from megatron.sweeps.archive import restore, write_archive
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import SWEEP_COPY, read_plan, write_plan
from megatron.sweeps.results import collect
from megatron.sweeps.sweep_file import read_sweep
from tests.conftest import run, run_python
from tests.sweeps.files import toy, write

OFFSETS = {1: 0.0, 2: 0.2}  # of the losses, by seed


@pytest.fixture(scope="module")
def sweep(corpus, tiny, tmp_path_factory):
    """A sweep of two variants, two budgets and two seeds; the runs are copies of two, with offset losses."""
    root = tmp_path_factory.mktemp("sweep")
    content = toy(corpus) | {"seeds": [1, 2], "parameters": {"hidden-size": [32, 64], "train-epochs": [4, 8]}}
    path = write(root, content)
    planned = plan_sweep(read_sweep(path), root / "toy")
    write_plan(root / "toy", path.read_text(), planned.points)
    for objective in ("ar", "mdm"):
        run(objective, *tiny, "--train-unique-tokens", 500, "--save", root / objective)
    for point in planned.points:
        offset = OFFSETS[point.seed] + 0.01 * point.axes["train-epochs"] - 0.001 * point.axes["hidden-size"]
        copy_run(root / point.variant, point.folder(root / "toy"), point, offset)
    shutil.rmtree(planned.points[-1].folder(root / "toy"))
    return root / "toy"


def copy_run(source: Path, target: Path, point, offset: float) -> None:
    """Copy a run as a point of a sweep, with all validation losses higher by `offset` nats per token."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((target / "config.json").read_text())
    config["training"]["seed"] = point.seed
    config["parameters"] = point.parameters
    config["train_samples"] = 93 * point.axes["train-epochs"] // 8
    (target / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["loss"] += offset if record["kind"] == "valid" else 0
    (target / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in target.glob("validation/*/*.npz"):
        sums = dict(np.load(path))
        np.savez(path, **sums | {"nats": sums["nats"] + offset * sums["tokens"]})


@pytest.fixture(scope="module")
def rows(sweep):
    return [summarise(group, "tuning", "validation") for group in group_runs(load([sweep]).runs)]


def table_rows(sweep, **columns) -> list[dict]:
    rows = collect(sweep, read_plan(sweep)).to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def test_a_group_has_the_mean_and_range_of_its_seeds_as_the_collected_table_has_them(sweep, rows):
    for row in rows[:-1]:
        assert [run.config["training"]["seed"] for run in row.group.runs] == [1, 2]
        words = dict(part.rsplit(" ", 1) for part in row.name.split(", ")[1:])
        axes = {name: float(value) for name, value in words.items()}
        last = []
        for seed in (1, 2):
            found_rows = table_rows(sweep, variant=row.group.method, seed=seed, set="validation", **axes)
            last.append(found_rows[-1]["loss"])
        assert row.last.loss == pytest.approx(np.mean(last)) and (row.last.low, row.last.high) == tuple(last)
        assert row.last.high - row.last.low == pytest.approx(0.2)
        single = paired_difference(row.last.evaluations[0], row.best.evaluations[0])
        assert (row.gap.nats, row.gap.se) == pytest.approx((single.nats, single.se))  # both seeds differ by 0.2
    assert len(rows[-1].group.runs) == 1  # the other seed has no validation


def test_runs_that_were_not_validated_are_counted(sweep):
    source = load([sweep])
    assert source.notes == ["toy: 1 of 16 runs were not validated on tuning and validation yet."]
    assert source.title == "toy" and len(source.runs) == 15


def test_the_best_per_method_and_budget_is_chosen_on_the_tuning_set(rows):
    best = best_by_budget(rows)
    assert [(row.group.method, row.group.config["train_samples"]) for row in best] == [
        ("ar", 46), ("ar", 93), ("mdm", 46), ("mdm", 93)
    ]  # fmt: skip
    assert all("hidden-size 64" in row.name for row in best[:2])
    last = [row for row in rows if row.group.method == "ar"][-1]
    worse = [row for row in rows if row.group.method == "ar" and row is not last]
    assert min(row.tuning_loss for row in worse) < last.tuning_loss
    assert headline(rows * 2) == [min(group, key=lambda row: row.tuning_loss) for group in (rows[:4], rows[4:])]


def test_bands_are_those_of_the_seeds_and_the_gap_is_to_the_mean_training_loss(rows):
    figures = {figure.name: figure for figure in report_figures(rows, "validation")}
    assert set(figures) == {
        "validation_epoch", "validation_tokens", "validation_flops", "best", "frontier", "train_validation", "gap"
    }  # fmt: skip
    curve, gap = (figures[name].curves[0] for name in ("validation_epoch", "gap"))
    assert np.allclose(curve.high - curve.low, 0.2) and np.allclose(curve.y, (curve.low + curve.high) / 2)
    assert "lowest to the highest seed" in figures["validation_epoch"].note
    run = rows[0].group.runs[0]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    train = {r["iteration"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"}
    means = [np.mean([train[step] for step in steps]) for steps in (range(1, 5), range(5, 9), range(9, 13))]
    assert gap.low == pytest.approx([r["loss"] - m for r, m in zip(run.valid["validation"], means)])
    assert len(contour_figures(rows)) == 2


def test_runs_of_an_archive_are_reported_without_paired_differences(sweep, rows, tmp_path):
    """Archives hold the records, and no sums by document."""
    points, archive, copy = read_plan(sweep), tmp_path / "records.jsonl", tmp_path / "toy"
    assert write_archive(archive, sweep, points) == 15
    write_plan(copy, (sweep / SWEEP_COPY).read_text(), points)
    restore(archive, copy, points)
    source = load([copy])
    text = write_report(source.runs, tmp_path / "page", Report(notes=source.notes))
    assert "15 of 15 runs have no sums by document" in text and " nats per token above " not in text
    assert "Paired differences" not in (tmp_path / "page" / "report.html").read_text()
    for row, before in zip([summarise(group, "tuning", "validation") for group in group_runs(source.runs)], rows):
        assert row.best.loss == before.best.loss and row.gap.nats == pytest.approx(before.gap.nats)
        errors = (before.best.data_se, before.best.mc_se)  # those of each seed: seeds differ by a constant
        assert (row.best.data_se, row.best.mc_se) == pytest.approx(errors)
        assert (row.gap.se is None) != row.best.is_last and (row.best.mc_se is None) != row.bound
    assert not any("no sums by document" in line for line in caveats(rows))


def test_contours_of_a_plane_are_straight_lines():
    random = np.random.default_rng(0)
    x, y = random.uniform(0, 3, (2, 40))
    lines = contour_lines(x, y, 2 * x - y)
    assert len(lines) > 3
    for level, points in lines:
        assert 2 * points[:, 0] - points[:, 1] == pytest.approx(np.full(len(points), level))
    assert contour_lines(np.array([0.0, 1, 2]), np.array([0.0, 0, 0]), np.arange(3.0)) == []
    assert contour_lines(np.array([0.0, 1, 2]), np.array([0.0, 1, 2]), np.arange(3.0)) == []


FIT = {
    "table": "runs.csv",
    "filters": ["in_fit=1"],
    "fits": [
        {
            "form": "repetition", "equation": "L = E", "source": "a paper", "base": "published", "level": 0.95,
            "resamples": 100, "diverged": ["R_N*"], "r2": 0.9, "residuals": {"loss": [3.0, 4.0]},
            "parameters": {
                "R_D*": {"value": 95.4, "frozen": False, "status": "weak", "bootstrap": [6.8, None], "profile": None},
                "R_N*": {"value": None, "frozen": False, "status": "diverged", "bootstrap": None, "profile": None},
            },
            "curves": [
                {"unique_tokens": 1e8, "parameters": 7e6, "epochs": [1, 2], "loss": [4, 3], "low": [3, 2],
                 "high": [5, 4], "runs": {"epochs": [1], "loss": [4.1]}}
            ],
        }
    ],
}  # fmt: skip
MULTIPLIER = {
    "kind": "data_multiplier",
    "interpolation": "log",
    "baseline": {"name": "variant=ar", "recipe": "best of 8", "bound": False,
                 "points": [{"unique_tokens": 2e8, "loss": 3.7}, {"unique_tokens": 4e8, "loss": 3.4}]},
    "method": {"name": "variant=mdm", "bound": True},
    "answers": [
        {"unique_tokens": 1e8, "loss": 3.5, "baseline_tokens": 3.3e8, "multiplier": 3.3, "interval": [3.0, None],
         "how": "interpolated", "more_than": None, "less_than": None},
        {"unique_tokens": 2e8, "loss": 3.3, "baseline_tokens": None, "multiplier": None, "interval": None,
         "how": "above the range", "more_than": 2.0, "less_than": None},
    ],
}  # fmt: skip
SCORES = {
    "run": "runs/mdm",
    "points": [
        {"epoch": epoch, "iteration": step, "results": {"arc": {"acc,none": 0.2 + epoch, "acc_stderr,none": 0.1}}}
        for epoch, step in ((0.1, 5), (0.2, 10))
    ],
}


def write_json(folder: Path, **contents) -> list[Path]:
    paths = [folder / f"{name}.json" for name in contents]
    for path, content in zip(paths, contents.values()):
        path.write_text(json.dumps(content))
    return paths


def test_laws_multipliers_and_scores_are_drawn_as_their_files_have_them(tmp_path):
    fit, multiplier, scores = write_json(tmp_path, fit=FIT, multiplier=MULTIPLIER, scores=SCORES)
    attachments = read_attachments([fit], [multiplier], [scores])
    law, factor = attachments.tables
    assert law.lines[0][:3] == ["R_D*", "95.4", "[6.8, unbounded]"] and law.lines[1][1] == "-"
    assert all(words in law.note for words in ("base published", "in_fit=1", "2 rows", "The fit diverged (R_N*)"))
    assert [line[3] for line in factor.lines] == ["≥ 3.3x", "more than 2x"] and "best of 8" in factor.note
    curve, points = attachments.figures[0].curves
    assert list(curve.high) == [5, 4] and list(points.y) == [4.1] and not points.line
    (downstream,) = attachments.figures[2].curves
    assert downstream.y == pytest.approx([0.3, 0.4]) and downstream.high == pytest.approx([0.4, 0.5])


@pytest.mark.parametrize("kind", ["fit", "multiplier", "scores"])
def test_a_file_of_another_kind_is_refused_in_one_line(kind, tmp_path):
    (path,) = write_json(tmp_path, other={"points": []})
    files = {"fits": [], "multipliers": [], "scores": []} | {kind.rstrip("s") + "s": [path]}
    with pytest.raises(ConfigurationError, match=f"--{kind} {path}: is no record of tools/.*; give the JSON file"):
        read_attachments(**files)
    path.unlink()
    message = rf"--{kind} {path}: cannot be read \(No such file.*\); give the JSON file that tools/.* wrote"
    with pytest.raises(ConfigurationError, match=message):
        read_attachments(**files)


def test_the_page_of_a_sweep_has_all_parts(sweep, tmp_path):
    fit, multiplier, scores = write_json(tmp_path, fit=FIT, multiplier=MULTIPLIER, scores=SCORES)
    records = ["--fit", fit, "--multiplier", multiplier, "--scores", scores]
    done = run_python("tools/report.py", sweep, "--output", tmp_path / "page", *records)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("data-root-id") == len(list((tmp_path / "page").glob("*.svg"))) == 12
    for text in ("<h1>toy</h1>", "1 of 16 runs were not validated on", "Fitted law: repetition", "Data multiplier",
                 "Iso-loss contours", "Downstream: arc acc", "mean over seeds", "upper bounds"):  # fmt: skip
        assert text in page, text
