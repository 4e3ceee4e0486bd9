"""The data multiplier: the published yardstick, interpolation, ranges, seeds, tuned baselines and the tool."""

import json
import re
import sys
from datetime import date

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.laws.data_multiplier import Curve, Recipe, curve, measured_loss, multipliers, not_falling, table, to_json
from megatron.laws.table import Selection, read_runs, short
from tests.conftest import ROOT
from tests.laws.tables import collected_sweep, point, validations
from tools import data_multiplier

BUDGETS = np.array([1e8, 2e8, 4e8, 8e8])


def measured(losses, name="ar", budgets=BUDGETS, **shared) -> Curve:
    """Return a curve of losses: a number, the losses of seeds, or a list of recipes' losses for each budget."""
    recipes = []
    for values in losses:
        lists = values if isinstance(values, list) else [np.atleast_1d(values)]
        options = [
            Recipe(settings={}, parameters=1e6, epochs=1.0, losses=np.array(seeds), selection_losses=np.array(seeds))
            for seeds in lists
        ]
        recipes.append(sorted(options, key=lambda recipe: recipe.selection_losses.mean()))
    return Curve(name=name, source="t.csv", filters=(), shared=shared, chosen_on=None, budgets=budgets, recipes=recipes)


def multiple(losses, loss, unique_tokens=1e8, **settings):
    return multipliers(measured(losses), measured_loss(loss, unique_tokens), **settings)[0]


# ------------------------------------------------------------------ the yardstick


@pytest.fixture
def yardstick(tmp_path):
    """The table of fresh-token baselines in the documentation."""
    text = (ROOT / "docs" / "data-multiplier.md").read_text()
    path = tmp_path / "fresh.csv"
    path.write_text(re.search(r"```csv\n(.*?)```", text, re.DOTALL)[1])
    return path


@pytest.mark.parametrize(
    "loss, depth, expected",
    [(3.402, 12, 5.1), (3.402, 20, 4.2), (3.402, 26, 3.9), (3.195, 12, 15.2), (3.195, 20, 7.7), (3.195, 26, 6.1)],
)
def test_the_slowrun_yardstick_is_reproduced(loss, depth, expected, yardstick, run_tool):
    words = f"--loss {loss} --unique-tokens 100M --baseline {yardstick} depth={depth} --interpolation linear"
    output, record = run_tool(words)
    assert round(record["answers"][0]["multiplier"], 1) == expected
    assert f"depth={depth}: one recipe; epochs 1; seeds 1; unique tokens 200M to 2B (6 budgets); linear" in output
    if (loss, depth) == (3.402, 26):
        documented = (ROOT / "docs" / "data-multiplier.md").read_text()
        assert output.replace(str(yardstick), "fresh.csv") in documented


# ------------------------------------------------------------------ interpolation and ranges


@pytest.mark.parametrize("interpolation, scale", [("log", np.log), ("linear", np.asarray)])
def test_interpolation_is_piecewise_linear(interpolation, scale):
    losses = np.array([4.0, 3.5, 3.2, 3.1])
    targets = np.linspace(3.1, 4.0, 50)
    expected = np.interp(targets[::-1], losses[::-1], scale(BUDGETS)[::-1])[::-1]
    for target, tokens in zip(targets, expected):
        answer = multiple(losses, target, 5e7, interpolation=interpolation)
        assert answer.baseline_tokens is not None and scale(answer.baseline_tokens) == pytest.approx(tokens)
        assert answer.multiplier == pytest.approx(answer.baseline_tokens / 5e7) and answer.how == "interpolated"


def test_the_first_budget_that_reaches_the_loss_counts():
    losses = [4.0, 3.5, 3.7, 3.2]
    assert multiple(losses, 3.6, interpolation="linear").baseline_tokens == pytest.approx(1.8e8)
    assert multiple(losses, 3.5).baseline_tokens == pytest.approx(2e8)
    assert multiple(losses, 3.4, interpolation="linear").baseline_tokens == pytest.approx(6.4e8)
    assert not_falling(measured(losses)) == [(2e8, 4e8)]
    answers = multipliers(measured(losses), measured_loss(3.6, 1e8))
    assert "does not fall from 200M to 400M" in table(measured(losses), measured_loss(3.6, 1e8), answers, "log")


