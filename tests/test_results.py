"""The tables of results that are computed from committed records: the documented command prints them."""

import csv
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from megatron.statistics import paired_difference

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "results" / "study"
PAGES = [ROOT / "results" / "techniques.md", STUDY.with_suffix(".md")]
# a command, then what it prints: a table, or a block of text
BLOCK = r"^```bash\npython (tools/(?:\\\n|.)*?)\n```\n\n(?:```\n(.*?)```|(.*?)(?=^[^|]|\Z))"
TABLES = [
    (command.replace("\\\n", " "), text or table)
    for page in PAGES
    for command, text, table in re.findall(BLOCK, page.read_text(), re.M | re.S)
    if " results/" in command  # others read runs
]


@pytest.mark.parametrize("command, printed", TABLES, ids=[" ".join(command.split()[:3]) for command, _ in TABLES])
def test_a_table_follows_from_its_records(command, printed, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    try:
        runpy.run_path(sys.argv[0])["main"]()
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out == printed.rstrip() + "\n"


ENSEMBLES = {  # rows of the table: the kind of ensemble, and its members less one
    "last snapshot": ("snapshots", 0),
    "last two snapshots": ("snapshots", 1),
    "last three": ("snapshots", 2),
    "all four": ("snapshots", 3),
    "four seeds of 4 epochs": ("seeds", 3),
    "best two of snapshots and seeds, chosen greedily on the tuning set": ("selected", 1),
}


@pytest.mark.parametrize("members", ENSEMBLES)
def test_the_table_of_ensembles_follows_from_its_records(members):
    kind, index = ENSEMBLES[members]
    records = json.loads((ROOT / "results" / "techniques" / "snapshot_ensembles.json").read_text())[kind]
    losses = [record["ensembles"][index] for record in records]
    row = f"| {members} | {fmean(losses):.4f} ± {stdev(losses) / len(losses) ** 0.5:.4f} |"
    assert len(losses) == 3 and row in PAGES[0].read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_record_has_a_table(page):
    files = {str(path.relative_to(ROOT)) for path in page.with_suffix("").glob("*.csv")}
    assert files <= {word for command, _ in TABLES for word in command.split()}


LIKELIHOODS = ROOT / "results" / "likelihoods"


@pytest.mark.parametrize("path", sorted(LIKELIHOODS.glob("*.json")), ids=lambda path: path.stem)
def test_likelihoods_are_those_of_the_records(path):
    """Differences are paired by document, to the AR run that was trained like it."""
    name = path.stem.replace("_", " ")
    baseline_path = path.with_stem("quickstart_ar" if name.startswith("quickstart") else "ar")
    (data,) = json.loads(path.read_text())["sets"].values()
    (baseline,) = json.loads(baseline_path.read_text())["sets"].values()
    assert data["windows"] == 32 and data["documents"] == baseline["documents"]
    tokens, (exact,) = np.array(data["documents"]["tokens"]), baseline["likelihoods"]
    rows = [line.strip("| ").split(" | ") for line in LIKELIHOODS.with_suffix(".md").read_text().splitlines()]
    rows = [row[1:] for row in rows if row[0] == name and len(row) == 6]
    for row, result in zip(rows, data["likelihoods"], strict=True):
        sign = {"exact": "", "upper": "<= ", "lower": ">= "}[result["kind"]]
        loss = f"{sign}{result['loss']:.4g} ± {result['data_se']:.2g}"
        difference = paired_difference(np.array([result["nats"]]), np.array([exact["nats"]]), tokens)
        paired = "-" if path == baseline_path else f"{difference.value:+.3g} ± {difference.standard_error:.2g}"
        assert row == [result["name"], loss, paired, str(result["passes"]), f"{result['seconds']:.0f}"]


VARIANTS = ("ar_published", "ar", "ar_dropout", "mdm")


def of_study(name: str) -> dict[str, list[dict]]:
    """Return the records of the study's best runs in a folder by variant, in the order of their seeds."""
    return {
        variant: [json.loads((STUDY / name / f"{variant}_{seed}.json").read_text()) for seed in (1, 2, 3)]
        for variant in VARIANTS
    }


def over_seeds(values: list[float], form: str) -> str:
    """Return the mean of values, one for each seed, and its standard error, as a page has them."""
    assert len(values) == 3
    return f"{fmean(values):{form}} ± {stdev(values) / 3**0.5:.3f}"


def test_the_likelihoods_of_the_study_are_those_of_its_records():
    """Differences to AR with dropout are paired by seed, on the same windows."""
    records = {
        variant: [record["sets"]["validation"] for record in runs] for variant, runs in of_study("likelihoods").items()
    }
    assert {data["windows"] for runs in records.values() for data in runs} == {64}
    baseline = [data["likelihoods"][0]["loss"] for data in records["ar_dropout"]]
    lines = []
    for variant, runs in records.items():
        for results in zip(*(data["likelihoods"] for data in runs), strict=True):
            if results[0]["kind"] == "lower":  # no statement at these lengths
                continue
            sign = {"exact": "", "upper": "<= "}[results[0]["kind"]]
            losses = [result["loss"] for result in results]
            difference = over_seeds([loss - exact for loss, exact in zip(losses, baseline, strict=True)], "+.3f")
            difference = "-" if variant == "ar_dropout" else difference
            lines.append(f"| {variant} | {results[0]['name']} | {sign}{over_seeds(losses, '.3f')} | {difference} |")
    assert "\n".join(lines) in PAGES[1].read_text()


def test_the_likelihoods_of_width_256_are_those_of_their_records():
    """Differences to AR with dropout, tuned at this width, are paired by document."""
    records = {path.stem: json.loads(path.read_text()) for path in (STUDY / "likelihoods_width_256").glob("*.json")}
    sets = {name: record["sets"]["validation"] for name, record in records.items()}
    baseline, page = sets["ar_dropout_wide"], PAGES[1].read_text().splitlines()
    tokens, (exact,) = np.array(baseline["documents"]["tokens"]), baseline["likelihoods"]
    assert set(sets) == {*VARIANTS, "ar_dropout_wide"}
    for name, data in sets.items():
        assert data["windows"] == 64 and data["documents"] == baseline["documents"]
        for result in data["likelihoods"]:
            if result["kind"] == "lower":  # the tangent bound, which says nothing
                continue
            paired = paired_difference(np.array([result["nats"]]), np.array([exact["nats"]]), tokens)
            difference = "-" if name == "ar_dropout_wide" else f"{paired.value:+.3f} ± {paired.standard_error:.3f}"
            loss = f"{'<= ' * (result['kind'] == 'upper')}{result['loss']:.3f} ± {result['data_se']:.3f}"
            assert f"| {name}, width 256 | {result['name']} | {loss} | {difference} |" in page


@pytest.mark.parametrize("path", sorted((STUDY / "ensembles").glob("*.json")), ids=lambda path: path.stem)
def test_the_ensembles_of_the_study_are_those_of_their_records(path):
    data = json.loads(path.read_text())["sets"]["validation"]
    assert len(data["members"]) == 4
    sign = "<= " if data["upper_bound"] else ""
    losses = [fmean(member["loss"] for member in data["members"])]
    losses += [ensemble["loss"] for ensemble in data["ensembles"][1:]]
    gain = "{gain:.3f} ± {gain_se:.3f}".format(**data["ensembles"][-1])
    variant, _, epochs = path.stem.rpartition("_")
    cells = [f"{variant}, {epochs} epochs", *(f"{sign}{loss:.3f}" for loss in losses), gain]
    assert f"| {' | '.join(cells)} |" in PAGES[1].read_text().splitlines()


def test_the_losses_on_other_text_and_the_probes_are_those_of_the_records():
    page = PAGES[1].read_text()
    for variant, runs in of_study("other_text").items():
        sign = "<= " if variant == "mdm" else ""
        assert f"| {variant} | {sign}{over_seeds([run['loss'] for run in runs], '.3f')} |\n" in page
    for variant, runs in of_study("probes").items():
        cells = [over_seeds([run[task] for run in runs], ".3f") for task in ("cloze", "brackets", "indentation")]
        assert f"| {variant} | {' | '.join(cells)} |\n" in page


def test_the_laws_of_the_study_are_those_of_its_records():
    page = PAGES[1].read_text().splitlines()
    for path in sorted((STUDY / "laws").glob("*.json")):
        record = json.loads(path.read_text())
        for fit in record["fits"] if path.stem != "mdm_dropout" else []:
            free = {name: entry for name, entry in fit["parameters"].items() if not entry["frozen"]}
            bounds = {
                name: ["unbounded" if bound is None else f"{bound:.3g}" for bound in entry["bootstrap"]]
                for name, entry in free.items()
            }
            cells = [f"{name} {free[name]['value']:.3g} [{low}, {high}]" for name, (low, high) in bounds.items()]
            quality = f"{fit['r2']:.3f} | {fit['held_out']['errors']['rms']:.2f}"
            assert f"| {path.stem} | {fit['form']} | {quality} | {', '.join(cells)} |" in page
        for answer in record["answers"] if path.stem == "mdm" else []:
            if "overtakes" in answer["question"]:
                compute, (low, high) = answer["answer"]["flops"], answer["answer"]["interval"]
                bound = "beyond the runs" if high is None else f"{high:.2g}"
                assert f"| {answer['unique_tokens']:,.0f} | {compute:.2g} | [{low:.2g}, {bound}] |" in page


@pytest.mark.parametrize("name, table", [("study", "study"), ("study_prose", "prose")])
def test_the_table_of_the_study_is_that_of_its_archive(name, table):
    """The archive, which runs are restored from, and the table, which the page is made from, have the same losses."""
    archived = {
        (run["id"], record["set"], record["iteration"], record["loss"])
        for run in map(json.loads, STUDY.with_name(f"{name}.jsonl").read_text().splitlines())
        for record in run["records"]
        if record["kind"] == "valid"
    }
    with (STUDY / f"{table}.csv").open() as file:
        rows = {(row["id"], row["set"], int(row["iteration"]), float(row["loss"])) for row in csv.DictReader(file)}
    assert rows == archived
