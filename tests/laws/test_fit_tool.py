"""tools/fit_scaling_laws.py as a command: its page of text, fit.json, plots, answers and mistakes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigurationError
from megatron.laws.answers import best_run, frontier, to_json
from megatron.laws.base import Law, LawTable
from megatron.laws.command import answers, requests
from megatron.laws.record import plain
from megatron.laws.registry import FORMS, load_law
from megatron.laws.study import comparison, comparison_table, study
from megatron.laws.table import short
from megatron.training.run_folder import write_json
from tests.conftest import ROOT, run_python
from tests.laws.synthetic import PLANTED, synthetic

TOOL = ROOT / "tools" / "fit_scaling_laws.py"


def tool(*arguments) -> str:
    """Run the tool; return what it prints."""
    result = run_python(TOOL, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def write(path: Path, table: LawTable) -> Path:
    """Write a table of runs as CSV."""
    rows = zip(table.parameters, table.unique_tokens, table.tokens, table.loss, table.group, strict=True)
    lines = [f"{size!r},{unique!r},{tokens!r},{loss!r},{group}" for size, unique, tokens, loss, group in rows]
    text = "\n".join(["params,unique,total,val,group", *lines]) + "\n"
    path.write_text(text.replace("np.float64(", "").replace(")", ""))
    return path


COLUMNS = "--columns", "parameters=params,unique_tokens=unique,tokens=total,loss=val"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder and the output of a comparison of two forms with answers."""
    folder = tmp_path_factory.mktemp("laws")
    table = synthetic("overfitting-linear")
    table = write(folder / "runs.csv", table.select(table.unique_tokens < 1e9))
    arguments = ["--form", "chinchilla,overfitting-linear", "--bootstrap", 100, "--unique-tokens", "100M"]
    output = tool(table, *COLUMNS, *arguments, "--flops", "1e19", "--where", "total<1e12", "--output", folder / "fits")
    return folder, output


def test_the_output_names_form_source_filter_and_base(fitted):
    output = fitted[1]
    for text in (
        "overfitting-linear: L = E + A / N^alpha + B / D^beta + P R N / U",
        "source: Lovelace et al. 2605.01640",
        "runs.csv",
        "total<1e12",
        "base: fitted to the same rows",
        "95% bootstrap",
        "95% profile",
        "leave-one-budget-out error: ",
        "forms on the same",
        "overfitting-linear answers (compute 6 N D; ",
        "best run on 100M unique tokens at 1e+19 FLOPs: ",
    ):
        assert text in output, text


def test_fit_json_has_what_reports_need(fitted):
    folder, _ = fitted
    record = json.loads((folder / "fits" / "fit.json").read_text())
    assert record["filters"] == ["total<1e12"] and len(record["answers"]) == 6
    assert [row["form"] for row in record["comparison"]] == ["overfitting-linear", "chinchilla"]
    fit = {fit["form"]: fit for fit in record["fits"]}["overfitting-linear"]
    planted = PLANTED["overfitting-linear"]
    assert fit["parameters"]["P"]["value"] == pytest.approx(planted["P"], rel=0.05)
    low, high = fit["parameters"]["P"]["bootstrap"]
    assert low < planted["P"] < high and fit["resamples"] == 100
    predicted, loss = fit["residuals"]["predicted"], fit["residuals"]["loss"]
    assert len(loss) > 60 and predicted == pytest.approx(loss, rel=0.05)
    assert fit["curves"] and {"epochs", "loss", "low", "high", "runs"} <= set(fit["curves"][0])
    law = load_law(folder / "fits" / "fit.json", "overfitting-linear")
    expected = Law(FORMS["overfitting-linear"], FORMS["overfitting-linear"].internal(planted)).loss(1e8, 1e8, 1e9)
    assert law.loss(1e8, 1e8, 1e9) == pytest.approx(expected, rel=0.01) and law.draws.shape == (100, 6)
    assert law.notes["filters"] == ["total<1e12"]


def test_plots_are_images(fitted):
    folder, _ = fitted
    for name in ("chinchilla", "overfitting-linear"):
        for kind in ("curves", "residuals", "profiles"):
            assert (folder / "fits" / f"{name}_{kind}.png").read_bytes()[:4] == b"\x89PNG"
            assert "</svg>" in (folder / "fits" / f"{name}_{kind}.svg").read_text()
    assert not list((folder / "fits").glob("*.partial"))


