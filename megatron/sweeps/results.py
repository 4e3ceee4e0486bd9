"""Collects the records of a sweep into one tidy table: a row per validation, all axes as columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point, replacing, text
from megatron.sweeps.states import run_state
from megatron.training.run_folder import read_records, recorded_config

# columns of every table, in this order; then one column per axis and tuned flag, named like the flag
POINT_COLUMNS = ("stage", "variant", "seed", "trial", "id", "state")
RUN_COLUMNS = ("corpus_hash", "vocabulary_size", "eval_seed")  # losses are comparable where these are equal
COST_COLUMNS = ("parameters", "unique_tokens", "train_samples", "world_size")
RECORD_COLUMNS = {
    "set": pa.string(),
    "iteration": pa.int64(),
    "consumed_samples": pa.int64(),
    "consumed_tokens": pa.int64(),
    "epoch": pa.float64(),
    "flops": pa.float64(),
    "seconds": pa.float64(),
    "likelihood": pa.string(),
    "bound": pa.bool_(),
    "alignment": pa.string(),
    "num_mc": pa.int64(),
    "loss": pa.float64(),
    "mc_se": pa.float64(),
    "data_se": pa.float64(),
    "bits_per_byte": pa.float64(),
    "train_loss": pa.float64(),
}


def collect(folder: Path, points: Sequence[Point], progress: bool = False) -> pa.Table:
    """Return the table of all validations of all points; `train_loss` is that of the last training record before.

    A point without any validation yet has no row. Points that share a run have equal rows but for their names.

    Raises: ConfigurationError if no point was validated.
    """
    axes = list(dict.fromkeys(name for point in points for name in {**point.axes, **point.tuned}))
    rows: list[dict[str, Any]] = []
    records_by_run: dict[str, list[dict]] = {}
    states: dict[str, str] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for point in tqdm(points, desc="collect", disable=None if progress else True, leave=False):
        if point.id not in records_by_run:
            records_by_run[point.id] = _validations(point.folder(folder))
            states[point.id] = run_state(point.folder(folder)).name
            conditions[point.id] = _conditions(point.folder(folder))
        named = {name: getattr(point, name) for name in (*POINT_COLUMNS[:-1], *COST_COLUMNS)}
        named |= {"state": states[point.id], **conditions[point.id]}
        named |= dict.fromkeys(axes) | {**point.axes, **point.tuned}
        rows += [named | record for record in records_by_run[point.id]]
    if not rows:
        raise ConfigurationError(f"{folder}: no run was validated yet; see tools/sweep.py status")
    columns = {name: [row[name] for row in rows] for name in (*POINT_COLUMNS, *RUN_COLUMNS, *COST_COLUMNS)}
    arrays = {name: pa.array(values) for name, values in columns.items()}
    arrays |= {name: _column([row[name] for row in rows]) for name in axes}
    arrays |= {name: pa.array([row[name] for row in rows], kind) for name, kind in RECORD_COLUMNS.items()}
    return pa.table(arrays)


def write_table(table: pa.Table, folder: Path) -> list[Path]:
    """Write results.csv and results.parquet atomically; return their paths.

    Raises: OSError where they cannot be written.
    """
    paths = []
    for name, write in (("results.csv", pyarrow.csv.write_csv), ("results.parquet", pyarrow.parquet.write_table)):
        with replacing(folder / name) as file:
            write(table, file)
        paths.append(folder / name)
    return paths


def _conditions(folder: Path) -> dict[str, Any]:
    """Return the RUN_COLUMNS of a run, nulls before its start."""
    config = recorded_config(folder)
    if config is None:
        return dict.fromkeys(RUN_COLUMNS)
    return {name: (config | config["validation"])[name] for name in RUN_COLUMNS}


def _validations(folder: Path) -> list[dict]:
    rows, train_loss = [], None
    for record in read_records(folder):
        if record["kind"] == "train":
            train_loss = record["loss"]
        else:
            rows.append({name: record.get(name) for name in RECORD_COLUMNS} | {"train_loss": train_loss})
    return rows


def _column(values: list) -> pa.Array:
    """Return a column of numbers or booleans if all values are, else of text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool} or kinds <= {int, float}:
        return pa.array([value if value is None or kinds == {bool} else float(value) for value in values])
    return pa.array([None if value is None else text(value) for value in values])
