"""The rows of a table while they are read: quantities next to the file's own columns, conditions, checks."""

import difflib
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from megatron.errors import ConfigurationError
from megatron.laws.base import counted_epochs

# names that a column may have without --columns; the first that the file has is taken. Those of a sweep come first
RECOGNISED = {
    "parameters": ("parameters", "params", "N"),
    "unique_tokens": ("unique_tokens", "U"),
    "tokens": ("consumed_tokens", "tokens", "total_tokens", "D"),
    "epochs": ("epoch", "epochs"),
    "samples": ("consumed_samples",),
    "loss": ("loss", "val_loss"),
    "flops": ("flops",),  # of a sweep: elsewhere the convention is not known
    "run": ("id", "run"),
    "seed": ("seed",),
}
QUANTITIES = ("parameters", "unique_tokens", "tokens", "loss")
# columns that must have a single value, by what they describe
CORPUS = (
    *("corpus", "corpus_hash", "data", "dataset", "train-data-path"),
    *("vocabulary_size", "tokenizer-type", "tokenizer-model"),
)
EVALUATION = (
    *("set", "likelihood", "bound", "alignment", "num_mc", "eval_seed"),
    *("valid-data-path", "eval-samples", "eval-seed", "eval-alignment", "num-mc"),
)
RECIPE = ("variant", "stage", "trial")
# columns of results in a table that is no sweep's: they do not distinguish recipes, nor do columns of dates
RESULTS = re.compile(
    r"(.*_)?(loss|nll|ppl|perplexity|bpb|bits_per_byte|bits_per_token|accuracy|acc|score|seconds|minutes|hours|duration"
    r"|runtime|date|timestamp|started|finished|created|mfu|flops|grad_norm|tokens_per_second|throughput|max_memory)"
    r"(_seconds|_hours|_at|_s|_h)?|(wall|start|end|train|run|elapsed)_?time|time|status|state|host|hostname|notes?|comment",
    re.IGNORECASE,
)
SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
AMOUNT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?) ?([KMBT]?)", re.IGNORECASE)
OPERATORS = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which columns and rows of a table are read."""

    columns: Mapping[str, str] | None = None  # key of RECOGNISED -> name of its column
    where: Sequence[str] = ()  # conditions such as "epochs<=16"; all must hold
    set: str | None = None  # validation set
    at: str = "last"  # the validation that stands for a run: its "last" or its "best"
    best_on: str | None = None  # set that chooses the best validation, and the best run; by default `set`
    mixed: Sequence[str] = ()  # columns of CORPUS, EVALUATION or RECIPE that may have several values


class Rows:
    """The rows of a table that are still in, with the quantities as arrays next to the file's columns.

    Raises: ConfigurationError if a required quantity has no column, or a column has no numbers.
    """

    def __init__(self, table: pa.Table, source: str, selection: Selection, required: Sequence[str]):
        self.table, self.source, self.selection, self.required = table, source, selection, required
        self.names = table.column_names
        self.index = np.arange(table.num_rows)  # of the rows that are still in
        self.filters: list[str] = []  # what chose them
        self.chosen_on: str | None = None  # the set of the losses that choose
        self.columns = {name: column for name in RECOGNISED if (column := self._column_of(name)) is not None}
        for name in required:
            if name not in self.columns and not (name == "tokens" and "epochs" in self.columns):
                self._refuse_missing(name)
        self.all = {name: self._numbers(name) for name in (*QUANTITIES, "samples", "flops")}
        if "tokens" not in self.columns and "epochs" in self.columns:
            self.all["tokens"] = self._numbers("epochs") * self.all["unique_tokens"]
        with np.errstate(divide="ignore", invalid="ignore"):  # zeros are refused where the quantity is required
            lengths = self.all["tokens"] / self.all["samples"]
            self.sample_tokens = float(lengths[np.isfinite(lengths)].max(initial=0.0))  # of the longest; 0 if not known
            self.all["epochs"] = counted_epochs(self.all["tokens"], self.all["unique_tokens"], self.sample_tokens)

    @property
    def quantities(self) -> dict[str, np.ndarray]:
        """QUANTITIES of the rows that are in. [R]"""
        return {name: self.all[name][self.index] for name in QUANTITIES}

    @property
    def flops(self) -> np.ndarray:
        """Training FLOPs of the rows that are in, NaN where they are not recorded. [R]"""
        return self.all["flops"][self.index]

    @property
    def is_sweep(self) -> bool:
        """Whether the table is that of a collected sweep."""
        return {"variant", "world_size", "set"} <= set(self.names)

    def _column_of(self, name: str) -> str | None:
        """Return the file's column of a quantity: that of --columns, or a recognised one."""
        given = self.selection.columns or {}
        if name in given:
            if given[name] not in self.names:
                raise ConfigurationError(
                    f"--columns {name}={given[name]}: {self.source} has no such column"
                    + (close(given[name], self.names) or f"; it has {', '.join(self.names)}")
                )
            return given[name]
        if (name == "tokens" and "epochs" in given) or (name == "flops" and not self.is_sweep):
            return None
        return next((column for column in RECOGNISED[name] if column in self.names), None)

    def _refuse_missing(self, name: str) -> None:
        words = [word for column in RECOGNISED[name] for word in difflib.get_close_matches(column, self.names, n=1)]
        remedy = f"did you mean --columns {name}={words[0]}?" if words else f"name it: --columns {name}=COLUMN"
        tokens = " (or epochs)" if name == "tokens" else ""
        raise ConfigurationError(
            f"{self.source}: has no column for {name}{tokens} among {', '.join(self.names)}; {remedy}"
        )

    def _numbers(self, name: str) -> np.ndarray:
        """Return a quantity of every row; NaN where the cell is empty or the file has no such column."""
        if name not in self.columns:
            return np.full(self.table.num_rows, np.nan)
        column = self.table[self.columns[name]]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            amounts = [None if cell is None else amount(cell) for cell in column.to_pylist()]
            return np.array([np.nan if amount is None else amount for amount in amounts])
        try:
            return column.cast(pa.float64()).fill_null(np.nan).to_numpy().copy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ConfigurationError(
                f"{self.source}: column {self.columns[name]} has values of type {column.type}; {name} must be numbers"
            ) from None

    def _cells(self, name: str) -> list:
        """Return the cells of a file's column in the rows that are in."""
        return self.table[name].take(self.index).to_pylist()

    # ---------------------------------------------------------------------------------------------- which rows

    def drop_unfinished(self) -> None:
        """Leave out the runs of a sweep that have not finished, unless a condition names the state."""
        if not self.table.num_rows:
            raise ConfigurationError(f"{self.source}: has no row")
        names = {_split(condition)[0] for condition in self.selection.where}
        if "state" not in self.names or "run" not in self.columns or "state" in names:
            return
        finished = np.array([state == "finished" for state in self._cells("state")], bool)
        if not finished.any():
            raise ConfigurationError(
                f"{self.source}: has no finished run; see tools/sweep.py status, or read others: --where state=running"
            )
        unfinished = set(np.array(self._cells(self.columns["run"]), object)[~finished])
        if unfinished:
            self.filters.append(f"state=finished ({len(unfinished)} runs left out)")
        self.index = self.index[finished]

    def filter(self, condition: str) -> None:
        """Keep the rows that satisfy a condition. Empty cells satisfy none but `COLUMN=`.

        Epochs are those of `counted_epochs`.

        Raises: ConfigurationError for a condition that is none, an unknown column and no row left.
        """
        name, symbol, value = _split(condition)
        known = {*self.names, *self.all}
        if name not in known:
            raise ConfigurationError(
                f"--where {condition}: {self.source} has no column {name}"
                + (close(name, known) or f"; it has {', '.join(self.names)}")
            )
        quantity = "epochs" if self.is_sweep and name == "epoch" else name  # a sweep's column is D / U
        cells = self._cells(name) if quantity in self.names else self.all[quantity][self.index].tolist()
        satisfied = _satisfied(cells, symbol, value, condition)
        if not satisfied.any():
            listed = _listed(cells)
            raise ConfigurationError(
                f"--where {condition}: no row of {self.source} is left; {name} is {listed} in the rows before it"
            )
        self.index = self.index[satisfied]
        self.filters.append(condition)

    def keep_one_per_run(self) -> tuple[np.ndarray, np.ndarray]:
        """Keep one validation of each run; return its loss on the set that chooses, and the run's last D. [R], [R]

        Of the points of a sweep that share a run, that counts whose settings most runs have, as seeds of one group.

        Raises: ConfigurationError for numbers that are not positive and finite, sets that the table lacks, and several
        validations of a run without tokens.
        """
        self._check_numbers()
        runs = self._cells(self.columns["run"]) if "run" in self.columns else self.index.tolist()
        sets = self._cells("set") if "set" in self.names else [None] * len(self.index)
        self._check_order(runs, sets)
        name = self._set_name(sets)
        self.chosen_on = chooser = self.selection.best_on or name
        if chooser not in sets:
            self._refuse_set("--best-on", chooser, sets)
        tokens = np.nan_to_num(self.all["tokens"][self.index]).tolist()
        loss = self.all["loss"][self.index].tolist()
        settings = list(map(repr, self.settings()))
        num_runs = Counter(setting for setting, _ in set(zip(settings, runs)))
        validations: dict[Any, dict[float, int]] = {}  # run -> training tokens -> row
        choosing: dict[tuple, float] = {}  # (run, training tokens) -> loss on the set that chooses
        for row, (run, set_of_row) in enumerate(zip(runs, sets)):
            if set_of_row == name:
                other = validations.setdefault(run, {}).setdefault(tokens[row], row)
                if num_runs[settings[row]] > num_runs[settings[other]]:
                    validations[run][tokens[row]] = row
            if set_of_row == chooser:
                choosing.setdefault((run, tokens[row]), loss[row])
        chosen = []
        for run, rows in validations.items():
            last = max(rows)
            best = min(rows, key=lambda progress: choosing.get((run, progress), np.inf))
            progress = best if self.selection.at == "best" else last
            if (run, progress) not in choosing:
                raise ConfigurationError(
                    f"--best-on {chooser}: run {run} of {self.source} has no loss on this set at {progress:.4g} tokens;"
                    " give a set of the same validations"
                )
            chosen.append((rows[progress], choosing[run, progress], rows[last]))
        last_tokens = self.all["tokens"][self.index[[last for _, _, last in chosen]]]
        self.index = self.index[[row for row, _, _ in chosen]]
        self.filters += [f"set={name}"] if name else []
        self.filters += (
            [f"best validation of each run on {chooser or 'its set'}"] if self.selection.at == "best" else []
        )
        return np.array([value for _, value, _ in chosen]), last_tokens

    def _set_name(self, sets: list) -> str | None:
        names = sorted({str(name) for name in sets})
        if self.selection.set is None:
            if len(names) > 1:
                raise ConfigurationError(
                    f"{self.source}: has the validation sets {', '.join(names)}; choose with --set"
                )
            return sets[0]
        if self.selection.set not in sets:
            self._refuse_set("--set", self.selection.set, sets)
        return self.selection.set

    def _refuse_set(self, flag: str, name: str | None, sets: list) -> None:
        known = sorted({set_name for set_name in sets if set_name is not None})
        remedy = close(str(name), known) or (f"; it has {', '.join(known)}" if known else "; it has no column set")
        raise ConfigurationError(f"{flag} {name}: {self.source} has no such validation set in these rows{remedy}")

    # ---------------------------------------------------------------------------------------------- checks

    def _check_numbers(self) -> None:
        """Check that the required quantities are positive and finite."""
        for name in self.required:
            values = self.all[name][self.index]
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                row = int(self.index[bad[0]])
                column = self.columns.get(name, self.columns.get("epochs", ""))
                cell = self.table[column][row].as_py()
                more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
                raise ConfigurationError(
                    f"{self.source}: row {row + 1}: {column} is {'empty or NaN' if cell is None else cell}{more}; "
                    f"{name} must be positive and finite: correct it, or leave the row out with --where"
                )

    def _check_order(self, runs: list, sets: list) -> None:
        """Check that runs with several rows of a set have tokens, which order them."""
        counts = Counter(zip(runs, sets))
        for row in np.flatnonzero(np.isnan(self.all["tokens"][self.index])):
            if (count := counts[runs[row], sets[row]]) > 1:
                raise ConfigurationError(
                    f"{self.source}: run {runs[row]} has {count} rows and no tokens (or epochs), which order its "
                    "validations; name their column: --columns tokens=COLUMN, or give a row per run"
                )

    def check_single_values(self) -> None:
        """Check that the runs share corpus, evaluation and recipe."""
        for names, what in ((CORPUS, "corpora"), (EVALUATION, "evaluations"), (RECIPE, "recipes")):
            for name in names:
                values = self._distinct(name)
                if len(values) > 1 and name not in self.selection.mixed:
                    raise ConfigurationError(
                        f"{self.source}: mixes {what}: {name} is {_listed(self._cells(name))}; choose one with --where "
                        f"'{name}={values[0]}', or allow it with --mixed {name}"
                    )

    def _distinct(self, name: str) -> list[str]:
        cells = self._cells(name) if name in self.names else []
        return sorted({_text(cell) for cell in cells})

    # ---------------------------------------------------------------------------------------------- descriptions

    def shared(self) -> dict[str, Any]:
        """Return the columns of CORPUS, EVALUATION and RECIPE that have one value."""
        names = [name for name in (*CORPUS, *EVALUATION, *RECIPE) if len(self._distinct(name)) == 1]
        return {name: value for name in names if (value := self._cells(name)[0]) is not None}

    def settings(self) -> list[dict[str, Any]]:
        """Return what distinguishes runs but for their seed: variant and flags in a sweep, else the other columns.

        Of the other columns those of results and of dates do not count.
        """
        if self.is_sweep:
            flags = self.names[self.names.index("world_size") + 1 : self.names.index("set")]
            names = ["variant", *flags]
        else:
            taken = {*self.columns.values(), "name", "set"}
            names = [name for name in self.names if name not in taken and not self._is_result(name)]
        cells = [self._cells(name) for name in names]
        return [dict(zip(names, row)) for row in zip(*cells)] if cells else [{} for _ in self.index]

    def _is_result(self, name: str) -> bool:
        """Return whether a column has results or dates by its name or type."""
        return bool(RESULTS.fullmatch(name)) or pa.types.is_temporal(self.table[name].type)

    def notes(self, settings: list[dict[str, Any]], budgets: np.ndarray) -> tuple[str, ...]:
        """Return a note naming the columns that separate runs of different seeds, if no group has two runs."""
        if "seed" not in self.columns or len(np.unique(self.groups(settings, budgets))) < len(settings):
            return ()
        seeds = np.array(list(map(_text, self._cells(self.columns["seed"]))))
        words = []
        for name in settings[0] if settings else ():
            others = [{key: value for key, value in setting.items() if key != name} for setting in settings]
            groups = self.groups(others, budgets)
            if any(len(set(seeds[groups == group])) > 1 for group in np.unique(groups)):
                words.append(name)
        if not words:
            return ()
        return (f"no seeds are grouped: runs differ in {', '.join(words)} too; drop the column if it is a result",)

    def groups(self, settings: list[dict[str, Any]], budgets: np.ndarray) -> np.ndarray:
        """Return a number per run, from sizes, budgets D and settings, if the file has a column of seeds. [R]

        Without one, no run repeats another: all numbers differ.
        """
        if "seed" not in self.columns:
            return np.arange(len(self.index))
        sizes = zip(self.quantities["parameters"], self.quantities["unique_tokens"], budgets)
        keys = [repr((*map(float, size), setting)) for size, setting in zip(sizes, settings)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return np.array([numbers[key] for key in keys])


# -------------------------------------------------------------------------------------------------- cells and words


def open_table(path: Path) -> tuple[pa.Table, str]:
    """Return the table of a file, or of the folder of a sweep, and the path that was read.

    Raises: ConfigurationError if it cannot be read.
    """
    if path.is_dir():
        candidates = [path / "results.parquet", path / "results.csv"]
        existing = [candidate for candidate in candidates if candidate.is_file()]
        if not existing:
            raise ConfigurationError(f"{path}: has no results.csv; run tools/sweep.py collect {path}, or name a table")
        path = existing[0]
    options = pyarrow.csv.ConvertOptions(null_values=["", "NaN", "nan", "null", "None"], strings_can_be_null=True)
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(str(path)), str(path)
        return pyarrow.csv.read_csv(str(path), convert_options=options), str(path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise ConfigurationError(f"{path}: cannot be read ({reason}); name a CSV or Parquet file") from None
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{path}: is no CSV or Parquet table ({reason})") from None


def _split(condition: str) -> tuple[str, str, str]:
    """Return column, operator and value of a condition.

    Raises: ConfigurationError if it has no operator.
    """
    match = re.fullmatch(r"\s*([^=!<>]+?)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*", condition)
    if not match:
        raise ConfigurationError(f"--where {condition}: must be COLUMN, one of = != < <= > >=, and a value")
    return match[1], match[2].replace("==", "="), match[3]


def _satisfied(cells: list, symbol: str, value: str, condition: str) -> np.ndarray:
    """Return which cells satisfy a condition; numbers and amounts such as 300M compare as numbers."""
    present = [cell for cell in cells if cell is not None]
    if not value:
        return np.array([(cell is None) == (symbol == "=") for cell in cells], bool)
    compare = OPERATORS[symbol]
    if present and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in present):
        number = amount(value.removeprefix("-"))
        if number is None:
            raise ConfigurationError(f"--where {condition}: the column has numbers, and {value} is none")
        number = -number if value.startswith("-") else number
        return np.array([cell is not None and compare(cell, number) for cell in cells], bool)
    number = amount(value)
    amounts = [amount(_text(cell)) for cell in present]
    if number is not None and amounts and None not in amounts:
        return np.array([cell is not None and compare(amount(_text(cell)), number) for cell in cells], bool)
    if symbol not in ("=", "!="):
        raise ConfigurationError(f"--where {condition}: the column has text; compare it with = or !=")
    return np.array([cell is not None and compare(_text(cell), value) for cell in cells], bool)


def amount(text: str) -> float | None:
    """Return a number that may end in K, M, B or T, or None if the text is none."""
    match = AMOUNT.fullmatch(text.strip())
    return float(match[1]) * SUFFIXES[match[2].upper()] if match else None


def close(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the known name that is close to an unknown one, or nothing."""
    names = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {names[0]}?" if names else ""


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return str(cell).lower() if isinstance(cell, bool) else f"{cell:g}" if isinstance(cell, float) else str(cell)


def _listed(cells: list) -> str:
    """Return the distinct values of cells as text: up to four, or the range of numbers."""
    values = sorted({cell for cell in cells if cell is not None}, key=lambda cell: (str(type(cell)), cell))
    if len(values) > 4 and all(isinstance(value, int | float) for value in values):
        return f"{_text(values[0])} to {_text(values[-1])}"
    words = [_text(value) for value in values] + ["empty"] * (None in cells)
    return ", ".join(words[:4]) + (", ..." if len(words) > 4 else "")
