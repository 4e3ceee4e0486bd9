#!/usr/bin/env python3
"""Measure how the cost per token grows with model size, sequence length and number of data-parallel ranks.

    python benchmarks/growth/run.py
    python benchmarks/growth/run.py --model-sizes 140M 425M 1018M --seq-lengths 1024 2048 4096 --tokens 32768    # a GPU
    torchrun --standalone --nproc-per-node 2 benchmarks/growth/run.py --seq-lengths 512 --output growth_2.json

Every step has the same number of tokens per rank. Costs are relative to the first row, and so are the FLOPs in the
column next to them. Small models and short sequences cost more than their FLOPs: operations other than matrix products,
and matrices too small for the machine. Times are medians of single steps in wall-clock time.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import (
    environment,
    markdown_table,
    output_flag,
    publish,
    read_options,
    refuse,
    require_positive,
)
from megatron.config.flags import flag, require
from megatron.config.sizes import GPT2_VOCABULARY, flops_per_token
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.environment import choose_precision
from megatron.training.step_benchmark import Trial, attempt


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    objective: str = flag("mdm", "the training objective", choices=("ar", "mdm"))
    model_sizes: tuple[str, ...] = flag(("7M", "20M", "44M"), "sizes of the ladder", metavar="NAME")
    seq_lengths: tuple[int, ...] = flag((256, 1024, 4096), "sequence lengths, for the first size", metavar="N")
    tokens: int = flag(4096, "tokens per step and rank")
    steps: int = flag(5, "timed steps")
    compile: bool = flag(False, "compile the blocks")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("steps",))
        for length in self.seq_lengths:
            require(
                length >= 1 and self.tokens % length == 0, "seq_lengths", length, f"must divide --tokens {self.tokens}"
            )


def main() -> None:
    """Run the benchmark from the command line."""
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
            "environment": environment(ranks.device),
            "precision": choose_precision(config, ranks.device),
            "rows": rows,
        }
        if ranks.rank == 0:
            publish(report, table(report), options.output)
    except ConfigurationError as error:
        refuse(error)
    finally:
        destroy_parallel()


def measure(options: Options, size: str, length: int, ranks: int) -> dict:
    """Return one row of the report: the `Trial` of a model size and sequence length, or why it failed."""
    samples = options.tokens // length
    flags = f"--model-size {size} --seq-length {length} --micro-batch-size {samples} "
    flags += f"--global-batch-size {samples * ranks} --{'' if options.compile else 'no-'}compile"
    config, vocabulary = parse(options.objective, flags.split()), Vocabulary(GPT2_VOCABULARY)
    trial = attempt(config, vocabulary, options.steps)
    row = {"size": size, "seq_length": length, "samples": samples}
    row["flops_per_token"] = flops_per_token(config.model, vocabulary, length)["hardware"]
    return row | (asdict(trial) if isinstance(trial, Trial) else {"failed": trial})


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    first = report["rows"][0]
    rows = []
    for row in report["rows"]:
        setting = (row["size"], f"{row['seq_length']:,}", row["samples"])
        if "failed" in row or "failed" in first:
            rows.append((*setting, row.get("failed", ""), "", "", ""))
            continue
        cost = first["tokens_per_second"] / row["tokens_per_second"]
        flops = row["flops_per_token"] / first["flops_per_token"]
        memory = f"{row['memory_bytes'] / 1e9:.2f}"
        rows.append((*setting, f"{row['tokens_per_second']:,.0f}", f"{cost:.2f}", f"{flops:.2f}", memory))
    columns = (
        "size",
        "sequence",
        "samples",
        "tokens/s",
        "cost per token / first row",
        "FLOPs / first row",
        "memory, GB",
    )
    return f"{report['settings']['objective'].upper()}, {report['precision']}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
