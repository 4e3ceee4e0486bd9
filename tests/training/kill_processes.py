"""What kill_loop.py does with --processes 4: a run loses a random process again and again, until it is finished.

Every start has a layout and a launcher of its own: torchrun, or four processes started by hand. A line of the log is
one kill: seed of the run, layout, launcher, the rank, the moment and the phase the run was found in, whether a line
named the rank (by the run's "error:" or in torchrun's summary), the seconds until every process had left, what
status.json said then, and the newest checkpoint before and the one the next start went on from. At the end of a run
stands a line with the number of kills and the largest relative difference of any record from an uninterrupted run.
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
LIMIT = 120.0  # seconds in which a job must have ended after a kill


def flags(data: Path) -> list[str]:
    return [
        *"--num-layers 4 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --micro-batch-size 2".split(),
        *"--global-batch-size 16 --train-iters 40 --lr 3e-3 --log-interval 1 --fp32 --no-compile".split(),
        *"--eval-interval 10 --save-interval 4 --eval-samples 16 --tokenizer-type ByteTokenizer".split(),
        *"--distributed-timeout-minutes 0.5".split(),
        *["--train-data-path", f"{data}/train", "--valid-data-path", f"tuning={data}/tuning"],
    ]


class Start:
    """One start of a run, and what can be seen of how far it is."""

    def __init__(self, arguments: list[str], folder: Path, layout: str, by_hand: bool):
        self.folder = folder
        self.began = {name: self._written(name) for name in ("lock", "status.json")}
        self.newest = newest(folder)
        command = [*arguments, *LAYOUTS[layout], "--save", str(folder)]
        self.job = Job(command, folder.with_suffix(".log"), by_hand=by_hand)

    def _written(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_mtime_ns if path.exists() else 0

    def has_written(self, name: str) -> bool:
        return self._written(name) != self.began[name]

    def phase(self) -> str:
        """Return what the run is doing: it takes the lock, loads, says that it runs, and says that it has finished."""
        if not self.has_written("lock"):
            return "starting"
        if not self.has_written("status.json"):
            return "loading"
        if '"state": "finished"' in (self.folder / "status.json").read_text():
            return "leaving"
        return "saving" if any(self.folder.glob("checkpoints/iter_*.partial")) else "step"

    def kill(self, rank: int, aim: str, draw: random.Random) -> dict | None:
        """Kill `rank` in the phase `aim` or, where the run has passed it, later; return None where it had ended."""
        job, longest = self.job, {"starting": 6.0, "loading": 0.3, "step": 1.5, "saving": 0.03, "leaving": 0.1}[aim]
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
        found, saved = self.phase(), newest(self.folder)
        if not job.kill(rank, signal.SIGKILL):
            return None
        seconds, codes = job.wait(LIMIT)
        text = job.text()
        patterns = {"the run": rf"error: .*\brank {rank}\b", "torchrun": rf"Root Cause[^=]*rank +: {rank} "}
        by = [name for name, pattern in patterns.items() if re.search(pattern, text)]
        path = self.folder / "status.json"
        state = re.search(r'"state": "(\w+)"', path.read_text())[1] if path.exists() else None
        moment = f"{1000 * delay:.0f} ms after {'the process was there' if aim == 'starting' else aim + ' began'}"
        line = {"rank": rank, "moment": moment, "phase": found, "seconds": round(seconds, 2), "named_by": by}
        return line | {"codes": codes, "status": state, "saved": saved}

    def went_on_from(self) -> int | None:
        """Return the step of the checkpoint that this start went on from, or None where it did not come so far."""
        text = self.job.text()
        found = re.search(r"continuing from .* at step (\d+)", text)
        return int(found[1]) if found else 0 if "parameters," in text else None


def difference(one: Path, two: Path) -> float:
    """Return the largest relative difference of any number in the records; infinite where other things differ."""
    left, right = records(one), records(two)
    largest = 0.0 if len(left) == len(right) else float("inf")
    for a, b in zip(left, right):
        for key in a.keys() | b.keys():
            x, y = a.get(key), b.get(key)
            if x != y:
                numbers = isinstance(x, float) and isinstance(y, float)
                largest = max(largest, abs(x - y) / abs(x) if numbers else float("inf"))
    return largest


def loop(data: Path, scratch: Path, seed: int, minutes: float, kills: int, log) -> int:
    """Kill one run after another, at least one, and for `minutes`; return the number of faults found."""
    until, faults, whole, count = time.monotonic() + 60 * minutes, 0, {}, 0
    while count == 0 or time.monotonic() < until:
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
    """Kill one run up to `kills` times, let it finish, and compare it with `whole`; return the number of faults."""
    faults, done, layout = 0, 0, draw.choice(list(LAYOUTS))
    while True:
        layout = draw.choice([layout, *LAYOUTS])  # the same one more often than not
        by_hand = draw.random() < 0.3
        rank, aim = draw.randrange(4), draw.choice(PHASES)
        start = Start(arguments, folder, layout, by_hand)
        line = start.kill(rank, aim, draw) if done < kills else None
        if line is None:
            finish(start)
        went_on = start.went_on_from()
        lost = went_on is not None and went_on < start.newest
        faults += lost
        if line is None:
            break
        done += 1
        # a process that had nothing left to do ends nobody
        faults += not line["named_by"] and line["phase"] != "leaving"
        base = {"seed": seed, "kill": done, "layout": layout, "launcher": "by hand" if by_hand else "torchrun"}
        log(base | line | {"went_on_from": went_on, "of": start.newest})
    largest = difference(whole, folder)
    equal = largest <= TOLERANCE
    log({"seed": seed, "kills": done, "difference": largest, "outcome": "equal" if equal else "differs"})
    return faults + (not equal)
