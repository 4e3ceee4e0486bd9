#!/usr/bin/env python3
"""Check in one process what must hold on a device before a figure measured on it counts.

    python benchmarks/gpu_checks/run.py --output checks.jsonl               # on the GPU, or on the CPU as a rehearsal
    python benchmarks/gpu_checks/run.py --only "kernels*" "fp32 follows the CPU: *"

Device and precision without flags for them; Triton kernels against plain operators; losses in fp32 against the CPU for
every objective; steps in which the host never waits for the device; runs that resume to the last bit; layouts of one
device; gradients of compiled blocks by parameter. The first line of --output is the environment, every other one a
check, written as soon as it ends. Exit code 1 if a check fails.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; cuBLAS reads it once per process

import logging
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.gpu_checks.checks import Check, CheckError, SkipCheck, checks, run_check
from benchmarks.harness import append_line, chosen_device, device_flag, environment, output_flag, read_options
from megatron.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the checks."""

    only: tuple[str, ...] = flag((), "checks to run, names with wildcards", metavar="PATTERN")
    time_limit: float | None = flag(None, "seconds after which no other check begins", metavar="SECONDS")
    device: str | None = device_flag()
    output: str | None = output_flag("also write a line of JSON per check to a file")


def main() -> None:
    """Run the checks from the command line."""
    start = time.monotonic()
    options = read_options(Options, __doc__)
    device = chosen_device(options)
    selected = select(checks(device), options.only)
    if options.output:
        Path(options.output).unlink(missing_ok=True)
    append_line({"environment": environment(device, "triton")}, options.output)
    logging.disable(logging.INFO)  # of the runs
    outcomes = []
    for check in selected:
        record = {"check": check.name}
        if options.time_limit is not None and time.monotonic() - start > options.time_limit:
            record |= {"outcome": "not run", "reason": "time limit"}
        else:
            record |= attempt(check, device)
        outcomes.append(record["outcome"])
        append_line(record, options.output)
        print(*(f"{key}={value}" for key, value in record.items()), flush=True)
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)))
    sys.exit("failed" in outcomes)


def select(listed: list[Check], patterns: tuple[str, ...]) -> list[Check]:
    """Return the checks that match a pattern, all without patterns."""
    return [check for check in listed if not patterns or any(fnmatchcase(check.name, pattern) for pattern in patterns)]


def attempt(check: Check, device: torch.device) -> dict:
    """Return outcome, seconds and figures of a check, or why it failed; any error is a failure."""
    start = time.monotonic()
    try:
        outcome = {"outcome": "passed", "figures": run_check(check, device)}
    except SkipCheck as reason:
        outcome = {"outcome": "skipped", "reason": str(reason)}
    except CheckError as error:
        outcome = {"outcome": "failed", "reason": str(error)}
    except Exception as error:  # the other checks say more about its cause
        outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return outcome | {"seconds": round(time.monotonic() - start, 2)}


if __name__ == "__main__":
    main()
