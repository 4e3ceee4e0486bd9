"""Records of finished runs in one file, without their checkpoints: to commit them, or to go on elsewhere.

A line is a run, {"id": ..., "config": ..., "records": [...]}: its config.json, with paths relative to the sweep folder,
and the lines of its metrics.jsonl. A run folder made from it counts as finished, so the sweep does not train it again.
"""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.config.sections import Config, DataConfig
from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point, replace_file, unique_runs
from megatron.sweeps.run_costs import exist
from megatron.sweeps.states import lock_holder, run_state
from megatron.training.datasets import open_sources
from megatron.training.run_folder import read_records, recorded_config, writing

REASON = "records of an archive, without checkpoints"


def write_archive(path: Path, folder: Path, points: Sequence[Point]) -> int:
    """Write the records of all finished runs of a sweep, in the order of its points, and return their number.

    Raises: ConfigurationError where no run has finished; OSError where the file cannot be written.
    """
    lines = []
    for point in tqdm(unique_runs(points), desc="archive", disable=None, leave=False):
        run = point.folder(folder)
        config = recorded_config(run)
        if config is None or run_state(run).name != "finished":
            continue
        config = _relative(config, folder)
        config["checkpoint"]["save"] = None
        config["command"] = f"{point.script} {shlex.join(point.arguments)}"
        line = {"id": point.id, "config": config, "records": read_records(run)}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    if not lines:
        raise ConfigurationError(f"{folder}: no run has finished yet; see tools/sweep.py status")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(lines))
    return len(lines)


def _relative(value: Any, folder: Path) -> Any:
    """Return a value of config.json whose paths in `folder`, of trunks and teachers, are relative to it."""
    if isinstance(value, dict):
        return {name: _relative(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    if isinstance(value, str):
        return value.removeprefix(f"{folder.resolve()}/").removeprefix(f"{folder}/")
    return value


def restore(path: Path, folder: Path, points: Sequence[Point]) -> tuple[int, int]:
    """Make a run folder of each archived run of `points` that has none; a run that starts now has locked its folder.

    Returns the number of runs made, and that of runs left out, whose corpus differs from the one on this machine.

    Raises: ConfigurationError where the file is missing or damaged; nothing is made then.
    """
    runs = {point.id: point.folder(folder) for point in points}
    wanted = {id: run for id, run in runs.items() if not (run / "config.json").exists() and not lock_holder(run)}
    lines = [line for line in _read(path) if line["id"] in wanted]
    same = _of_this_corpus(lines)
    for line in same:
        _make_run(wanted[line["id"]], line)
    return len(same), len(lines) - len(same)


def _of_this_corpus(lines: Sequence[dict]) -> list[dict]:
    """Return the lines whose corpus is that on this machine, or is not on it."""
    hashes: dict[DataConfig, str | None] = {}
    same = []
    for line in lines:
        config = Config.from_recorded(line["config"])
        if config.data not in hashes:
            hashes[config.data] = open_sources(config).corpus_hash if exist(config.data) else None
        if hashes[config.data] in (None, line["config"]["corpus_hash"]):
            same.append(line)
    return same


def _read(path: Path) -> list[dict]:
    """Return the checked lines of an archive."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); name a file of tools/sweep.py archive") from None
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            if not (isinstance(line["config"], dict) and all("iteration" in record for record in line["records"])):
                raise ValueError("no configuration or a record without a step")
            str.encode(line["id"] + line["config"]["corpus_hash"])
            line["records"][-1]["consumed_samples"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigurationError(
                f"{path}: line {number} is damaged ({error}); name a file of tools/sweep.py archive"
            ) from None
        lines.append(line)
    return lines


def _make_run(run: Path, line: dict) -> None:
    """Make a run folder under a temporary name, and rename it."""
    partial = run.with_name(f"{run.name}.{os.getpid()}.partial")
    with writing(run):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        last = line["records"][-1]
        progress = {name: last[name] for name in ("iteration", "consumed_samples")}
        status = {"state": "finished", "reason": REASON, **progress}
        replace_file(partial / "config.json", json.dumps(line["config"], indent=1))
        replace_file(partial / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in line["records"]))
        replace_file(partial / "status.json", json.dumps(status, indent=1))
        shutil.rmtree(run, ignore_errors=True)  # a folder without a configuration: its run never started
        partial.replace(run)