def test_outside_the_measured_budgets_the_answer_is_a_bound():
    losses = [4.0, 3.8, 3.6, 3.4]
    above, below = multiple(losses, 3.3, 5e7), multiple(losses, 4.1, 5e7)
    assert (above.how, above.multiplier, above.baseline_tokens) == ("above the range", None, None)
    assert above.more_than == 16 and str(above) == "more than 16x"
    assert (below.how, below.multiplier, below.less_than) == ("below the range", None, 2)
    assert str(below) == "less than 2x"
    assert multiple(losses, 4.0).multiplier == 1 and multiple(losses, 3.4).multiplier == 8


@pytest.mark.parametrize("baseline_bound", [False, True])
@pytest.mark.parametrize("method_bound", [False, True])
@pytest.mark.parametrize("loss, how", [(3.3, "above"), (3.5, "interpolated"), (4.1, "below")])
def test_a_bound_is_read_in_the_direction_that_it_allows(baseline_bound, method_bound, loss, how):
    """Against losses that the bounds allow: true losses lie up to 0.3 below a bound, anywhere in the range."""
    losses, budget = np.array([4.0, 3.8, 3.6, 3.4]), np.array([1e8])
    baseline = measured(losses, bound=baseline_bound)
    method = measured([loss], "mdm", budget, bound=method_bound)
    (answer,) = multipliers(baseline, method)
    text = str(answer)
    true = []
    for below_baseline in (0, 0.3) if baseline_bound else (0,):
        for below_method in (0, 0.3) if method_bound else (0,):
            exact = multiple(losses - below_baseline, loss - below_method)
            true.append(exact.multiplier or (np.inf if exact.more_than else 0.0))
    if how == "above":
        assert ("no statement" in text) == (min(true) < 8) and (text == "more than 8x") == (not baseline_bound)
    elif how == "below":
        assert ("no statement" in text) == (max(true) > 1) and (text == "less than 1x") == (not method_bound)
    else:
        sign = {(False, False): "", (False, True): ">=", (True, False): "<=", (True, True): ""}
        assert answer.sign == sign[baseline_bound, method_bound] and text.startswith(answer.sign)
        assert (answer.caveat == "") == (not baseline_bound and not method_bound)
        assert answer.sign != ">=" or min(true) >= answer.multiplier - 1e-9
        assert answer.sign != "<=" or max(true) <= answer.multiplier + 1e-9
    printed = table(baseline, method, [answer], "log")
    assert printed.count("no statement") == ("no statement" in text)
    assert ("beyond the baseline's range" in printed) == (text == "more than 8x")


def test_columns_of_one_side_are_listed_as_not_checked():
    baseline, method = measured([4.0, 3.8, 3.6, 3.4], corpus="c4", set="v"), measured([3.7], "mdm", np.array([1e8]))
    printed = table(baseline, method, multipliers(baseline, method), "log")
    assert "corpus, set: not checked (missing in the method)" in printed and "missing in the baseline" not in printed


def test_settings_that_json_has_no_type_for_are_text():
    method = measured_loss(3.6, 1e8)
    method.recipes[0][0].settings.update(day=date(2026, 1, 2), factor=np.float64(np.inf), depth=np.int64(3))
    baseline = measured([4.0, 3.8, 3.6, 3.4])
    answers = multipliers(baseline, method)
    record = to_json(baseline, method, answers, interpolation="log", extrapolate=1.0)
    assert record["method"]["points"][0]["settings"] == {"day": "2026-01-02", "factor": None, "depth": 3}
    assert json.loads(json.dumps(record, allow_nan=False))["answers"][0]["sign"] == ""


def test_extrapolation_is_marked_and_bounded():
    losses = [4.0, 3.8, 3.6, 3.4]  # 0.2 a doubling: 3.3 needs 2^0.5 times more than the largest budget
    answer = multiple(losses, 3.3, extrapolate=2)
    assert answer.how == "extrapolated" and answer.multiplier == pytest.approx(8 * 2**0.5)
    assert multiple(losses, 3.3, extrapolate=1.4).how == "above the range"
    assert multiple([4.0, 3.8, 3.6, 3.6], 3.5, extrapolate=100).how == "above the range"  # a flat end reaches nothing
    linear = multiple(losses, 3.3, extrapolate=2, interpolation="linear")
    assert linear.baseline_tokens == pytest.approx(1e9)


