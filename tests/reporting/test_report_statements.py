"""What a report may state: of synthetic runs whose losses are given."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.contamination import HeldOut, TrainNgrams, ngram_hashes
from megatron.errors import ConfigurationError
from megatron.reporting.attachments import read_attachments
from megatron.reporting.conclusions import Comparison, caveats, compare, conclusions
from megatron.reporting.contours import contour_figures
from megatron.reporting.figures import budget_figure, frontier_figure
from megatron.reporting.groups import Summary, best_by_budget, group_runs, headline, seed_mean, summarise
from megatron.reporting.plots import plot_task_scores
from megatron.reporting.report import provenance, write_report
from megatron.reporting.runs import Difference, SweepPoint, check_evaluations, load_run, mean_difference
from megatron.reporting.sources import load
from tests.conftest import ROOT
from tests.reporting.test_sweep_report import MULTIPLIER, SCORES, write_json

TOKENS = np.array([30, 50, 20])  # of the documents
DIFFICULTY = np.array([0.3, -0.2, 0.05])  # nats per token by document; of weighted sum 0
CONFIG = {
    "objective_name": "ar", "corpus_hash": "c", "corpus_source": "prose", "vocabulary_size": 9, "shared_13grams": None,
    "parameters": 1000, "unique_tokens": 1000, "train_samples": 100, "precision": "fp32", "device": "cpu",
    "commit": "abc", "versions": {"torch": "2.9"}, "command": "train", "model": {}, "objective": {},
    "data": {"seq_length": 10}, "optimizer": {"weight_decay": 0.1}, "validation": {"eval_seed": 0},
    "training": {"seed": 1, "global_batch_size": 8, "fp8_recipe": None},
}  # fmt: skip

NO_STATEMENT = "no statement (the {}'s loss is an upper bound)"


def write_run(folder: Path, losses=(3.0,), *, tuning=None, bound=False, stop=1.0, tokens=TOKENS, num_mc=1, **config):
    """Write a run that was validated at equal intervals up to the share `stop` of its budget; return its folder.

    `losses` are those on the set `validation`, `tuning` those on `tuning`, by default equal.
    """
    content = CONFIG | config
    records = []
    for step, pair in enumerate(zip(tuning or losses, losses), 1):
        samples = content["train_samples"] * stop * step / len(losses)
        progress = {"iteration": step, "consumed_samples": samples, "consumed_tokens": 10 * samples}
        progress |= {"epoch": 10 * samples / content["unique_tokens"], "flops": 60 * samples * content["parameters"]}
        for name, loss in zip(("tuning", "validation"), pair):
            nats = (loss + (DIFFICULTY * loss)[: len(tokens)]) * tokens
            (folder / "validation" / name).mkdir(parents=True, exist_ok=True)
            np.savez(folder / "validation" / name / f"{step}.npz", nats=nats[None], tokens=tokens)
            record = progress | {"kind": "valid", "set": name, "loss": nats.sum() / tokens.sum(), "bound": bound}
            record |= {"alignment": "common", "num_mc": num_mc, "mc_se": None, "data_se": 0.1, "bits_per_byte": None}
            records.append(record)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def row(folder: Path, losses=(3.0,), *, method="", sets=("tuning", "validation"), **options) -> Summary:
    """Return the summary of one written run; with a method, as the point of a sweep."""
    run = load_run(write_run(folder, losses, **options))
    if method:
        run = run.__class__(**run.__dict__ | {"point": SweepPoint(method, folder.name)})
    (group,) = group_runs([run])
    return summarise(group, *sets)


def grid(root: Path, **changes) -> list[Summary]:
    """Return rows of two sizes by two budgets; the run of 2,000 parameters and 2 epochs takes `changes`."""
    rows = []
    for size in (1000, 2000):
        for samples in (100, 200):
            options = changes if (size, samples) == (2000, 200) else {}
            options = {"losses": (3 - size / 1e4, 3.5 - samples / 1e3)} | options
            name = f"{size}_{samples}"
            rows.append(row(root / name, method="ar", parameters=size, train_samples=samples, **options))
    return rows


def test_unfinished_groups_have_no_place_among_budgets(tmp_path):
    rows = grid(tmp_path, losses=(1.0,), stop=0.5)
    assert rows[3] not in best_by_budget(rows) and rows[3].name not in [r.name for r in best_by_budget(rows)]
    assert [len(curve.x) for curve in budget_figure(rows).curves] == [2]
    (contours,) = contour_figures(rows)
    assert len(contours.loss) == 3 and contours.loss.min() > 2
    for figure in (contours, budget_figure(rows)):
        assert "Unfinished groups are omitted: 1 of 4." in figure.note


def test_contours_show_the_loss_that_chose_their_runs(tmp_path):
    rows = grid(tmp_path)
    (contours,) = contour_figures(rows)
    assert list(contours.loss) == [row.best.loss for row in rows] != [row.last.loss for row in rows]
    assert "Loss on the validation set at the best point" in contours.note and "omitted" not in contours.note


def test_runs_that_scored_other_tokens_or_samples_are_refused(tmp_path):
    runs = [load_run(write_run(tmp_path / str(number), seed=number)) for number in range(12)]
    check_evaluations(runs, "tuning", "validation")
    other = load_run(write_run(tmp_path / "other", tokens=TOKENS[::-1]))
    with pytest.raises(ConfigurationError, match="0 and .*other: scored different tokens of the set validation"):
        write_report([*runs, other], tmp_path / "page")
    few, many = (load_run(write_run(tmp_path / f"mc_{n}", bound=True, num_mc=n)) for n in (4, 8))
    check_evaluations([*runs, few], "tuning", "validation")  # exact losses have one sample
    with pytest.raises(ConfigurationError, match=r"differ in --num-mc \(4 and 8\)"):
        check_evaluations([few, many], "tuning", "validation")


@pytest.fixture
def plan_line():
    point = {"stage": "main", "variant": "ar", "axes": {}, "tuned": {}, "trial": None, "script": "", "arguments": []}
    point |= {"nodes": 1, "world_size": 1, "minutes": None, "parameters": 1, "unique_tokens": 1, "train_samples": 1}
    point |= {"tokens": 1, "epochs": 1, "flops": 1, "memory_bytes": None, "disk_bytes": 1}
    return lambda **changes: json.dumps(point | changes) + "\n"


def test_sweeps_of_one_name_stay_apart_and_a_run_is_given_once(tmp_path, plan_line):
    sweeps = [tmp_path / parent / "epochs" for parent in ("first", "second")]
    for seed, sweep in enumerate(sweeps, 1):
        training = CONFIG["training"] | {"seed": seed}
        write_run(sweep / "runs" / "x", training=training)
        (sweep / "plan.jsonl").write_text(plan_line(id="x", seed=seed))
    source = load(sweeps)
    assert [group.label for group in group_runs(source.runs)] == ["first/epochs: ar", "second/epochs: ar"]
    assert source.title == "first/epochs, second/epochs"
    for arguments in ([sweeps[0], sweeps[0]], [sweeps[0], sweeps[0] / "runs" / "x"]):
        with pytest.raises(ConfigurationError, match="is given twice"):
            load(arguments)


def test_a_run_of_several_points_is_in_the_group_of_each_and_counted_once(tmp_path, plan_line):
    """Seed 1 of the best settings is the trial that chose them."""
    for name, seed in (("shared", 1), ("other", 2)):
        training = CONFIG["training"] | {"seed": seed}
        write_run(tmp_path / "sweep" / "runs" / name, (2.0 + seed,), training=training, stop=0.5)
    points = [{"id": "shared", "seed": 1, "stage": "tune", "trial": 0}]
    points += [{"id": name, "seed": seed, "stage": "final"} for seed, name in enumerate(("shared", "other", "x"), 1)]
    (tmp_path / "sweep" / "plan.jsonl").write_text("".join(plan_line(**point) for point in points))
    source = load([tmp_path / "sweep"])
    rows = [summarise(group, "tuning", "validation") for group in group_runs(source.runs)]
    assert [(row.name, len(row.group.runs)) for row in rows] == [("tune, ar, trial 0", 1), ("final, ar", 2)]
    assert [row.best.loss for row in rows] == pytest.approx([3.0, 3.5])
    assert source.notes == ["sweep: 1 of 3 runs were not validated on tuning and validation yet."]
    assert sum("is not finished" in line for line in caveats(rows)) == 2
    write_report(source.runs, tmp_path / "page")
    assert "2 runs on 1,000 unique tokens" in (tmp_path / "page" / "report.html").read_text()


def test_a_run_in_its_first_validation_is_waiting(tmp_path, plan_line):
    """The tuning set of its only step was evaluated, and the validation set was not yet."""
    first, second = (
        write_run(tmp_path / "runs" / name, training=CONFIG["training"] | {"seed": seed})
        for seed, name in enumerate("ab", 1)
    )
    records = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    (first / "metrics.jsonl").write_text(records[0])
    (tmp_path / "plan.jsonl").write_text(plan_line(id="a", seed=1) + plan_line(id="b", seed=2))
    source = load([tmp_path])
    assert [run.folder for run in source.runs] == [second]
    assert source.notes[0].endswith(": 1 of 2 runs were not validated on tuning and validation yet.")
    assert len(load([tmp_path], ["tuning", "tuning"]).runs) == 2
    (second / "metrics.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"on tuning and validation yet \(sets so far: tuning\); see"):
        load([tmp_path])


def test_points_of_one_label_with_other_settings_are_no_seeds(tmp_path, plan_line):
    """The second run was planned as another seed, and trained in fp8; its trunk is of its seed, which is no setting."""
    changes = [{}, {"branched_from": "b"}, {"fp8_recipe": "rowwise"}]
    for seed, change in enumerate(changes, 1):
        training = CONFIG["training"] | {"seed": seed} | change
        write_run(tmp_path / "runs" / str(seed), training=training, branched_from=change.get("branched_from"))
    (tmp_path / "plan.jsonl").write_text("".join(plan_line(id=str(seed), seed=seed) for seed in (1, 2, 3)))
    assert [len(group.runs) for group in group_runs(load([tmp_path]).runs)] == [2, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_noise_of_a_mean_over_seeds_is_that_of_its_samples(tmp_path, sign):
    """Seeds are evaluated with the same noise: their errors may add up or cancel."""
    noise = np.random.default_rng(0).normal(size=(4, 3))  # nats per token, of four samples by document
    evaluations = []
    for seed, factor in enumerate((1, sign)):
        run = load_run(write_run(tmp_path / str(seed), bound=True, num_mc=4))
        path = run.folder / "validation" / "validation" / "1.npz"
        np.savez(path, nats=np.load(path)["nats"] + factor * noise * TOKENS, tokens=TOKENS)
        evaluations.append((run, run.valid["validation"][0] | {"mc_se": 0.1}))
    error = (noise @ TOKENS / 100).std(ddof=1) / 2
    assert seed_mean(evaluations).mc_se == pytest.approx(error * (1 + sign) / 2, abs=1e-12)


def test_the_noise_of_a_mean_without_samples_is_at_most_the_mean_of_the_recorded_errors(tmp_path):
    runs = [load_run(write_run(tmp_path / str(seed), bound=True)) for seed in (1, 2)]
    evaluations = [(run, run.valid["validation"][0] | {"mc_se": error}) for run, error in zip(runs, (0.1, 0.3))]
    assert seed_mean(evaluations).mc_se == pytest.approx(0.2)


def test_nothing_is_significant_without_a_standard_error(tmp_path):
    first, equal, higher = (row(tmp_path / name, (loss,)) for name, loss in (("a", 3.0), ("b", 3.0), ("c", 3.5)))
    same, different = compare([first, equal], True)[0], compare([higher, first], True)[0]
    assert same.difference.ratio == 0 and same.cells()[3] == "+0.0" and same.sentence() == "a and b have equal losses."
    assert different.difference.exceeds(2) and "noise" not in different.sentence()
    single = [row(tmp_path / f"{loss}", (loss - 1, loss), tokens=TOKENS[:1]) for loss in (3.0, 3.5)]
    (comparison,) = compare(single, True)
    assert comparison.difference.se is None and comparison.cells()[2:] == ("-", "-")
    assert "no standard error" in comparison.sentence()
    assert not any("overfits" in line for line in conclusions(single, []))
    assert not Difference(0.0, 0.0).exceeds(2) and Difference(-1.0, 0.0).exceeds(2)


def test_the_sets_that_choose_and_report_are_named(tmp_path):
    rows = [row(tmp_path / name, (loss, 4.0), sets=("validation",) * 2) for name, loss in (("a", 2.0), ("b", 3.0))]
    assert "At their best points, chosen on the validation set, a has" in "\n".join(conclusions(rows, []))
    assert "lowest" not in "\n".join(conclusions(rows[:1], []))  # of one run there is nothing to compare
    assert "selected and reported on the same set (validation)" in "\n".join(caveats(rows))
    assert "on the validation set" in frontier_figure(rows, "validation").note
    runs = [row.group.runs[0] for row in rows]
    for run in runs:
        del run.valid["tuning"]
    with pytest.raises(ConfigurationError, match="has validation; choose one with --tuning"):
        write_report(runs, tmp_path / "page")


@pytest.mark.parametrize(
    "bounds, sign, words",
    [
        ((1, 0), "≤ +0.5", "at most 0.5"),
        ((0, 1), "≥ +0.5", "at least 0.5"),
        ((1, 1), "+0.5", "is 0.5"),
        ((0, 0), "+0.5", "is 0.5"),
    ],
)
def test_a_difference_from_an_upper_bound_is_a_limit(tmp_path, bounds, sign, words):
    rows = [
        row(tmp_path / name, (loss,), bound=bool(bound), objective_name=name)
        for name, loss, bound in zip(("dual", "ar"), (3.5, 3.0), bounds)
    ]
    (comparison,) = compare(rows, True)
    assert comparison.cells()[1].startswith(sign) and words in comparison.sentence()
    assert Comparison(*reversed(rows), mean_difference(rows[1].best.evaluations, rows[0].best.evaluations)).sentence()
    names = [name for name, bound in zip(("dual", "AR"), bounds) if bound]
    stated = [line for line in caveats(rows) if "upper bounds" in line]
    assert [line.split(" are ")[0] for line in stated] == ([f"Losses of {' and '.join(names)}"] if names else [])


def test_different_unique_tokens_are_neither_paired_nor_connected(tmp_path):
    rows = []
    for method in ("ar", "mdm"):
        for unique in (1000, 2000):
            for size in (1000, 2000, 3000):
                loss = 4 - unique / 1e3 - size / 1e5
                folder = tmp_path / f"{method}_{unique}_{size}"
                rows.append(row(folder, (loss,), method=method, unique_tokens=unique, parameters=size))
    described = headline(rows)
    assert [(row.group.method, row.unique_tokens) for row in described] == [
        ("ar", 1000), ("ar", 2000), ("mdm", 1000), ("mdm", 2000)
    ]  # fmt: skip
    pairs = [(c.first.unique_tokens, c.second.unique_tokens) for c in compare(described, all_pairs=False)]
    assert pairs == [(1000, 1000), (2000, 2000)]
    lines = [curve for curve in frontier_figure(rows, "validation").curves if curve.line]
    assert len(lines) == 4 and all(np.ptp(line.y) < 0.1 for line in lines)


def test_compute_of_teachers_is_said_to_be_missing(tmp_path):
    teacher = {"weights": "a1", "flops": 1e9}
    settings = {"distillation": {"distill_weight": 0.5, "distill_temperature": 1.0, "teacher": ["runs/seed_1"]}}
    student = row(tmp_path / "student", teachers=[teacher], **settings)
    plain = row(tmp_path / "plain")
    lines = ["\n".join(caveats(rows)) for rows in ([plain], [plain, student])]
    assert ["FLOPs of distilled runs are the student's" in text for text in lines] == [False, True]


def test_of_equal_flops_only_the_lowest_loss_is_on_the_frontier(tmp_path):
    rows = [row(tmp_path / f"{loss}", (loss,), method="ar") for loss in (3.5, 3.0, 3.2)]
    (line,) = [curve for curve in frontier_figure(rows, "validation").curves if curve.line]
    assert list(line.y) == [pytest.approx(3.0)]


def test_provenance_and_contamination_are_those_of_all_runs(tmp_path):
    shared = [{"validation": {"ngrams": share, "documents": 0.5, "sampled": 1}} for share in (0.1, 0.2)]
    rows = [
        row(tmp_path / device, device=device, versions={"torch": version}, shared_13grams=contamination)
        for device, version, contamination in (("cpu", "2.9", shared[0]), ("H100", "2.10", shared[1]))
    ]
    values = dict(provenance([row.group.runs[0] for row in rows]))
    assert (values["device"], values["torch"], values["commit"]) == ("cpu, H100", "2.9, 2.10", "abc")
    assert sum(line.startswith("Contamination") for line in caveats(rows)) == 2


def test_contamination_of_samples_has_no_share_of_documents(tmp_path):
    """Preprocessing records none once the 13-grams of the training split are a sample."""
    held_out, train = HeldOut(), TrainNgrams(limit=5)
    hashes = ngram_hashes(b"%d " * 30 % tuple(range(30)))  # 18 of them
    train.add(hashes)
    held_out.add(0, hashes)
    shared = held_out.shared(train)
    assert shared["documents"] is None
    caveat = caveats([row(tmp_path / "run", shared_13grams={"validation": shared})])[0]
    assert caveat == (
        "Contamination: 100.0% of the word 13-grams of the validation set also occur in the training split (estimated "
        f"from samples: share of its documents times share of the training split's 13-grams {shared['sampled']:.1%})."
    )


@pytest.mark.parametrize(
    "bounds, times",
    [
        ((False, False), ["3.3x", "more than 2x", "less than 2x"]),
        ((False, True), ["≥ 3.3x", "more than 2x", NO_STATEMENT.format("method")]),
        ((True, False), ["≤ 3.3x", NO_STATEMENT.format("baseline"), "less than 2x"]),
        ((True, True), ["3.3x", *map(NO_STATEMENT.format, ("baseline", "method"))]),
    ],
)
def test_a_multiplier_has_the_sign_that_its_bounds_allow(tmp_path, bounds, times):
    sides = {name: MULTIPLIER[name] | {"bound": bound} for name, bound in zip(("baseline", "method"), bounds)}
    answers = [*MULTIPLIER["answers"], MULTIPLIER["answers"][1] | {"more_than": None, "less_than": 2.0}]
    (path,) = write_json(tmp_path, multiplier=MULTIPLIER | sides | {"answers": answers})
    assert [line[3] for line in read_attachments([], [path], []).tables[0].lines] == times
    stated = [answers[0] | {"sign": ">=", "caveat": "as the tool states"}]
    stated.append(answers[1] | {"sign": "", "caveat": NO_STATEMENT.format("baseline")})
    (path,) = write_json(tmp_path, multiplier=MULTIPLIER | sides | {"answers": stated})
    table = read_attachments([], [path], []).tables[0]
    assert table.lines[0][3] == "≥ 3.3x" and table.note.endswith("over seeds. As the tool states.")


def test_tasks_without_a_metric_are_left_out_of_downstream_scores(tmp_path):
    points = [{"epoch": 1.0, "iteration": 1, "results": {"group": {"alias": "group"}, "x": {"acc,none,2": 0.5}}}]
    (path,) = write_json(tmp_path, scores=SCORES | {"points": points})
    assert [figure.title for figure in read_attachments([], [], [path]).figures] == ["Downstream: x acc against epochs"]


def test_scores_of_a_run_with_unknown_data_are_drawn_against_steps(tmp_path):
    points = [{"epoch": None, "iteration": step, "results": {"x": {"acc,none": 0.5}}} for step in (0, 7)]
    plot_task_scores(SCORES | {"points": points}, tmp_path / "scores.png")
    known, unknown = write_json(tmp_path, known=SCORES, unknown=SCORES | {"points": points})
    (figure,) = [figure for figure in read_attachments([], [], [unknown, known]).figures if figure.y_label == "x acc"]
    assert figure.x_label == "steps" and figure.curves[0].x.tolist() == [0, 7]


def test_figures_of_close_budgets_have_different_files(tmp_path):
    curves = [
        {"unique_tokens": unique, "parameters": 7e6, "epochs": [1], "loss": [4], "low": None, "high": None,
         "runs": {"epochs": [], "loss": []}}
        for unique in (1.0e8, 1.001e8)
    ]  # fmt: skip
    fit = {
        "form": "f",
        "equation": "",
        "source": "",
        "base": None,
        "level": 0.95,
        "resamples": 0,
        "diverged": [],
        "r2": 1.0,
    }
    fit |= {"residuals": {"loss": []}, "parameters": {}, "curves": curves}
    (path,) = write_json(tmp_path, fit={"table": "t", "filters": [], "fits": [fit, fit]})
    names = [figure.name for figure in read_attachments([path], [], []).figures]
    assert len(set(names)) == 4


def test_the_tool_needs_no_torch():
    """Importing it takes seconds."""
    code = "import sys; sys.path.insert(0, 'tools'); import report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.stdout == b"False\n", done.stderr