def test_a_base_is_taken_from_another_fit(fitted):
    path = fitted[0] / "fits" / "fit.json"
    (request,) = requests("repetition", [], f"{path}:chinchilla")
    expected = load_law(path, "chinchilla").values
    assert request.frozen == pytest.approx(expected) and list(request.frozen) == list(FORMS["repetition"].base)
    assert request.base.startswith(f"frozen, {path}:chinchilla (chinchilla, ") and "beta 0." in request.base
    with pytest.raises(ConfigurationError, match="no fit of the form quokka; it has chinchilla, overfitting-linear"):
        load_law(path, "quokka")
    with pytest.raises(ConfigurationError, match="has fits of chinchilla, overfitting-linear; name the form: "):
        requests("repetition", [], str(path))


def test_a_base_is_that_of_a_form_with_the_same_parameters(tmp_path):
    """The A, B, alpha and beta of outer-exponent mean something else."""
    law = Law(FORMS["outer-exponent"], FORMS["outer-exponent"].internal(PLANTED["outer-exponent"]))
    write_json(tmp_path / "fit.json", {"fits": [{"form": "outer-exponent", "law": law.to_json()}]})
    with pytest.raises(ConfigurationError, match="parameters of outer-exponent are no base of repetition; give a fit"):
        requests("repetition", [], str(tmp_path / "fit.json"))


@pytest.mark.parametrize(
    "record",
    [
        {"fits": []},
        {"fits": [{"form": "chinchilla"}]},
        {"fits": [{"form": "chinchilla", "law": {"form": "chinchilla"}}]},
        {"fits": [{"form": "chinchilla", "law": 3}]},
        {"fits": [{"form": "chinchilla", "law": {"form": "chinchilla", "values": {"E": 1.0}}}]},
        {"fits": [{"form": "quokka", "law": {"form": "quokka", "values": dict.fromkeys("EA", 1), "draws": [[1.0]]}}]},
    ],
)
def test_a_malformed_fit_is_one_line(record, tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps(record))
    with pytest.raises(ConfigurationError, match="fit.json: (not a fit of|has no fit)") as error:
        load_law(tmp_path / "fit.json")
    assert "\n" not in str(error.value)


def test_two_laws_answer_with_their_critical_compute(fitted):
    path = fitted[0] / "fits" / "fit.json"
    law = load_law(path, "overfitting-linear")
    other = load_law(path, "chinchilla")
    lines, records = answers(replace(law, draws=None), [1e8], [1e18, 1e19], other)
    table = law.notes["table"]
    assert [record["question"] for record in records] == [
        "best run on 100M unique tokens",
        "enough on 100M unique tokens",
        "best run on 100M unique tokens at 1e+18 FLOPs",
        "best run on 100M unique tokens at 1e+19 FLOPs",
        f"overfitting-linear of {table} overtakes chinchilla of {table}",
    ]
    assert records[3]["answer"] == plain(to_json(best_run(law, 1e8, 1e19)))
    assert len(lines) == 6 and json.dumps(records, allow_nan=False)
    assert lines[0] == f"  critical compute is against {path}:chinchilla ({table}, total<1e12, base fitted)"
    levels = [answers(law, [1e8], [], other, level=level)[1][-1]["answer"] for level in (0.5, 0.95)]
    assert [level["level"] for level in levels] == [0.5, 0.95]


def test_answers_outside_the_range_of_the_runs_say_so(fitted):
    law = load_law(fitted[0] / "fits" / "fit.json", "overfitting-linear")
    (low, high), (_, most) = law.notes["range"]["unique_tokens"], law.notes["range"]["epochs"]
    inside = answers(replace(law, draws=None), [1e8], [1e18])
    assert inside[1][2]["outside"] == [] and "outside the range" not in inside[0][2]
    assert low < 1e8 < high and most > 100
    lines, records = answers(replace(law, draws=None), [1e10], [])
    word = f"U ({short(low)} to {short(high)})"
    assert "outside the range of the runs: " in lines[0] and word in lines[0] and word in records[0]["outside"]