# ------------------------------------------------------------------ seeds


def test_without_several_seeds_there_is_no_interval():
    assert multiple([4.0, 3.8, 3.6, 3.4], 3.7).interval is None
    assert multiple([[[4.0, 4.01]], 3.8, 3.6, 3.4], 3.9).interval is not None
    baseline = measured([[[4.0, 4.01]], 3.8, 3.6, 3.4])
    elsewhere = table(baseline, measured_loss(3.5, 1e8), multipliers(baseline, measured_loss(3.5, 1e8)), "log")
    assert "no interval: the budgets that decide the answer have one seed each" in elsewhere


def test_the_interval_covers_the_true_multiplier():
    """Noise of 0.02 nats, five seeds on both sides: the nominal 95% is right to a few percent of 200 repetitions."""
    draws = np.random.default_rng(1)
    true_losses, covered = [4.0, 3.8, 3.6, 3.4], 0
    for _ in range(200):
        baseline = measured([[loss + 0.02 * draws.standard_normal(5)] for loss in true_losses])
        method = measured([[3.7 + 0.02 * draws.standard_normal(5)]], "mdm", np.array([1e8]))
        low, high = multipliers(baseline, method)[0].interval
        covered += low <= 2**1.5 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_an_interval_that_leaves_the_range_says_so():
    baseline = measured([[[4.0, 4.02]], [[3.8, 3.81]], [[3.6, 3.62]], [[3.38, 3.42]]])
    answer = multipliers(baseline, measured([[[3.39, 3.43]]], "mdm", np.array([1e8])))[0]
    assert answer.interval[0] is not None and answer.interval[1] is None
    assert 0 < answer.resamples_outside < 1000 and "outside the range" in str(answer)


def test_the_choice_of_the_best_recipe_is_resampled():
    """Two recipes of equal mean: each resample takes the better one, so that its losses lie below both means."""
    seeds = [3.60, 3.70, 3.80]
    draws = measured([[seeds, seeds], 3.0]).resampled(np.random.default_rng(0))
    alone = measured([[seeds], 3.0]).resampled(np.random.default_rng(0))
    assert draws[:, 0].mean() < alone[:, 0].mean() - 0.01
    assert alone[:, 0].std() == pytest.approx(np.std(seeds, ddof=1) / 3**0.5, rel=0.1)
    assert (draws[:, 1] == 3.0).all()


# ------------------------------------------------------------------ sweeps and the tool


@pytest.fixture
def run_tool(monkeypatch, capsys, tmp_path):
    """Return a function that runs the tool and returns its output and its JSON record."""

    def run(words: str):
        path = tmp_path / "answer.json"
        monkeypatch.setattr(sys, "argv", ["data_multiplier.py", *words.split(), "--json", str(path)])
        data_multiplier.main()
        return capsys.readouterr().out.rstrip("\n"), json.loads(path.read_text())

    return run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """AR at three budgets, two trials and two seeds; MDM bounds at one budget; tuning and validation disagree."""
    runs = []
    for budget, tuning, validation in ((1000, 4.0, 4.1), (2000, 3.6, 3.7), (4000, 3.2, 3.3)):
        for trial, shift in ((0, 0.0), (1, 0.1)):
            for seed in (1, 2):
                run = point(
                    f"ar{budget}-{trial}-{seed}",
                    **{"unique_tokens": budget, "seed": seed, "trial": trial, "tuned": {"lr": 0.1 * (trial + 1)}},
                    axes={"train-unique-tokens": budget},
                )
                noise = 0.01 * (2 * seed - 3)
                losses = {"tuning": [9.0, tuning + shift + noise], "validation": [9.0, validation - shift / 2 + noise]}
                runs.append((run, validations(losses, budget)))
    for seed in (1, 2):
        run = point(f"mdm-{seed}", variant="mdm", seed=seed, axes={"train-unique-tokens": 1000})
        losses = {"tuning": [9.0, 3.4], "validation": [9.0, 3.5 + 0.02 * seed]}
        runs.append((run, validations(losses, likelihood="mdm", bound=True, num_mc=4)))
    return collected_sweep(tmp_path_factory.mktemp("sweep"), runs)


