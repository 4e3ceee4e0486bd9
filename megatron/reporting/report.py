"""The HTML report that compares runs: tables, paired differences, plots, conclusions and caveats."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from tqdm import tqdm

from megatron.reporting.attachments import Attachments
from megatron.reporting.conclusions import caveats, compare, conclusions, is_source_code
from megatron.reporting.contours import ContourFigure, contour_figures
from megatron.reporting.figures import Figure, report_figures
from megatron.reporting.groups import (
    DETAILED,
    Summary,
    best_by_budget,
    group_runs,
    headline,
    omitted_note,
    summarise,
)
from megatron.reporting.interactive import embed
from megatron.reporting.likelihood_records import likelihood_tables
from megatron.reporting.plots import draw, draw_contours
from megatron.reporting.runs import Run, check_comparable, check_evaluations, distinct_runs

HEADINGS = (
    "run",
    "objective",
    "regularisers",
    "parameters",
    "seeds",
    "best epoch",
    "FLOPs there",
    "validation loss",
    "bits/byte",
    "perplexity",
    "last loss",
    "last - best",
)
PROVENANCE = {"corpus hash": "corpus_hash", "precision": "precision", "device": "device", "commit": "commit"}
BUDGET_HEADINGS = ("method", "unique tokens", "epochs", "best run", "parameters", "at epoch", "validation loss")


@dataclass(frozen=True)
class Report:
    """What is reported besides the runs themselves."""

    title: str = ""  # default: the names of the runs
    tuning: str = "tuning"  # the set on which best points are chosen
    validation: str = "validation"  # the set whose losses are reported
    notes: list[str] = field(default_factory=list)  # further caveats
    attachments: Attachments = field(default_factory=Attachments)  # what other tools computed


def write_report(runs: list[Run], output: Path, report: Report | None = None, progress: bool = False) -> str:
    """Write report.html and its plots into `output`; return the table as plain text.

    Runs of one folder are those of points of a sweep that share it: groups have all of them, counts and lists only the
    first.

    Raises: ConfigurationError where the runs cannot be compared.
    """
    report = report or Report()
    distinct = distinct_runs(runs)
    check_comparable(distinct)
    check_evaluations(distinct, report.tuning, report.validation)
    groups = tqdm(group_runs(runs), desc="best points", disable=not progress, leave=False)
    rows = [summarise(group, report.tuning, report.validation) for group in groups]
    described = headline(rows)
    comparisons = compare(described, all_pairs=len(rows) <= DETAILED)
    figures: list[Figure | ContourFigure] = [*report_figures(rows, report.validation), *contour_figures(rows)]
    figures += report.attachments.figures
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for figure in tqdm(figures, desc="plots", disable=not progress, leave=False):
        if isinstance(figure, ContourFigure):
            draw_contours(figure, output)
        else:
            draw(figure, output)
    lines = conclusions(described, comparisons)
    warnings = [*caveats(rows), *report.notes]
    page = PAGE.render(
        title=report.title or ", ".join(row.name for row in described),
        runs=distinct,
        rows=rows,
        described=described,
        corpus=_corpus(distinct),
        conclusions=lines,
        caveats=warnings,
        best_points=(HEADINGS, [cells(row) for row in rows]),
        budgets=(BUDGET_HEADINGS, [budget_cells(row) for row in best_by_budget(rows)]),
        pairs=[comparison.cells() for comparison in comparisons],
        tuning=report.tuning,
        reported=report.validation,
        omitted=omitted_note(rows),
        provenance=provenance(distinct),
        tables=[*report.attachments.tables, *likelihood_tables(distinct)],
        figures=figures,
        embedded=embed(figures),
    )
    partial = output / "report.html.partial"
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(output / "report.html")
    return "\n".join([text_table(rows), "", *lines, "", *warnings])


def _corpus(runs: Sequence[Run]) -> str:
    """Return what the runs were trained on, as text."""
    unique = [run.config["unique_tokens"] for run in runs]
    budget = f"{unique[0]:,}" if min(unique) == max(unique) else f"{min(unique):,} to {max(unique):,}"
    source = runs[0].config["corpus_source"]
    name = "the source code of Python's standard library" if is_source_code(runs[0]) else source
    return f"{budget} unique tokens of {name}"


def provenance(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what the runs were computed with: the distinct values of all of them, most frequent first."""
    values: dict[str, Counter[str]] = {}
    for run in runs:
        config = run.config
        fields = {name: config[key] for name, key in PROVENANCE.items()} | config["versions"]
        for name, value in fields.items():
            values.setdefault(name, Counter())[str(value)] += 1
    return [(name, ", ".join(value for value, _ in counts.most_common())) for name, counts in values.items()]


def _uncertainty(row: Summary) -> str:
    """Return the errors of the best loss, and the range of its seeds."""
    best = row.best
    errors = f"± {best.data_se:.3f}" if best.data_se else ""
    errors += f" (mc {best.mc_se:.3f})" if best.mc_se else ""
    return errors + (f" [{best.low:.3f}, {best.high:.3f}]" if len(row.group.runs) > 1 else "")


def cells(row: Summary) -> list[str]:
    """Return the cells of a row, in the order of HEADINGS."""
    best, sign = row.best, row.sign
    return [
        row.name,
        row.objective,
        row.regularisers,
        f"{row.group.config['parameters'] / 1e6:.2f}M",
        str(len(row.group.runs)),
        f"{best.epoch:.1f}",
        f"{best.flops:.1e}",
        f"{sign}{best.loss:.3f} {_uncertainty(row)}",
        f"{sign}{best.bits_per_byte:.3f}" if best.bits_per_byte else "-",
        f"{sign}{np.exp(best.loss):.1f}",
        f"{sign}{row.last.loss:.3f}",
        f"{row.gap.nats:+.3f}" + ("" if row.gap.se is None else f" ± {row.gap.se:.3f}"),
    ]


def budget_cells(row: Summary) -> list[str]:
    """Return the cells of the best row of a method and budget, in the order of BUDGET_HEADINGS."""
    return [
        row.group.method,
        f"{row.group.config['unique_tokens']:,}",
        f"{row.group.planned_epochs:g}",
        row.name,
        f"{row.group.config['parameters'] / 1e6:.2f}M",
        f"{row.best.epoch:.1f}",
        f"{row.sign}{row.best.loss:.3f} {_uncertainty(row)}",
    ]


def text_table(rows: Sequence[Summary]) -> str:
    """Return the table as aligned plain text."""
    table = [HEADINGS, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("megatron.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
).get_template("report.html")
