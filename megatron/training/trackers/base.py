"""What every tracker gets and gives."""

import math
from dataclasses import dataclass
from typing import Protocol

from megatron.training.run_folder import RunFolder, read_json, write_json

X_AXES = ("iteration", "consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows."""

    folder: RunFolder | None  # None without --save
    description: dict  # what config.json has
    past_records: list[dict]  # of a resumed run or a branch, up to its checkpoint

    @property
    def name(self) -> str | None:
        """The name of the run folder."""
        return self.folder.path.resolve().name if self.folder else None

    def identity(self, tracker: str) -> dict | None:
        """Return what `save_identity` wrote for a tracker; None at the first start."""
        path = self.folder.path / f"{tracker}.json" if self.folder else None
        return read_json(path) if path and path.exists() else None

    def save_identity(self, tracker: str, value: dict) -> None:
        """Write the id of the run at a tracker to TRACKER.json, by which the next start resumes it.

        Call it last: after a failed start, the next one then starts from scratch.
        """
        if self.folder:
            write_json(self.folder.path / f"{tracker}.json", value)


class Tracker(Protocol):
    """Shows records. Whatever it raises disables it; the run continues."""

    def record(self, record: dict) -> None:
        """Show one record."""
        ...

    def close(self, failed: bool) -> None:
        """Finish the run, which may have failed."""
        ...


def measures(record: dict) -> dict[str, float]:
    """Return the metrics of a record by name, "train/loss" or "valid/<set>/loss", without the x axes."""
    values = {name: value for name, value in record.items() if name not in X_AXES and type(value) in (int, float)}
    if record["kind"] == "train":
        return {f"train/{name}": value for name, value in values.items()}
    values["perplexity"] = math.exp(min(20, record["loss"]))  # an upper bound if the loss is one
    return {f"valid/{record['set']}/{name}": value for name, value in values.items()}


def with_axes(record: dict) -> dict[str, float]:
    """Return the metrics of a record and its x axes, for trackers that plot one against the other."""
    return {name: record[name] for name in X_AXES} | measures(record)
