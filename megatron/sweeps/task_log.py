"""The starts and the failures of a task of a job array, which bound its requeues.

SWEEP/logs/ID.starts.jsonl    a line per start, with the furthest step of the run so far
SWEEP/logs/ID.failures.jsonl  a line per failure, with the nodes that it may be due to

SLURM's own count of restarts stands in for lines that could not be written: a full disk neither keeps a task from its
requeue nor lets it be requeued for ever.
"""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.sweeps.states import last_record
from megatron.training.checkpoint_store import CheckpointStore

logger = logging.getLogger(__name__)


class TaskLog:
    """The lines of one task about the run of one point."""

    def __init__(self, sweep: Path, point_id: str, *, task: str, restarts: int):
        """`task` is JOB_TASK, as scontrol takes it; `restarts` is SLURM's count of the starts before this one."""
        self.run, self.task, self.restarts = sweep / "runs" / point_id, task, restarts
        self._starts = sweep / "logs" / f"{point_id}.starts.jsonl"
        self._failures = sweep / "logs" / f"{point_id}.failures.jsonl"

    def start(self) -> int:
        """Note this start; return how many starts before it brought neither a record nor a checkpoint.

        Only those since the last progress count, without starts that waited for another process. Starts that could
        not be noted count.
        """
        step = furthest_step(self.run)
        lines, missing = self._append(self._starts, event="start", iteration=step)
        steps: dict[int, int] = {}  # of the run, by the restart that began there
        for line in lines:
            if line["event"] == "start":
                steps[line["restart"]] = line["iteration"]
            elif line["event"] == "wait":
                steps.pop(line["restart"], None)
            else:
                steps = {}
        steps.pop(self.restarts, None)
        earlier = list(steps.values())
        furthest = max([step, *earlier])
        since = earlier.index(furthest) if furthest in earlier else len(earlier)
        return len(earlier) - since + missing

    def wait(self) -> None:
        """Note that this start has only waited for another process that trains the run."""
        self._append(self._starts, event="wait")

    def stop(self) -> None:
        """Note that this start was the last one: one that a person requests counts from zero again."""
        self._append(self._starts, event="stop")

    def failure(self, *, nodes: str, failing: list[str], code: int) -> tuple[int, list[str]]:
        """Note a failure on `nodes` with an exit code; return how many this task has had, and on which nodes.

        `failing` are the nodes that this one may be due to. Starts since the last failure that could be noted count as
        failures where this one cannot be.
        """
        lines, missing = self._append(self._failures, nodes=nodes, failing=failing, code=code)
        return len(lines) + missing, sorted({node for line in lines for node in line["failing"]})

    def _append(self, path: Path, **values: Any) -> tuple[list[dict], int]:
        """Append a line; return all lines of this task and how many of its starts may be missing before the new one.

        None is missing if the line could be written.
        """
        new = {"time": time.time(), "job": self.task, "restart": self.restarts, **values}
        text, missing = "", 0
        with suppress(OSError):
            text = path.read_text(errors="replace")
        lines = [line for line in map(_parsed, text.splitlines()) if line.keys() >= new.keys() - {"iteration"}]
        lines = [line for line in lines if line["job"] == self.task]
        try:
            with open(path, "a") as file:
                file.write(("" if text.endswith("\n") or not text else "\n") + json.dumps(new) + "\n")
        except OSError as error:
            logger.warning("%s: could not be written (%s)", path, error.strerror)
            missing = self.restarts - max((line["restart"] for line in lines), default=-1) - 1
        return [*lines, new], max(missing, 0)


def furthest_step(run: Path) -> int:
    """Return the last step that a run has a record or a checkpoint of; 0 without any."""
    checkpoints = CheckpointStore.of_run(run).complete()
    saved = int(checkpoints[-1].name.removeprefix("iter_")) if checkpoints else 0
    return max(saved, last_record(run).get("iteration", 0))


def _parsed(line: str) -> dict:
    """Return the content of a line, {} for one that is torn."""
    with suppress(ValueError):
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    return {}
