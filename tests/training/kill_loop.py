"""Kill a training run with SIGKILL at random moments, start it again, compare with an uninterrupted run.

    python tests/training/kill_loop.py --data DIR --moments 20 --output results/kill_loop.jsonl
    python tests/training/kill_loop.py --data DIR --processes 4 --minutes 30 --output results/kill_loop_4.jsonl

DIR is what tools/preprocess_data.py wrote with --tokenizer-type ByteTokenizer. Each line of the output is one
kill: variant, compile on or off, seed of the moment, phase of the run, description of the moment, and the first
record that differs from the uninterrupted run ("none" if all records are bitwise equal and checkpoints and pointers
are the same).

With --processes 4 a run is killed repeatedly, a random rank each time, and resumes in another layout or with another
launcher until it is finished; see `kill_processes`.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.conftest import entry, environment, records
from tests.training import kill_processes
from tests.training.jobs import lines

VARIANTS = {
    "ar": ("ar", []),
    "mdm": ("mdm", []),
    "mdm-dropout": ("mdm", ["--mlp-dropout", "0.2", "--attention-dropout", "0.1"]),
}
PHASES = ("step", "saving", "loading")


def flags(data: Path, compiled: bool) -> list[str]:
    return [
        *"--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --micro-batch-size 8".split(),
        *"--global-batch-size 16 --train-iters 40 --lr 3e-3 --log-interval 1 --bf16".split(),
        *"--eval-interval 10 --save-interval 5 --eval-samples 16 --tokenizer-type ByteTokenizer".split(),
        "--compile" if compiled else "--no-compile",
        *["--train-data-path", f"{data}/train", "--valid-data-path", f"tuning={data}/tuning"],
    ]


def start(objective: str, arguments: list[str], folder: Path) -> subprocess.Popen:
    command = [sys.executable, entry(objective), *arguments, "--save", str(folder)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)


def finish(objective: str, arguments: list[str], folder: Path) -> None:
    if start(objective, arguments, folder).wait():
        raise SystemExit(f"a run in {folder} failed: {(folder / 'status.json').read_text()}")


def wait_until(process: subprocess.Popen, condition) -> bool:
    """Return whether `condition` came true while the process was alive."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def kill(objective: str, arguments: list[str], folder: Path, phase: str, draw: random.Random) -> str:
    """Kill a fresh run in the given phase; return a description of the moment."""
    if phase == "loading":
        process = start(objective, arguments, folder)
        wait_until(process, lambda: any(folder.glob("checkpoints/iter_*0")) and lines(folder) > 12)
        process.kill()
        process.wait()
        before = (folder / "lock").stat().st_mtime_ns
        process = start(objective, arguments, folder)
        wait_until(process, lambda: (folder / "lock").stat().st_mtime_ns != before)
        delay = draw.uniform(0, 0.3)
        moment = f"{delay * 1000:.0f} ms after the lock was taken again"
    elif phase == "saving":
        process, number = start(objective, arguments, folder), draw.randrange(1, 8)
        wait_until(process, lambda: any(folder.glob(f"checkpoints/iter_{5 * number:07d}.partial")))
        delay = draw.uniform(0, 0.02)
        moment = f"{delay * 1000:.1f} ms into saving step {5 * number}"
    else:
        process, number = start(objective, arguments, folder), draw.randrange(1, 40)
        wait_until(process, lambda: lines(folder) >= number)
        delay = draw.uniform(0, 0.05)
        moment = f"{delay * 1000:.0f} ms after record {number}"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        moment += " (had finished)"
    return moment


def first_difference(expected: Path, actual: Path) -> str:
    """Return the first difference between two runs as text, or "none"."""
    left, right = records(expected), records(actual)
    for a, b in zip(left, right):
        if a != b:
            return json.dumps({"expected": a, "found": b})
    if len(left) != len(right):
        return f"{len(left)} records against {len(right)}"
    left, right = checkpoints(expected), checkpoints(actual)
    return "none" if left == right else json.dumps({"expected": left, "found": right})


def checkpoints(folder: Path) -> dict:
    """Return the checkpoints of a run, and its pointers to the newest and the best one."""
    root = folder / "checkpoints"
    pointers = {name: json.loads((root / name).read_text()) for name in ("latest.json", "best.json")}
    return {"checkpoints": sorted(path.name for path in root.glob("iter_*"))} | pointers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, 4), default=1)
    parser.add_argument("--minutes", type=float, default=0, help="start new runs for this long (4 processes)")
    parser.add_argument("--kills", type=int, default=8, help="maximum number of kills per run (4 processes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    def log(line: dict) -> None:
        print(json.dumps(line), flush=True)
        if options.output:
            with open(options.output, "a") as file:
                file.write(json.dumps(line) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        if options.processes > 1:
            faults = kill_processes.loop(options.data, Path(scratch), options.seed, options.minutes, options.kills, log)
        else:
            faults = loop(options.data, Path(scratch), options.seed, options.moments, log)
    raise SystemExit(bool(faults))


def loop(data: Path, scratch: Path, seed: int, moments: int, log) -> int:
    """Return the number of runs that differ from an uninterrupted one."""
    differing, whole = 0, {}
    for moment in range(moments):
        draw = random.Random(seed + moment)
        variant, phase = list(VARIANTS)[moment % 3], PHASES[moment // 3 % 3]
        compiled = moment % 2 == 1
        objective, extra = VARIANTS[variant]
        arguments = flags(data, compiled) + extra
        if (variant, compiled) not in whole:
            whole[variant, compiled] = scratch / f"whole-{variant}-{compiled}"
            finish(objective, arguments, whole[variant, compiled])
        folder = scratch / f"killed-{moment}"
        described = kill(objective, arguments, folder, phase, draw)
        finish(objective, arguments, folder)
        difference = first_difference(whole[variant, compiled], folder)
        differing += difference != "none"
        line = {"variant": variant, "compile": compiled, "seed": seed + moment, "phase": phase}
        log(line | {"moment": described, "first_difference": difference})
    print(f"{moments - differing} of {moments} equal an uninterrupted run")
    return differing


if __name__ == "__main__":
    main()
