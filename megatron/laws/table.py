"""Reads runs from tables: the results of a sweep, or any CSV or Parquet file with sizes, tokens and losses.

1. Columns of the file become quantities: parameters, unique tokens, training tokens (or epochs) and loss.
2. Conditions (`--where`) choose rows; runs of a sweep that have not finished are left out.
3. Each run has one row: its last validation, or its best one.
4. Runs of different corpora, evaluations or recipes are refused: their losses are not comparable.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import ConfigurationError
from megatron.laws.base import LawTable
from megatron.laws.compute import PLAIN, compute_of
from megatron.laws.rows import QUANTITIES, RECOGNISED, SUFFIXES, Rows, Selection, amount, close, open_table


@dataclass(frozen=True, kw_only=True)
class Runs:
    """R runs that share corpus and evaluation. Quantities that the file lacks are NaN."""

    source: str
    parameters: np.ndarray  # [R]
    unique_tokens: np.ndarray  # [R] of the training set, whether or not the run has read them all
    tokens: np.ndarray  # [R] training tokens at the validation that stands for the run
    last_tokens: np.ndarray  # [R] at its last one
    flops: np.ndarray  # [R] training FLOPs as recorded
    loss: np.ndarray  # [R] nats per token
    selection_loss: np.ndarray  # [R] on the set that chooses the best validation and the best run
    chosen_on: str | None  # that set; None in a table without sets
    sample_tokens: float  # of the longest sample; 0 if not known
    group: np.ndarray  # [R] int; runs that differ in their seed only share a group
    settings: list[dict[str, Any]]  # of each run: variant, axes and tuned flags
    shared: dict[str, Any]  # columns of CORPUS, EVALUATION and RECIPE with the value that all runs share
    filters: tuple[str, ...]  # what chose the rows
    notes: tuple[str, ...] = ()  # on the groups, printed with every result

    def __len__(self) -> int:
        return len(self.loss)


def read_table(path: str | Path, **selection: Any) -> LawTable:
    """Return the runs of a table, as a law is fitted to them; `selection` are fields of `Selection`.

    `path` is a CSV or Parquet file, or the folder of a collected sweep.

    Raises: ConfigurationError for all that `read_runs` refuses, and for runs that differ in loops or passes.
    """
    chosen = Selection(**selection)
    runs = read_runs(path, chosen)
    is_counted = "flops" not in chosen.mixed
    compute = compute_of(runs.parameters, runs.tokens, runs.flops, runs.source) if is_counted else PLAIN
    columns = {name: getattr(runs, name) for name in (*QUANTITIES, "group", "source", "filters", "sample_tokens")}
    return LawTable(**columns, notes=(*runs.notes, *compute.note()), compute=compute)


def read_runs(path: str | Path, selection: Selection, required: Sequence[str] = QUANTITIES) -> Runs:
    """Return one row per run; the quantities in `required` must be there.

    Raises: ConfigurationError for a file that is no table, missing columns, no row, values that are not positive and
    finite, and rows of different corpora, evaluations or recipes.
    """
    table, source = open_table(Path(path))
    rows = Rows(table, source, selection, required)
    rows.drop_unfinished()
    for condition in selection.where:
        rows.filter(condition)
    selection_loss, last_tokens = rows.keep_one_per_run()
    rows.check_single_values()
    settings = rows.settings()
    return Runs(
        source=source,
        **rows.quantities,
        last_tokens=last_tokens,
        flops=rows.flops,
        sample_tokens=rows.sample_tokens,
        selection_loss=selection_loss,
        chosen_on=rows.chosen_on,
        group=rows.groups(settings, last_tokens),
        settings=settings,
        shared=rows.shared(),
        filters=tuple(rows.filters),
        notes=rows.notes(settings, last_tokens),
    )


def parse_amount(text: str, flag: str) -> float:
    """Return a positive number, which may end in K, M, B or T: `100M` is 1e8.

    Raises: ConfigurationError, naming `flag`, for anything else.
    """
    value = amount(text)
    if value is None or not 0 < value < float("inf"):
        raise ConfigurationError(f"{flag} {text}: must be a positive number such as 2.5e9, 2.5B or 100M")
    return value


def short(amount: float) -> str:
    """Return a number of tokens or parameters as people write it: 1e8 is `100M`."""
    amount = float(f"{amount:.4g}")
    for suffix, unit in reversed(SUFFIXES.items()):
        if amount >= unit:
            return f"{amount / unit:.4g}{suffix}"
    return f"{amount:.4g}"


def add_table_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `Selection` to the parser of a tool."""
    group = parser.add_argument_group("which rows of the table")
    group.add_argument(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="columns of a table that is not a sweep's: parameters=params,tokens=total_tokens,loss=val_loss; also "
        "unique_tokens, epochs (in place of tokens), samples (training samples), flops, run (rows of one run are its "
        "validations), seed",
    )
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="only rows that satisfy it: 'variant=ar', 'epochs<=16', 'params>1e8', 'trial=' for empty; repeatable",
    )
    group.add_argument("--set", metavar="SET", help="validation set (needed if the table has several)")
    group.add_argument(
        "--at",
        choices=("last", "best"),
        default="last",
        help="the validation that stands for a run: its last, or its best (default: last)",
    )
    group.add_argument(
        "--best-on", metavar="SET", help="validation set that chooses what is best (default: that of --set)"
    )
    group.add_argument(
        "--mixed",
        action="append",
        default=[],
        metavar="COLUMN",
        help="allow several values of a column that says how a run was trained or evaluated; repeatable",
    )


def selection_from(options: Namespace) -> Selection:
    """Return the selection of parsed flags.

    Raises: ConfigurationError for --columns that does not map known names to columns.
    """
    columns = {}
    for word in options.columns.split(",") if options.columns else ():
        name, equals, column = word.partition("=")
        if not equals or name not in RECOGNISED:
            raise ConfigurationError(
                f"--columns {word}: must be NAME=COLUMN, NAME one of {', '.join(RECOGNISED)}{close(name, RECOGNISED)}"
            )
        columns[name] = column
    return Selection(
        columns=columns or None,
        where=tuple(options.where),
        set=options.set,
        at=options.at,
        best_on=options.best_on,
        mixed=tuple(options.mixed),
    )
