#!/usr/bin/env python3
"""Measure what a setting costs on one device: speed, peak memory, time of the first step.

    python benchmarks/settings/run.py --output settings.jsonl
    python benchmarks/settings/run.py --sets layouts fp8 memory --only "*recompute*" --output settings.jsonl

Every setting trains the same number of tokens per step on random text, after warm-up steps; the first one compiles.
Sets: "settings" (compilation, micro-batch size, dropout, attention masks, optimizer, --deterministic) and "layouts" at
--model-size, "fp8" against bf16 at --large-model-size, and "memory" of --memory-sizes in micro-batches of 16 samples.
Every setting is written to --output as a line of JSON as soon as it ends; those that the file has already are left out,
so that the same command continues. Settings run once, one after the other: differences below 2% mean little.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported; spinning threads slow a busy CPU down

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import (
    append_line,
    chosen_device,
    device_flag,
    environment,
    kernel_choices_restored,
    output_flag,
    read_lines,
    read_options,
    require_positive,
)
from benchmarks.layouts.run import layouts
from megatron.config.flags import flag
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import destroy_parallel
from megatron.training.command_line import parse
from megatron.training.step_benchmark import WARM_UP, attempt

PLAIN = "--objective mdm --compile"
SETTINGS = (
    PLAIN,
    "--objective ar --compile",
    f"{PLAIN} --micro-batch-size 16",
    "--objective mdm --no-compile",
    f"{PLAIN} --hidden-dropout 0.1 --mlp-dropout 0.1",
    f"{PLAIN} --attention-dropout 0.1",
    "--objective block-diffusion --compile",
    "--objective block-diffusion --no-compile",
    "--objective ar --compile --reset-attention-mask",
    f"{PLAIN} --micro-batch-size 32",
    f"{PLAIN} --optimizer muon",
    f"{PLAIN} --deterministic",
)
FP8 = (PLAIN, f"{PLAIN} --fp8-recipe tensorwise", f"{PLAIN} --fp8-recipe rowwise")
MEMORY_BATCH = "--micro-batch-size 16 --global-batch-size 16"
SETS = ("settings", "layouts", "fp8", "memory")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    sets: tuple[str, ...] = flag(("settings",), f"what to measure: {', '.join(SETS)}", choices=SETS)
    only: tuple[str, ...] = flag((), "settings to measure, flags with wildcards", metavar="PATTERN")
    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    large_model_size: str = flag("1018M", "a size of the ladder, for fp8", metavar="NAME")
    memory_sizes: tuple[str, ...] = flag(("140M", "425M", "1018M", "2283M"), "sizes of the ladder", metavar="NAME")
    vocab_size: int = flag(GPT2_VOCABULARY, "vocabulary size of the tokenizer")
    seq_length: int = flag(2048, "tokens per sample")
    micro_batch_size: int = flag(8, "samples per micro-batch, unless a setting has its own")
    samples: int = flag(64, "samples per step")
    steps: int = flag(5, f"timed steps, after {WARM_UP} warm-up steps")
    time_limit: float | None = flag(None, "seconds after which no other setting begins", metavar="SECONDS")
    device: str | None = device_flag()
    output: str | None = output_flag("also append a line of JSON per setting to a file")

    def __post_init__(self):
        require_positive(self, ("vocab_size", "seq_length", "micro_batch_size", "samples", "steps"))


def main() -> None:
    """Run the benchmark from the command line."""
    start = time.monotonic()
    options = read_options(Options, __doc__)
    device = chosen_device(options)
    finished = {(line.get("set"), line.get("flags")) for line in read_lines(Path(options.output or "/dev/null"))}
    append_line({"environment": environment(device, "torchao")}, options.output)
    for name, flags in listed(options, device):
        if (name, flags) in finished:
            continue
        if options.time_limit is not None and time.monotonic() - start > options.time_limit:
            print(f"{name} {flags}: not measured, time limit")
            continue
        record = {"set": name, "flags": flags} | measure(options, flags)
        append_line(record, options.output)
        print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
    destroy_parallel()


def listed(options: Options, device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield set and flags of every setting that the flags select; every line of flags is complete."""
    batch = f"--micro-batch-size {options.micro_batch_size}", f"--global-batch-size {options.samples}"
    sets = {
        "settings": [(options.model_size, flags) for flags in SETTINGS],
        "layouts": [(options.model_size, f"--objective mdm {flags}") for flags in layouts(1, device.type == "cuda")],
        "fp8": [(options.large_model_size, flags) for flags in FP8],
        "memory": [(size, f"--objective mdm --no-compile {MEMORY_BATCH}") for size in options.memory_sizes],
    }
    for name in options.sets:
        for size, flags in sets[name]:
            others = [words for words in batch if words.split()[0] not in flags.split()]
            flags = " ".join([f"--model-size {size} {flags}", *others])
            if not options.only or any(fnmatchcase(flags, pattern) for pattern in options.only):
                yield name, flags


def measure(options: Options, flags: str) -> dict:
    """Return the measurements of a setting, or why it failed."""
    try:
        config = parse("ar", f"{flags} --seq-length {options.seq_length} --train-iters 1".split())
        with kernel_choices_restored():
            trial = attempt(config, Vocabulary(options.vocab_size), options.steps)
    except ConfigurationError as error:
        return {"failed": str(error)}
    except Exception as error:  # of a compiler or a kernel; the other settings are measured
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return {"failed": trial} if isinstance(trial, str) else asdict(trial)


if __name__ == "__main__":
    main()