def test_a_sweep_is_compared_by_its_tuned_baseline(sweep, run_tool):
    output, record = run_tool(f"{sweep} --set validation --best-on tuning --baseline variant=ar --method variant=mdm")
    # trial 0 is best on the tuning set, although trial 1 is better on the validation set
    assert [p["loss"] for p in record["baseline"]["points"]] == pytest.approx([4.1, 3.7, 3.3])
    assert [p["chosen_from"] for p in record["baseline"]["points"]] == [2, 2, 2]
    assert record["baseline"]["points"][0]["settings"]["lr"] == pytest.approx(0.1)
    (answer,) = record["answers"]
    assert answer["loss"] == pytest.approx(3.53) and answer["unique_tokens"] == 1000
    assert answer["multiplier"] == pytest.approx(2 * 2 ** (0.17 / 0.4))
    assert answer["interval"][0] < answer["multiplier"] < answer["interval"][1]
    assert record["method"]["bound"] and record["method"]["evaluation"]["likelihood"] == "mdm"
    assert ">= 2.69x [" in output and "<= 3.5300" in output and "at least these multipliers" in output
    assert "variant=ar: best of 2 recipes at each budget; chosen on tuning; epochs 2;" in output


def test_a_trial_that_is_the_first_seed_of_a_later_stage_is_one_of_its_seeds(tmp_path):
    tuned = {"tuned": {"lr": 0.1}}
    runs = [(point("1", stage="tune", trial=0, **tuned), validations({"validation": [4.0]}))]
    for seed in (1, 2, 3):
        final = point(str(seed), stage="final", seed=seed, axes={"train-epochs": 1}, **tuned)
        runs.append((final, validations({"validation": [3.0 + seed]})))
    table = collected_sweep(tmp_path, runs)
    selection = Selection(mixed=("stage", "trial"))
    (recipes,) = curve("all", read_runs(table, selection, required=("unique_tokens", "loss"))).recipes
    assert [recipe.losses.tolist() for recipe in recipes] == [[4.0, 5.0, 6.0]]


def test_a_baseline_chosen_by_its_reported_losses_is_marked(sweep, run_tool):
    output, record = run_tool(f"{sweep} --set validation --baseline variant=ar --method variant=mdm")
    assert [p["loss"] for p in record["baseline"]["points"]] == pytest.approx([4.05, 3.65, 3.25])
    assert "recipes of the baseline were chosen by the losses that are compared" in output
    single = run_tool(f"{sweep} --set validation --baseline variant=ar trial=0 --method variant=mdm")[0]
    assert "variant=ar trial=0: one recipe;" in single and "were chosen by" not in single


def test_runs_of_less_than_an_epoch_count_with_what_they_read_of_a_set_that_none_has_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("unique_tokens,epochs,loss\n1000,0.5,4.0\n1000,2,3.0\n8000,0.25,2.5\n8000,0.5,2.3\n")
    runs = read_runs(path, Selection(), required=("unique_tokens", "loss"))
    budgets = curve("all", runs)
    # half an epoch is a poor recipe for 1000 tokens, where others repeat them; nobody has read all 8000
    assert budgets.budgets.tolist() == [1000, 2000, 4000]
    assert budgets.losses.tolist() == [3.0, 2.5, 2.3] and len(budgets.recipes[0]) == 2


BEST_BEFORE_THE_END = """run,seed,unique_tokens,consumed_samples,tokens,loss
a,1,1000,8,512,3.0
a,1,1000,15,960,4.0
b,2,1000,8,512,3.5
b,2,1000,15,960,3.2
fresh,1,9000,8,512,2.0
fresh,1,9000,16,1024,2.5
"""


