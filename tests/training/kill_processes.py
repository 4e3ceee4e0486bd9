"""kill_loop.py with --processes 4: random ranks of a run are killed repeatedly until it is finished.

Every start has a random layout and launcher: torchrun, or four processes started by hand. A line of the log is one
kill: seed of the run, layout, launcher, rank, moment, phase of the run, whether a line named the rank (in the run's
"error:" or torchrun's summary), seconds until all processes had exited, state in status.json then, the newest
checkpoint before, and the checkpoint from which the next start resumed. The last line of a run has the number of kills
and the largest relative difference of any record from an uninterrupted run.
"""

import random
import re
import signal
import time
from pathlib import Path

from tests.conftest import entry, records
from tests.training.jobs import LAYOUTS, Job, newest

PHASES = ("starting", "loading", "step", "step", "saving", "saving", "leaving")
TOLERANCE = 1e-4
LIMIT = 120.0  # seconds within which a job must end after a kill


def flags(data: Path) -> list[str]:
    return [
        *"--num-layers 4 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --micro-batch-size 2".split(),
        *"--global-batch-size 16 --train-iters 40 --lr 3e-3 --log-interval 1 --fp32 --no-compile".split(),
        *"--eval-interval 10 --save-interval 4 --eval-samples 16 --tokenizer-type ByteTokenizer".split(),
        *"--distributed-timeout-minutes 0.5".split(),
        *["--train-data-path", f"{data}/train", "--valid-data-path", f"tuning={data}/tuning"],
    ]


class Start:
    """One start of a run, and its progress as seen in its files."""

    def __init__(self, arguments: list[str], folder: Path, layout: str, by_hand: bool):
        self.folder = folder
        self.initial = {name: self._written(name) for name in ("lock", "status.json")}
        self.newest = newest(folder)
        command = [*arguments, *LAYOUTS[layout], "--save", str(folder)]
        self.job = Job(command, folder.with_suffix(".log"), by_hand=by_hand)

    def _written(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_mtime_ns if path.exists() else 0

    def has_written(self, name: str) -> bool:
        return self._written(name) != self.initial[name]

    def phase(self) -> str:
        """Return the phase of the run, derived from its lock, status.json and partial checkpoints."""
        if not self.has_written("lock"):
            return "starting"
        if not self.has_written("status.json"):
            return "loading"
        if '"state": "finished"' in (self.folder / "status.json").read_text():
            return "leaving"
        return "saving" if any(self.folder.glob("checkpoints/iter_*.partial")) else "step"

    def kill(self, rank: int, aim: str, draw: random.Random) -> dict | None:
        """Kill `rank` in the phase `aim`, or later if the run has passed it; return None if it has ended."""
        job = self.job
        longest = {"starting": 6.0, "loading": 0.3, "step": 1.5, "saving": 0.03, "leaving": 0.1}[aim]
        saves = draw.randrange(1, 3)
        seen = set()

        def reached() -> bool:
            phase = self.phase()
            if aim == "saving":
                seen.update(path.name for path in self.folder.glob("checkpoints/iter_*.partial"))
                return phase == aim and len(seen) >= saves
            return aim == "starting" or phase == aim

        if not (job.wait_until(lambda: job.pid(rank)) and job.wait_until(reached)):
            return None
        delay = draw.uniform(0, longest)
        time.sleep(delay)
        phase, saved = self.phase(), newest(self.folder)
        if not job.kill(rank, signal.SIGKILL):
            return None
        seconds, codes = job.wait(LIMIT)
        text = job.text()
        patterns = {"the run": rf"error: .*\brank {rank}\b", "torchrun": rf"Root Cause[^=]*rank +: {rank} "}
        by = [name for name, pattern in patterns.items() if re.search(pattern, text)]
        path = self.folder / "status.json"
        state = re.search(r'"state": "(\w+)"', path.read_text())[1] if path.exists() else None
        moment = f"{1000 * delay:.0f} ms after {'the process was there' if aim == 'starting' else aim + ' began'}"
        line = {"rank": rank, "moment": moment, "phase": phase, "seconds": round(seconds, 2), "named_by": by}
        return line | {"codes": codes, "status": state, "saved": saved}

    def resumed_step(self) -> int | None:
        """Return the step of the checkpoint from which this start resumed, or None if it ended before that."""
        text = self.job.text()
        match = re.search(r"continuing from .* at step (\d+)", text)
        return int(match[1]) if match else 0 if "parameters," in text else None


def difference(expected: Path, actual: Path) -> float:
    """Return the largest relative difference of any number in the records; infinite if anything else differs."""
    left, right = records(expected), records(actual)
    largest = 0.0 if len(left) == len(right) else float("inf")
    for a, b in zip(left, right):
        for key in a.keys() | b.keys():
            x, y = a.get(key), b.get(key)
            if x != y:
                numbers = isinstance(x, float) and isinstance(y, float)
                largest = max(largest, abs(x - y) / abs(x) if numbers else float("inf"))
    return largest


def loop(data: Path, scratch: Path, seed: int, minutes: float, kills: int, log) -> int:
    """Kill runs for `minutes`, at least one; return the number of faults."""
    deadline, faults, whole, count = time.monotonic() + 60 * minutes, 0, {}, 0
    while count == 0 or time.monotonic() < deadline:
        draw = random.Random(seed + count)
        objective = ("mdm", "ar")[count % 2]
        arguments = [entry(objective), *flags(data)]
        if objective not in whole:
            whole[objective] = scratch / f"whole-{objective}"
            finish(Start(arguments, whole[objective], "tp2 x pp2", by_hand=False))
        folder = scratch / f"killed-{count}"
        faults += journey(arguments, folder, whole[objective], seed + count, draw, kills, log)
        count += 1
    return faults


def finish(start: Start) -> None:
    _, codes = start.job.wait(300)
    if any(codes):
        raise SystemExit(f"a run failed:\n{start.job.text()[-3000:]}")


def journey(arguments: list[str], folder: Path, whole: Path, seed: int, draw: random.Random, kills: int, log) -> int:
    """Kill a run up to `kills` times, let it finish, and compare it with `whole`; return the number of faults."""
    faults, done, layout = 0, 0, draw.choice(list(LAYOUTS))
    while True:
        layout = draw.choice([layout, *LAYOUTS])  # the previous one more often
        by_hand = draw.random() < 0.3
        rank, aim = draw.randrange(4), draw.choice(PHASES)
        start = Start(arguments, folder, layout, by_hand)
        line = start.kill(rank, aim, draw) if done < kills else None
        if line is None:
            finish(start)
        resumed_step = start.resumed_step()
        lost = resumed_step is not None and resumed_step < start.newest
        faults += lost
        if line is None:
            break
        done += 1
        # a rank that had finished its work does not end other ranks
        faults += not line["named_by"] and line["phase"] != "leaving"
        base = {"seed": seed, "kill": done, "layout": layout, "launcher": "by hand" if by_hand else "torchrun"}
        log(base | line | {"went_on_from": resumed_step, "of": start.newest})
    largest = difference(whole, folder)
    equal = largest <= TOLERANCE
    log({"seed": seed, "kills": done, "difference": largest, "outcome": "equal" if equal else "differs"})
    return faults + (not equal)
