"""Tables of runs for the tests: a collected sweep from records, or any CSV."""

import json
from pathlib import Path

from megatron.sweeps import results
from megatron.sweeps.points import Point


def write_csv(path: Path, text: str) -> Path:
    """Write a table whose cells are separated by blanks in the test, for legibility."""
    path.write_text("\n".join(",".join(line.split()) for line in text.strip().splitlines()) + "\n")
    return path


def point(identity: str, **fields) -> Point:
    """Return a point of a sweep; what a table does not show is arbitrary."""
    defaults = {
        "stage": "main",
        "variant": "ar",
        "axes": {},
        "tuned": {},
        "seed": 1,
        "trial": None,
        "script": "pretrain_gpt.py",
        "arguments": [],
        "nodes": 1,
        "world_size": 1,
        "minutes": None,
        "parameters": 1_000_000,
        "unique_tokens": 1000,
        "train_samples": 100,
        "tokens": 4000,
        "epochs": 4.0,
        "flops": 1e9,
        "memory_bytes": None,
        "disk_bytes": 1,
    }
    return Point(id=identity, **(defaults | fields))


def validations(losses: dict[str, list[float]], unique_tokens: int = 1000, **fields) -> list[dict]:
    """Return validation records of a run: a loss of each set at every epoch from 1."""
    return [
        {
            "kind": "valid",
            "set": name,
            "iteration": epoch,
            "consumed_tokens": epoch * unique_tokens,
            "epoch": float(epoch),
            "likelihood": "ar",
            "bound": False,
            "alignment": "common",
            "num_mc": 1,
            "loss": loss,
            **fields,
        }
        for name, values in losses.items()
        for epoch, loss in enumerate(values, 1)
    ]


def collected_sweep(folder: Path, runs: list[tuple[Point, list[dict]]], state: str = "finished") -> Path:
    """Write run folders of points and records, collect them as tools/sweep.py does, and return the folder."""
    for run, records in runs:
        path = run.folder(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "status.json").write_text(json.dumps({"state": state, "reason": "", "iteration": 1}))
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results.write_table(results.collect(folder, [run for run, _ in runs]), folder)
    return folder
