"""The tables of results that are computed from committed records: the documented command prints them."""

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
PAGES = [ROOT / "results" / "techniques.md"]
# a command, then what it prints: a table, or a block of text
BLOCK = r"^```bash\npython (tools/(?:\\\n|.)*?)\n```\n\n(?:```\n(.*?)```|(.*?)(?=^[^|]|\Z))"
TABLES = [
    (command.replace("\\\n", " "), text or table)
    for page in PAGES
    for command, text, table in re.findall(BLOCK, page.read_text(), re.M | re.S)
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
    (data,) = json.loads(path.read_text())["sets"].values()
    assert data["windows"] == 32
    rows = [line.strip("| ").split(" | ") for line in LIKELIHOODS.with_suffix(".md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == path.stem.replace("_", " ") and len(row) == 6]
    assert [row[1] for row in rows] == [result["name"] for result in data["likelihoods"]]
    for (_, _, loss, _, passes, _), result in zip(rows, data["likelihoods"], strict=True):
        sign = {"exact": "", "upper": "<= ", "lower": ">= "}[result["kind"]]
        assert loss == f"{sign}{result['loss']:.4g} ± {result['data_se']:.2g}" and int(passes) == result["passes"]


@pytest.mark.parametrize("path", sorted((LIKELIHOODS / "paired").glob("*.json")), ids=lambda path: path.stem)
def test_paired_differences_are_those_of_the_records(path):
    """The losses are also those of the first table."""
    record, first = (json.loads((path.parent / name).read_text()) for name in (path.name, "ar.json"))
    (data,), (baseline,) = record["sets"].values(), first["sets"].values()
    (earlier,) = json.loads((LIKELIHOODS / path.name).read_text())["sets"].values()
    losses = {result["name"]: result["loss"] for result in earlier["likelihoods"]}
    assert data["documents"] == baseline["documents"]
    tokens, (exact,) = np.array(data["documents"]["tokens"]), baseline["likelihoods"]
    rows = [line.strip("| ").split(" | ") for line in LIKELIHOODS.with_suffix(".md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == path.stem.replace("_", " ") and len(row) == 3]
    for row, result in zip(rows, data["likelihoods"] if path.stem != "ar" else [], strict=True):
        assert result["loss"] == pytest.approx(losses[result["name"]], rel=1e-6)
        difference = paired_difference(np.array([result["nats"]]), np.array([exact["nats"]]), tokens)
        assert row[1:] == [result["name"], f"{difference.value:+.3g} ± {difference.standard_error:.2g}"]