def test_an_epoch_is_within_the_range_of_runs_of_an_epoch_of_whole_samples():
    table = synthetic("chinchilla")
    table = replace(table, tokens=table.unique_tokens // 2048 * 2048)
    law = study(FORMS["chinchilla"], table, {"alpha": 0.35, "beta": 0.37}, resamples=0).law
    assert law.notes["range"]["epochs"] == [1.0, 1.0]


def test_critical_compute_outside_the_range_of_either_laws_runs_says_so():
    """Ranges that end just below the model size of one frontier at the crossing, and the epochs of the other."""
    form, wide = FORMS["repetition"], {"parameters": [1e5, 1e13], "unique_tokens": [1e8, 1e8], "epochs": [1e-3, 1e5]}
    constants = ({"A": 700.0, "B": 2100.0, "R_D*": 493.89, "R_N*": 1265.65}, {"R_D*": 31.19, "R_N*": 55.16})
    laws = [Law(form, form.internal({**form.published, **values}), notes={"range": wide}) for values in constants]
    lines, records = answers(laws[0], [1e8], [], laws[1])
    assert records[-1]["outside"] == [] and "outside" not in lines[-1]
    flops = records[-1]["answer"]["flops"]
    sizes = [frontier(law, 1e8, np.array([flops]))[1][0] for law in laws]
    ends = {"parameters": [1e5, 0.99 * sizes[0]]}, {"epochs": [1e-3, 0.99 * flops / 6 / sizes[1] / 1e8]}
    narrow = [
        replace(law, notes={"range": wide | end, "table": table}) for law, end, table in zip(laws, ends, ("mdm", "ar"))
    ]
    lines, records = answers(narrow[0], [1e8], [], narrow[1])
    words = [
        f"N (100K to {short(0.99 * sizes[0])}) for repetition of mdm",
        f"epochs (0.001 to {short(ends[1]['epochs'][1])}) for repetition of ar",
    ]
    assert records[-1]["outside"] == words
    assert lines[-1].endswith(f"; outside the range of the runs: {', '.join(words)}")


@pytest.mark.parametrize(
    "filters, names",
    [
        ((["variant=mdm", "set=validation"], ["variant=ar", "set=validation"]), (" (variant=mdm)", " (variant=ar)")),
        ((["variant=mdm"], []), (" (variant=mdm)", "")),
        ((["variant=mdm"], ["variant=mdm"]), ("", " (other/fit.json:repetition)")),
    ],
)
def test_laws_of_one_table_are_named_by_what_distinguishes_them(filters, names):
    form = FORMS["repetition"]
    shared = {"table": "results.csv", "file": "other/fit.json:repetition"}
    notes = [{**shared, "filters": conditions} for conditions in filters]
    laws = [
        Law(form, form.internal({**form.published, "B": constant}), notes=note)
        for constant, note in zip((2000.0, 2100.0), notes)
    ]
    question = answers(laws[0], [1e8], [], laws[1])[1][-1]["question"]
    assert question == " overtakes ".join(f"repetition of results.csv{name}" for name in names)


def test_equal_losses_have_no_r2(tmp_path):
    table = synthetic("chinchilla")
    equal = study(
        FORMS["chinchilla"], replace(table, loss=np.full(len(table), 3.0)), {"alpha": 0.3, "beta": 0.3}, resamples=0
    )
    assert equal.r2 is None and "R2 -" in str(equal) and comparison_table(comparison([equal]))
    assert json.dumps(equal.to_json(), allow_nan=False)


def test_a_fit_that_diverged_gives_no_law(tmp_path):
    base = {name: PLANTED["chinchilla"][name] for name in FORMS["repetition"].base}
    diverged = study(FORMS["repetition"], synthetic("chinchilla", 2), base, resamples=0)
    write_json(tmp_path / "fit.json", {"fits": [diverged.to_json()]})
    with pytest.raises(ConfigurationError, match="the fit of repetition diverged and gives no law"):
        load_law(tmp_path / "fit.json")


@pytest.mark.slow
def test_the_command_of_a_second_law(fitted):
    """A frozen base, plots of a fit that diverged, and critical compute, from the command line."""
    folder = fitted[0]
    other = f"{folder / 'fits' / 'fit.json'}:chinchilla"
    for planted, name in (("repetition", "based"), ("chinchilla", "diverged")):
        table = write(folder / f"{planted}.csv", synthetic(planted, 2))
        base = other
        if planted == "chinchilla":
            base = folder / "base.json"
            law = Law(FORMS["chinchilla"], FORMS["chinchilla"].internal(PLANTED["chinchilla"]))
            write_json(base, {"fits": [{"form": "chinchilla", "law": law.to_json()}]})
        output = tool(
            *(table, *COLUMNS, "--form", "repetition", "--bootstrap", 0, "--output", folder / name, "--base", base),
            *("--unique-tokens", "50M", "--critical-compute-against", other),
        )
        assert f"base: frozen, {base} (chinchilla, " in output
        assert ("overtakes chinchilla of " in output) == (name == "based")
        assert ("repetition answers nothing: it diverged" in output) == (name == "diverged")
        assert (folder / name / "repetition_curves.png").exists() == (name == "based")
        assert (folder / name / "repetition_profiles.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--form", "overfiting"], "error: --form overfiting: no such form; did you mean overfitting?"),
        (
            ["--form", "repetition", "--freeze", "RD*=3"],
            "error: --freeze RD*=3: no parameter of repetition; did you mean",
        ),
        (["--form", "repetition", "--freeze", "R_D*"], "error: --freeze R_D*: must be NAME=VALUE with a number"),
        (
            ["--form", "geometric", "--base", "published"],
            "error: --base published: Prabhudesai et al. 2507.15857 prints",
        ),
        (["--form", "chinchilla", "--base", "published"], "error: --base published: chinchilla has no base; leave out"),
        (["--form", "repetition", "--base", "none.json"], "error: none.json: not a fit of tools/fit_scaling_laws.py"),
        (["--form", "quokka", "--where", "unique<3e7"], "and beta, m of quokka describe several budgets"),
        (["--form", "quokka", "--where", "total<6e7"], "cannot determine the 10 parameters of quokka"),
        (
            ["--form", "chinchilla", "--flops", "1e19"],
            "error: --flops and --critical-compute-against: need a data budget",
        ),
        (["--form", "chinchilla", "--unique-tokens", "1M", "--flops", "100"], "error: --flops 100: the smallest model"),
        (["--form", "chinchilla", "--level", "95"], "error: --level 95.0: must be between 0 and 1"),
        (["--form", "chinchilla", "--bootstrap", "9"], "error: --bootstrap 9: must be 0 (none) or at least 100"),
        (["--form", "chinchilla", "--unique-tokens", "x"], "error: --unique-tokens x: must be a positive number"),
        (["--form", "chinchilla", "--columns", "loss=los"], "los"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    """The tool's own function, in this process: starting Python 13 times would take longer than the tests."""
    table = write(tmp_path / "runs.csv", synthetic("overfitting-linear"))
    columns = [] if "--columns" in arguments else COLUMNS
    monkeypatch.setattr(sys, "argv", ["tool", str(table), *columns, "--output", str(tmp_path / "out"), *arguments])
    import tools.fit_scaling_laws as module

    with pytest.raises(SystemExit) as error:
        module.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
    assert error.value.code == 2 and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "output, message", [("out", "none.csv: cannot be read"), ("file", "--output {}/file: cannot be written to")]
)
def test_a_missing_table_and_a_folder_that_is_a_file_are_refused(output, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / "none.csv"), "--form", "chinchilla", "--output", str(tmp_path / output)]
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    import tools.fit_scaling_laws as module

    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2 and message.format(tmp_path) in capsys.readouterr().err


def test_a_frozen_parameter_goes_to_the_forms_that_have_it():
    chosen = requests("chinchilla,repetition", ["R_N*=5.3", "E=1.8"], "published")
    assert chosen[0].frozen == {"E": 1.8} and chosen[0].base == ""
    published = FORMS["repetition"].published
    assert chosen[1].frozen == {name: published[name] for name in FORMS["repetition"].base} | {"R_N*": 5.3, "E": 1.8}
    assert "E 1.869" not in chosen[1].base and "beta 0.3527" in chosen[1].base  # the frozen value is not the base's
