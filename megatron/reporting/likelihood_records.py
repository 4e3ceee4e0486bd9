"""Records of tools/likelihoods.py: where they are, as text, and as tables of a report.

RUN/likelihoods/<iteration>.json, or <iteration>.average.json of the averaged weights
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron.config.flags import require
from megatron.errors import ConfigurationError
from megatron.reporting.attachments import Table, read_record
from megatron.reporting.runs import Run
from megatron.statistics import Ratio, paired_difference

FOLDER = "likelihoods"
SIGNS = {"exact": "", "upper": "<= ", "lower": ">= "}
SIDES = {"exact": 0, "upper": 1, "lower": -1}  # of a likelihood: above or below what it bounds
HEADINGS = ("nats per token", "difference", "passes", "seconds")
LEGEND = (
    "±: standard error over documents, of the difference to the first line paired by document, which is left out for "
    "other scored tokens; mc: over random orders or masks.",
    "chain is exact for the policy; mean, iwae and tangent bound are of the mixture over all orders. passes: forward "
    "passes of a window.",
)


def record_path(checkpoint: Path, iteration: int, average: bool) -> Path:
    """Return where the record of a checkpoint of a run folder is.

    Raises: ConfigurationError for a checkpoint elsewhere.
    """
    run = checkpoint.absolute().parents[1]
    if not (run / "config.json").exists():
        raise ConfigurationError(f"{checkpoint}: is in no run folder, which would hold the record; give --json FILE")
    return run / FOLDER / f"{iteration}{'.average' if average else ''}.json"


def likelihood_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table for each validation set of each record in the folders of runs, checkpoints in their order.

    Then, for each set, one of the differences between the records of the same windows.

    Raises: ConfigurationError for a file that is no record.
    """
    tables, records = [], []
    for run in runs:
        paths = [path for path in (run.folder / FOLDER).glob("*.json") if path.name.partition(".")[0].isdecimal()]
        for path in sorted(paths, key=lambda path: (int(path.name.partition(".")[0]), path.name)):
            record = read_likelihoods(path) | {"run": run.name}
            tables += _tables(record)
            records.append(record)
    return tables + (comparisons(records[0], records[1:]) if records else [])


def read_likelihoods(path: Path, flag: str = "") -> dict:
    """Return the record in a file; `flag` names it in errors, if not empty.

    Raises: ConfigurationError for a file that is no record.
    """
    return read_record(path, flag, "tools/likelihoods.py", lambda record: _tables(record) and record)


def _tables(record: dict) -> list[Table]:
    """Return a table for each set of a record."""
    return [
        Table(
            title=f"Likelihoods of {_title(record)}: {name}, {results['windows']} windows",
            headings=("likelihood", *HEADINGS),
            lines=[_cells(result) for result in results["likelihoods"]],
            note=" ".join(LEGEND),
        )
        for name, results in record["sets"].items()
    ]


def comparisons(first: dict, records: Sequence[dict]) -> list[Table]:
    """Return a table for each set of which `records` have the documents and tokens of the `first` record.

    Every likelihood is compared with the first one of the first record. Records without sums by document are left out,
    and likelihoods of other tokens.
    """
    tables = []
    for name, results in first["sets"].items():
        baseline = results["likelihoods"][0]
        same_windows = [record for record in (first, *records) if has_documents(record, name, results)]
        lines = [
            [_title(record), *_cells(result)[:2], _limit(result, baseline, results["documents"])]
            for record in same_windows
            for result in record["sets"][name]["likelihoods"]
            if result["nats"] is not None
        ]
        if len(same_windows) > 1:
            title = f"Likelihoods on the same windows: {name}, {results['windows']} windows"
            headings = ("run", "likelihood", "nats per token", f"difference to {baseline['name']}")
            note = (
                f"±: standard error over documents. Differences are to {_title(first)}, paired by document; <= and >=: "
            )
            note += "limits of the difference, where one side is a bound."
            tables.append(Table(title, headings, lines, note))
    return tables


def has_documents(record: dict, name: str, results: dict) -> bool:
    """Return whether a record has a set of this name, on the documents and tokens of the `results` of another one."""
    other = record["sets"].get(name, {})
    same = all(other.get(key) == results.get(key) for key in ("documents", "scored_tokens"))
    return same and results.get("documents") is not None


def _limit(result: dict, baseline: dict, documents: dict) -> str:
    """Return a difference as text, after the sign that bounds of its sides give it; none where both are of a kind."""
    sides = SIDES[result["kind"]] - SIDES[baseline["kind"]]
    sign = SIGNS["upper" if sides > 0 else "lower" if sides < 0 else "exact"]
    return sign + _difference(difference(result, baseline, documents))


def difference(result: dict, baseline: dict, documents: dict) -> Ratio:
    """Return the loss of a result minus that of a baseline, with its standard error over the same `documents`."""
    nats, other = (np.array(likelihood["nats"])[None] for likelihood in (result, baseline))
    return paired_difference(nats, other, np.array(documents["tokens"]))


def table(record: dict) -> str:
    """Return the record as text: one table per set, and a legend of the columns."""
    lines = [f"{_title(record)}, {record['objective_name']}"]
    for name, results in record["sets"].items():
        lines += _text((f"{name} ({results['windows']} windows)", *HEADINGS), map(_cells, results["likelihoods"]))
    return "\n".join([*lines, "", *LEGEND])


def comparison(record: dict, against: dict) -> str:
    """Return the `comparisons` of a record with the first likelihood of the record `against` as text.

    Raises: ConfigurationError where they have no set with the same documents and tokens.
    """
    tables = comparisons(against, [record])
    message = (
        "has no set of the same scored tokens with sums by document; evaluate both runs on the same windows, with "
        "--eval-alignment common"
    )
    require(bool(tables), "against", _title(against), message)
    lines = [[entry.title, *_text(entry.headings, entry.lines), "", entry.note] for entry in tables]
    return "\n\n".join("\n".join(text) for text in lines)


def _text(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return an empty line, and the lines of a table with columns of equal width."""
    lines = [headings, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["", *("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)]


def _title(record: dict) -> str:
    weights = " (averaged weights)" if record["average"] else ""
    return f"{record['run']} at step {record['iteration']}{weights}"


def _cells(result: dict) -> list[str]:
    """Return the name of a likelihood and its cells under HEADINGS."""
    loss = f"{SIGNS[result['kind']]}{result['loss']:.4f}" + _error(result["data_se"])
    loss += f" (mc {result['mc_se']:.4f})" if result["mc_se"] else ""
    has_difference = result["difference"] is not None
    to_first = _difference(Ratio(result["difference"], result["difference_se"])) if has_difference else ""
    return [result["name"], loss, to_first, str(result["passes"]), f"{result['seconds']:.1f}"]


def _difference(ratio: Ratio) -> str:
    return f"{ratio.value:+.4f}" + _error(ratio.standard_error)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
