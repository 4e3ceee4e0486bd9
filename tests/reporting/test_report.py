"""The report: paired differences against the formula, comparability, and the HTML page."""

import json
import re
import shutil

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.figure import Figure

from megatron.errors import ConfigurationError
from megatron.reporting import figures
from megatron.reporting.figures import Curve
from megatron.reporting.plots import draw, plot_task_scores
from megatron.reporting.report import Report, write_report
from megatron.reporting.runs import best_point, check_comparable, load_run, load_runs, paired_difference
from megatron.sweeps.states import last_record
from megatron.training.run_folder import read_records
from tests.conftest import run, run_python


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """An AR and an MDM run on the same few tokens."""
    root = tmp_path_factory.mktemp("runs")
    shared = [*tiny, "--train-unique-tokens", 500]
    run("ar", *shared, "--save", root / "ar", "--mlp-dropout", 0.1)
    run("mdm", *shared, "--save", root / "mdm")
    return root


def evaluation(tmp_path, name, nats, tokens):
    """Write a run with one evaluation, of the given nats and tokens by document; return (run, record)."""
    folder = tmp_path / name
    (folder / "validation" / "validation").mkdir(parents=True)
    np.savez(folder / "validation" / "validation" / "1.npz", nats=nats, tokens=tokens)
    record = {"kind": "valid", "set": "validation", "iteration": 1, "loss": nats.mean(0).sum() / tokens.sum()}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "config.json").write_text(json.dumps({"objective_name": name}))
    return load_run(folder), record


def test_paired_difference_is_the_ratio_estimator_with_documents_as_clusters(tmp_path):
    random = np.random.default_rng(0)
    tokens = np.array([30, 0, 50, 20])  # one document has no scored tokens
    exact, noisy = random.random((1, 4)) * tokens, random.random((3, 4)) * tokens
    paired = paired_difference(evaluation(tmp_path, "ar", exact, tokens), evaluation(tmp_path, "mdm", noisy, tokens))
    difference = exact[0] - noisy.mean(0)
    mean = difference.sum() / 100
    residuals = [difference[d] - mean * tokens[d] for d in (0, 2, 3)]
    variance = 3 / 2 * sum(r**2 for r in residuals) / 100**2
    assert paired.nats == pytest.approx(mean) and paired.se == pytest.approx(np.sqrt(variance))


def test_records_are_those_that_json_reads_up_to_a_torn_line(tmp_path):
    lines = ['{"iteration": 1, "loss": 6.2168474197387695e-05, "n": 5645008896.0}', '{"iteration": 2, "loss": NaN}']
    lines += ['{"iteration": 3, "loss": -Infinity, "name": "\\ud800 é"}', '{"iteration": 4, "big": 123456789012345678}']
    for torn in ("", '{"iteration": 5, "lo', "\0\0\0"):
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, torn]), encoding="utf-8")
        records = read_records(tmp_path)
        assert repr(records) == repr(list(map(json.loads, lines)))
        assert [record["iteration"] for record in read_records(tmp_path, up_to_iteration=2)] == [1, 2]
    assert last_record(tmp_path) == records[-1]


def test_noise_that_two_evaluations_share_adds_no_error_to_their_difference(tmp_path):
    tokens = np.array([40, 60])
    noisy = np.random.default_rng(1).random((4, 2)) * tokens
    better = evaluation(tmp_path, "better", noisy, tokens)
    worse = evaluation(tmp_path, "worse", noisy + 0.1 * tokens, tokens)
    paired = paired_difference(worse, better)
    assert paired.nats == pytest.approx(0.1) and paired.se == pytest.approx(0, abs=1e-12)


def test_different_tokens_cannot_be_paired(tmp_path):
    first = evaluation(tmp_path, "first", np.ones((1, 2)), np.array([4, 6]))
    second = evaluation(tmp_path, "second", np.ones((1, 2)), np.array([5, 5]))
    with pytest.raises(ConfigurationError, match="scored different tokens"):
        paired_difference(first, second)


def test_best_points_are_chosen_on_one_set_and_reported_on_another(folders):
    ar = load_run(folders / "ar")
    ar.valid["tuning"][0]["loss"] = 0.0  # makes the first evaluation best on the tuning set
    assert best_point(ar, "tuning", "validation") == ar.valid["validation"][0]


