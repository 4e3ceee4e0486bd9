#!/usr/bin/env python3
"""Measure how the cost of a token grows with the model, the sequence and the processes.

    python benchmarks/growth.py
    python benchmarks/growth.py --model-sizes 140M 425M 1018M --seq-lengths 1024 2048 4096 --tokens 32768    # a GPU
    torchrun --standalone --nproc-per-node 2 benchmarks/growth.py --seq-lengths 512 --output growth_2.json

Every step has the same number of tokens in a process. Beside the time of a token stands what its FLOPs make one
expect: the time of the first row, times the ratio of FLOPs. Small networks and short sequences cost more than that:
what is not a matrix product, and matrices too small for the machine. Times are of the wall, medians of single steps.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import version
from benchmarks.options import read_options, refuse
from megatron.config.flags import flag, require
from megatron.config.sections import Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, flops_per_token
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.environment import choose_precision, device_name
from megatron.training.step_benchmark import Trial, attempt


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained."""

    objective: str = flag("mdm", "what is trained", choices=("ar", "mdm"))
    model_sizes: tuple[str, ...] = flag(("7M", "20M", "44M"), "sizes of the ladder", metavar="NAME")
    seq_lengths: tuple[int, ...] = flag((256, 1024, 4096), "tokens of a sample, for the first size", metavar="N")
    tokens: int = flag(4096, "tokens of a step and process")
    steps: int = flag(5, "steps that are timed")
    compile: bool = flag(False, "compile the blocks")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        for length in self.seq_lengths:
            require(
                length >= 1 and self.tokens % length == 0, "seq_lengths", length, f"must divide --tokens {self.tokens}"
            )


def main() -> None:
    options = read_options(Options, __doc__)
    ranks = initialize_parallel()
    try:
        cases = [(size, options.seq_lengths[0]) for size in options.model_sizes]
        cases += [(options.model_sizes[0], length) for length in options.seq_lengths[1:]]
        rows = []
        for size, length in cases:
            rows.append(measure(options, size, length, ranks.size))
            if ranks.rank == 0:
                print(f"{size} at {length}: {json.dumps(rows[-1])}", file=sys.stderr)
        config = parse(options.objective, ["--model-size", options.model_sizes[0]])
        report = {
            "settings": asdict(options),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "machine": device_name(ranks.device),
            "precision": choose_precision(config, ranks.device),
            "processes": ranks.size,
            "date": date.today().isoformat(),
            "rows": rows,
        }
        if ranks.rank == 0:
            print_report(report)
            if options.output:
                Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    except ConfigurationError as error:
        refuse(error)
    finally:
        destroy_parallel()


def measure(options: Options, size: str, length: int, ranks: int) -> dict:
    samples = options.tokens // length
    flags = f"--model-size {size} --seq-length {length} --micro-batch-size {samples} "
    flags += f"--global-batch-size {samples * ranks} --{'' if options.compile else 'no-'}compile"
    config, vocabulary = parse(options.objective, flags.split()), Vocabulary(GPT2_VOCABULARY)
    found = attempt(config, vocabulary, options.steps)
    row = {"size": size, "seq_length": length, "samples": samples}
    row["flops_per_token"] = flops_per_token(config.model, vocabulary, length)["hardware"]
    return row | (asdict(found) if isinstance(found, Trial) else {"failed": found})


def print_report(report: dict) -> None:
    settings, first = report["settings"], report["rows"][0]
    print(
        f"{report['date']}, {report['machine']} x{report['processes']}, {report['precision']}, "
        f"{settings['objective'].upper()}, torch {report['versions']['torch']}\n"
    )
    print("| size | sequence | samples | tokens/s | times the cost of the first | expected by FLOPs | memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        start = f"| {row['size']} | {row['seq_length']:,} | {row['samples']} | "
        if "failed" in row or "failed" in first:
            print(start + row.get("failed", "") + " | | | |")
            continue
        times = first["tokens_per_second"] / row["tokens_per_second"]
        expected = row["flops_per_token"] / first["flops_per_token"]
        print(
            f"{start}{row['tokens_per_second']:,.0f} | {times:.2f} | {expected:.2f} | {row['memory_bytes'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
