"""Records of tools/likelihoods.py: where they are, as text, and as tables of a report.

RUN/likelihoods/<iteration>.json, or <iteration>.average.json of the averaged weights
"""

from collections.abc import Sequence
from pathlib import Path

from megatron.errors import ConfigurationError
from megatron.reporting.attachments import Table, read_record
from megatron.reporting.runs import Run

FOLDER = "likelihoods"
SIGNS = {"exact": "", "upper": "<= ", "lower": ">= "}
HEADINGS = ("nats per token", "difference", "passes", "seconds")
LEGEND = (
    "±: standard error over documents, of the difference to the first line paired by document; mc: over random orders "
    "or masks.",
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

    Raises: ConfigurationError for a file that is no record.
    """
    tables = []
    for run in runs:
        paths = [path for path in (run.folder / FOLDER).glob("*.json") if path.name.partition(".")[0].isdecimal()]
        for path in sorted(paths, key=lambda path: (int(path.name.partition(".")[0]), path.name)):
            tables += read_record(path, "", "tools/likelihoods.py", lambda record, name=run.name: _tables(record, name))
    return tables


def _tables(record: dict, run: str) -> list[Table]:
    """Return a table for each set of a record."""
    weights = " (averaged weights)" if record["average"] else ""
    return [
        Table(
            title=f"Likelihoods of {run} at step {record['iteration']}{weights}: {name}, {results['windows']} windows",
            headings=("likelihood", *HEADINGS),
            lines=[_cells(result) for result in results["likelihoods"]],
            note=" ".join(LEGEND),
        )
        for name, results in record["sets"].items()
    ]


def table(record: dict) -> str:
    """Return the record as text: one table per set, and a legend of the columns."""
    lines = [f"{record['run']} step {record['iteration']}, {record['objective_name']}"]
    for name, results in record["sets"].items():
        rows = [[f"{name} ({results['windows']} windows)", *HEADINGS], *map(_cells, results["likelihoods"])]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)]
    return "\n".join([*lines, "", *LEGEND])


def _cells(result: dict) -> list[str]:
    """Return the name of a likelihood and its cells under HEADINGS."""
    loss = f"{SIGNS[result['kind']]}{result['loss']:.4f}" + _error(result["data_se"])
    loss += f" (mc {result['mc_se']:.4f})" if result["mc_se"] else ""
    difference = f"{result['difference']:+.4f}" + _error(result["difference_se"])
    return [result["name"], loss, difference, str(result["passes"]), f"{result['seconds']:.1f}"]


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