@pytest.mark.parametrize("key, description", [("corpus_hash", "corpus"), ("vocabulary_size", "vocabulary")])
def test_runs_on_other_text_are_never_put_in_one_table(folders, key, description):
    ar, mdm = load_run(folders / "ar"), load_run(folders / "mdm")
    check_comparable([ar, mdm])
    mdm.config[key] = "other"
    with pytest.raises(ConfigurationError, match=f"differ in {description} .*report them separately"):
        check_comparable([ar, mdm])


def test_the_page_is_self_contained_and_says_that_mdm_losses_are_bounds(folders, tmp_path):
    run_python("tools/likelihoods.py", folders / "mdm", "--eval-windows", 2, "--orders", "--num-orders", 0)
    result = run_python("tools/report.py", folders / "ar", folders / "mdm", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']|@import|url\(""", page[: page.index("<script")])
    assert not re.search(r"""<(script|img|link|iframe)[^>]*(src|href)=""", page)
    names = {"validation_epoch", "validation_tokens", "validation_flops", "train_validation", "gap", "best"}
    for suffix in ("png", "svg"):
        assert {path.stem for path in tmp_path.glob(f"*.{suffix}")} == names
    assert page.count("data-root-id") == len(names)
    assert "Likelihoods of mdm at step 12: validation, 2 windows" in page and "<td>mdm, bound</td>" in page
    for text in (page, result.stdout):
        assert "MLP dropout 0.1" in text and "≤ " in text and "upper bounds" in text and "not another seed" in text
    for name in ("ar", "mdm"):
        assert f"{best_point(load_run(folders / name), 'tuning', 'validation')['loss']:.3f}" in result.stdout


def test_runs_of_one_name_are_distinguished_by_their_paths(folders, tmp_path):
    shutil.copytree(folders / "mdm", tmp_path / "ar")
    runs = load_runs([folders / "ar", tmp_path / "ar"])
    assert all(run.name.endswith("/ar") for run in runs) and runs[0].name != runs[1].name
    text = write_report(runs, tmp_path / "report")
    losses = [best_point(run, "tuning", "validation")["loss"] for run in runs]
    worse, better = runs if losses[0] > losses[1] else runs[::-1]
    assert f"{worse.name} is at most {abs(losses[0] - losses[1]):.3f} ±" in text and f"above {better.name}" in text
    with pytest.raises(ConfigurationError, match="is given twice"):
        load_runs([folders / "ar", folders / "ar"])


NAMES = ["_baseline", "__", "cost_$5_and_$6", "$x", r"\$y\$", r"$\frac$ $_", "<b>R&D", "'\"", "%s {0}", "\udcff"]


@pytest.fixture
def plot_texts(monkeypatch):
    """A dictionary that is filled when a plot is saved: file name -> its legend or tick labels, and its title."""
    texts_by_file = {}
    savefig = Figure.savefig

    def save_and_record(figure, path, **options):
        savefig(figure, path, **options)
        texts = []
        for axes in figure.axes:
            names = [text for legend in figure.legends for text in legend.get_texts()]
            texts += [*(names or axes.get_xticklabels()), axes.title]
        texts_by_file[path.name.removesuffix(".partial")] = texts

    monkeypatch.setattr(Figure, "savefig", save_and_record)
    return texts_by_file


def test_names_are_displayed_literally(folders, tmp_path, plot_texts):
    for name in NAMES:
        shutil.copytree(folders / "ar", tmp_path / "runs" / name)
    runs = load_runs([tmp_path / "runs" / name for name in NAMES])
    table = write_report(runs, tmp_path / "report")
    names = [*NAMES[:-1], "\ufffd"]  # the last name is not UTF-8
    labels = {file: [text.get_text() for text in texts[:-1]] for file, texts in plot_texts.items()}
    for name in ("validation_epoch", "validation_tokens", "validation_flops", "train_validation", "gap"):
        assert labels[f"{name}.png"] == labels[f"{name}.svg"] == names
    assert labels["best.png"] == ["AR, MLP dropout 0.1, weight decay 0.1"]
    for texts in plot_texts.values():
        assert not any(text.get_parse_math() for text in texts[:-1])
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{escape(name)}</td>" in page and name in table for name in names)
    assert "<b>" not in page[page.index("</head>") :]


def test_tasks_and_runs_are_named_literally_in_the_plot_of_their_scores(tmp_path, plot_texts):
    results = {task: {"acc,none": 0.5, "acc_stderr,none": 0.1} for task in ("_mine", "a$b$")}
    points = [{"epoch": epoch, "results": results} for epoch in (1.0, 2.0)]
    plot_task_scores({"run": "runs/$1_$2", "points": points}, tmp_path / "scores.png")
    texts = plot_texts["scores.png"]
    assert [text.get_text() for text in texts] == ["_mine acc", "a$b$ acc", "runs/$1_$2"]
    assert not any(text.get_parse_math() for text in texts)


def test_a_legend_covers_no_curve(tmp_path, monkeypatch):
    """Lines that span the axes, so that a legend inside them would cover some; names as long as those of methods."""
    overlaps = []

    def compare_boxes(figure, path, **options):
        figure.draw_without_rendering()
        legends = [*figure.legends, *filter(None, [axes.get_legend() for axes in figure.axes])]
        boxes = [(legend.get_window_extent(), axes.bbox) for legend in legends for axes in figure.axes]
        overlaps.extend(legend.overlaps(axes) for legend, axes in boxes)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", compare_boxes)
    names = [f"AR, token dropout U(0, 0.39), weight decay {number}" for number in range(12)]
    lines = [Curve(label=name, series=name, x=np.arange(1.0, 9), y=np.arange(8.0) * i) for i, name in enumerate(names)]
    draw(figures.Figure(name="lines", title="t", x_label="x", y_label="y", curves=lines), tmp_path)
    points = [{"epoch": epoch, "results": {name: {"acc,none": 0.5} for name in names}} for epoch in (1.0, 2.0)]
    plot_task_scores({"run": "runs/mine", "points": points}, tmp_path / "scores.png")
    assert overlaps == [False, False, False]


def test_a_logarithmic_axis_has_the_ticks_of_its_figure(tmp_path):
    rates = (0.002, 0.004, 0.008, 0.016, 0.032)
    line = Curve(label="a", series="a", x=np.array(rates), y=np.arange(5.0))
    ticks = {}
    for name, x_ticks in (("own", ()), ("given", rates)):
        draw(figures.Figure(name=name, title="t", x_label="x", y_label="y", curves=[line], x_ticks=x_ticks), tmp_path)
        picture = (tmp_path / f"{name}.svg").read_text()
        ticks[name] = re.findall(
            r'<g id="text_\d+">.*?<text[^>]*>(.*?)</text>', picture[: picture.index("matplotlib.axis_2")], re.S
        )
    assert ticks["given"][:-1] == ["0.002", "0.004", "0.008", "0.016", "0.032"]
    assert ticks["own"] != ticks["given"]


def test_an_unfinished_run_with_a_record_cut_by_a_crash_is_reported_as_such(folders, tmp_path):
    """The whole records end between the two sets of step 8."""
    shutil.copytree(folders / "ar", tmp_path / "ar")
    lines = (tmp_path / "ar" / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"iteration": 8' in line and '"set": "tuning"' in line)
    (tmp_path / "ar" / "metrics.jsonl").write_text("".join([*lines[: last + 1], '{"kind": "valid", "iter']))
    text = write_report([load_run(tmp_path / "ar")], tmp_path / "report", Report(tuning="validation"))
    assert "ar is not finished: this is epoch " in text and "end of its budget" not in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "chosen on the validation set" in page and "chosen on the tuning set" not in page
    assert "<p>1 run on " in page and "Commands of 1 run<" in page


def test_bad_input_gets_one_line(folders, tmp_path):
    for arguments, message in (
        ([tmp_path / "nothing"], "holds no run"),
        ([folders / "ar", "--tuning", "other"], "has no validation set other; it has tuning, validation"),
        ([folders / "ar", "--output"], "--output"),
    ):
        result = run_python("tools/report.py", "--output", tmp_path, *arguments)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    (tmp_path / "file").touch()
    result = run_python("tools/report.py", folders / "ar", "--output", tmp_path / "file")
    assert result.returncode == 1 and re.search(rf"^error: .*{tmp_path / 'file'}", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
