"""What every tracker gets and gives."""

import math
from dataclasses import dataclass
from typing import Protocol

from megatron.training.run_folder import RunFolder, read_json, write_json

X_AXES = ("iteration", "consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")
MISSING = "missing_from_iteration"  # in TRACKER.json of a tracker that lacks records


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

    def resume(self, tracker: str, place: dict) -> tuple[dict | None, list[dict]]:
        """Return what `save_identity` wrote for a tracker, and the past records that the tracker lacks.

        `place` is where the records go now, such as the project; values that TRACKER.json lacks, of an older version,
        are taken as equal. Returns None and all past records at the first start and at another place.
        Raises: ConfigurationError if TRACKER.json is not JSON.
        """
        recorded = self._identity(tracker)
        if recorded is None or any(recorded.get(name, value) != value for name, value in place.items()):
            return None, self.past_records
        first = recorded.get(MISSING, math.inf)
        return recorded, [record for record in self.past_records if record["iteration"] >= first]

    def save_identity(self, tracker: str, value: dict) -> None:
        """Write place and id of the run at a tracker to TRACKER.json, by which the next start resumes it.

        Call it last, when the tracker has all past records: a failed start then changes nothing.
        Raises: LockError if another process writes the run.
        """
        if self.folder:
            self.folder.check_lock()
            write_json(self.folder.path / f"{tracker}.json", value)

    def save_missing(self, tracker: str, iteration: int | None = None) -> None:
        """Write to TRACKER.json that a tracker lacks the records from an iteration on, default those after the past.

        The next start sends them. Nothing is written for a tracker that never started, or already lacks records.
        Raises: LockError if another process writes the run; ConfigurationError if TRACKER.json is not JSON.
        """
        recorded = self._identity(tracker)
        if recorded is not None and MISSING not in recorded:
            if iteration is None:
                iteration = self.past_records[-1]["iteration"] + 1 if self.past_records else 0
            self.save_identity(tracker, recorded | {MISSING: iteration})

    def _identity(self, tracker: str) -> dict | None:
        path = self.folder.path / f"{tracker}.json" if self.folder else None
        return read_json(path) if path and path.exists() else None


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