@pytest.mark.parametrize("at", ["last", "best"])
def test_the_budget_of_a_run_does_not_depend_on_its_best_validation(at, tmp_path):
    """Two seeds of an epoch of 1000 tokens in samples of 64, and a run on fresh tokens."""
    path = tmp_path / "t.csv"
    path.write_text(BEST_BEFORE_THE_END)
    budgets = curve("all", read_runs(path, Selection(at=at), required=("unique_tokens", "loss")))
    assert budgets.budgets.tolist() == [1000, 1024]
    recipes = [recipe for recipes in budgets.recipes for recipe in recipes]
    assert [len(recipe.losses) for recipe in recipes] == [2, 1]
    assert recipes[0].epochs == (1 if at == "last" else (0.512 + 1) / 2)  # 960 tokens are all whole samples


@pytest.mark.parametrize("text", ["run,U,loss\na,1000,4\na,1000,3", "run,U,D,loss\na,1000,500,4\na,1000,,3"])
def test_validations_of_a_run_without_tokens_are_refused(text, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=r"t.csv: run a has 2 rows and no tokens \(or epochs\), which order"):
        read_runs(tmp_path / "t.csv", Selection(), required=("unique_tokens", "loss"))
    (tmp_path / "t.csv").write_text("run,U,set,loss\na,1000,x,4\na,1000,y,3\nb,1000,y,2\n")
    runs = read_runs(tmp_path / "t.csv", Selection(set="y"), required=("unique_tokens", "loss"))
    assert runs.loss.tolist() == [3, 2]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--baseline variant=ar --method variant=mdm", "--baseline variant=ar: needs a table"),
        ("{sweep} --set validation --baseline variant=ar", "give --method, or --loss together with --unique-tokens"),
        ("{sweep} --set validation --baseline variant=ar --loss 3", "give --method, or --loss together"),
        (
            "{sweep} --set validation --baseline variant=ar --loss nan --unique-tokens 1K",
            "--loss nan: must be positive",
        ),
        ("{sweep} --set validation --baseline variant=ar --loss 3 --unique-tokens ten", "--unique-tokens ten: must be"),
        ("{sweep} --set validation --baseline variant=ar --method variant=mdm --loss 3", "--method: excludes --loss"),
        ("{sweep} --set validation --baseline variant=mdm --method variant=ar", "runs on 1000 unique tokens only"),
        (
            "{sweep} --set validation --baseline variant=mmd --method variant=ar",
            "--baseline variant=mmd: --where variant=mmd: no row of",
        ),
        ("{sweep} --baseline variant=ar --method variant=mdm", "has the validation sets tuning, validation"),
        (
            "{sweep} --set validation --baseline variant=ar --method variant=mdm --extrapolate 0.5",
            "--extrapolate 0.5: must be a factor of at least 1",
        ),
        (
            "--set validation --baseline {sweep} variant=ar --method {other} variant=ar",
            "alignment is published, and common for the baseline",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, sweep, tmp_path, monkeypatch, capsys):
    runs = [(point("run1"), validations({"validation": [3.5]}, alignment="published"))]
    other = collected_sweep(tmp_path / "other", runs)
    arguments = words.format(sweep=sweep, other=other).split()
    monkeypatch.setattr(sys, "argv", ["data_multiplier.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        data_multiplier.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_an_answer_that_cannot_be_written_exits_with_code_1(sweep, tmp_path, monkeypatch, capsys):
    line = f"{sweep} --set validation --baseline variant=ar --method variant=mdm --json {tmp_path}/none/a.json"
    monkeypatch.setattr(sys, "argv", ["data_multiplier.py", *line.split()])
    with pytest.raises(SystemExit) as caught:
        data_multiplier.main()
    assert caught.value.code == 1 and "a.json" in capsys.readouterr().err


def test_incomparable_losses_raise_from_the_library_too():
    with pytest.raises(ConfigurationError, match="two data budgets or more"):
        multipliers(measured([3.0], budgets=np.array([1e8])), measured_loss(3.0, 1e8))


@pytest.mark.parametrize(
    "amount, text", [(1e8, "100M"), (1.5e9, "1.5B"), (999, "999"), (2.5e3, "2.5K"), (999_999_999.9, "1B")]
)
def test_amounts_are_short(amount, text):
    assert short(amount) == text
