#!/usr/bin/env python3
"""Compute the GPU memory that a training run needs, without starting it.

    python tools/estimate_memory.py --model-size 1018M --processes 8
    python tools/estimate_memory.py --model-size 6796M --processes 8 --zero-stage 3 --recompute-granularity full
    python tools/estimate_memory.py --model-size 6796M --processes 8 --global-batch-size 256 --search 5

It takes the flags of a training run (pretrain_gpt.py, pretrain_mdm.py) and --processes, the number of GPUs. It prints
the peak memory of the rank that needs most, by kind, in GiB. 2 GiB for CUDA, NCCL and the fragmentation of the
allocator are a guess; all else follows the formula in megatron/parallel/memory_estimate.py, for uncompiled blocks
(compiled ones need less) and bf16, unless --fp32.

--search N lists layouts that fit, in this order: least tensor x pipeline parallelism (tensor parallelism within one
node of eight, and before pipeline parallelism), lowest ZeRO stage from 1 on, no recomputation before selective and
full; each with the largest micro-batch size up to --micro-batch-size. --cpu-offload comes last.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.flags import flag, require, typed
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.parallel.memory_estimate import Memory, peak_memory
from megatron.training.command_line import parse_with
from megatron.training.environment import stated_precision
from megatron.training.load_run import teacher_models

GIB = 2**30
OVERHEAD = 2 * GIB  # CUDA context, NCCL buffers, fragmentation of the allocator: a guess
NODE_SIZE = 8  # GPUs
HELP_SECTIONS = ("model", "training", "parallel")  # sections that --help shows; flags of the others are accepted too
TABLE_SIZES = ("106M", "425M", "1018M", "2283M", "4084M", "6796M", "9293M", "16183M")
TABLE_PROCESSES = (1, 8, 64, 512)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Estimate: number and memory of the GPUs."""

    processes: int = flag(1, "world size: ranks, one per GPU")
    vocabulary_size: int = flag(GPT2_VOCABULARY, "vocabulary size of the tokenizer; the default is GPT-2's")
    device_memory: float = flag(80.0, "memory of one GPU in GB (10^9 bytes); an 80 GB A100 or H100 has somewhat more")
    search: int | None = flag(None, "list the first N layouts that fit", metavar="N")
    table: bool = flag(
        False, "print the table of docs/layouts.md: the first layout that fits, by model size and number of GPUs"
    )
    json: bool = flag(False, "print JSON, in bytes")

    def __post_init__(self):
        for name in ("processes", "vocabulary_size", "device_memory", "search"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")

    def fits(self, memory: Memory) -> bool:
        """Return whether a rank with `memory` fits on one GPU."""
        return memory.total + OVERHEAD <= self.device_memory * 1e9


def estimate(options: Options, config: Config) -> Memory:
    """Return the peak memory of the rank that needs most.

    Raises: ConfigurationError, if the run would not start.
    """
    reason = "the formula is FSDP2's; leave it out, with --deepspeed-config"
    require(not config.parallel.deepspeed, "deepspeed", True, reason)
    check_layout(config, options.processes)
    declared = capabilities(config.objective.objective)
    check_batch(config, options.processes, declared)
    precision = stated_precision(config) or "bf16"
    vocabulary = Vocabulary(options.vocabulary_size)
    settings = {"world_size": options.processes, "precision": precision, "teachers": teacher_models(config)}
    return peak_memory(config, vocabulary, declared, **settings)


def layouts(options: Options, config: Config) -> Iterator[tuple[Config, Memory]]:
    """Yield (configuration, memory) of layouts that fit, in the order of --search."""
    powers = [1 << power for power in range(10)]
    sizes = sorted(product(powers[:4], powers), key=lambda pair: (pair[0] * pair[1], pair[1]))
    for offload, (tp_size, num_stages) in product((False, True), sizes):
        if tp_size * num_stages > options.processes or tp_size > NODE_SIZE:
            continue
        for zero_stage, granularity in product((1, 2, 3), (None, "selective", "full")):
            changes = {
                "tensor_model_parallel_size": tp_size,
                "pipeline_model_parallel_size": num_stages,
                "zero_stage": zero_stage,
                "recompute_granularity": granularity,
                "cpu_offload": offload,
            }
            candidates = (
                _candidate(options, config, micro_batch_size, changes)
                for micro_batch_size in range(config.training.micro_batch_size, 0, -1)
            )
            layout = next(filter(None, candidates), None)
            if layout:
                yield layout


def _candidate(options: Options, config: Config, micro_batch_size: int, changes: dict) -> tuple[Config, Memory] | None:
    """Return `config` with `changes` of its parallel section and its memory, or None if invalid or too large."""
    try:
        config = replace(
            config,
            training=replace(config.training, micro_batch_size=micro_batch_size),
            parallel=replace(config.parallel, **changes),
        )
        memory = estimate(options, config)
    except ConfigurationError:
        return None
    return (config, memory) if options.fits(memory) else None


def flags(config: Config) -> str:
    """Return the flags of a layout that --search found; those at their defaults are left out."""
    parallel, words = config.parallel, []
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(parallel, name) > 1:
            words.append(typed(name, getattr(parallel, name)))
    words.append(typed("zero_stage", parallel.zero_stage))
    if parallel.recompute_granularity:
        words.append(typed("recompute_granularity", parallel.recompute_granularity))
    if parallel.cpu_offload:
        words.append("--cpu-offload")
    return " ".join([*words, typed("micro_batch_size", config.training.micro_batch_size)])


def print_estimate(options: Options, config: Config) -> None:
    """Print the memory of one layout."""
    memory = estimate(options, config)
    if options.json:
        report = asdict(memory) | {"total": memory.total, "overhead": OVERHEAD, "fits": options.fits(memory)}
        print(json.dumps(report | {"device_memory": options.device_memory * 1e9}, indent=1))
        return
    stages = config.parallel.pipeline_model_parallel_size
    print(f"stage {memory.stage + 1} of {stages}, {memory.moment}" if stages > 1 else memory.moment)
    for name, size in memory.parts.items():
        print(f"  {name.replace('_', ' '):18}{size / GIB:9.2f} GiB")
    print(f"  {'CUDA and NCCL':18}{OVERHEAD / GIB:9.2f} GiB, a guess")
    total, limit = (memory.total + OVERHEAD) / GIB, options.device_memory * 1e9 / GIB
    verdict = "fits" if options.fits(memory) else "does not fit"
    print(f"  {'total':18}{total:9.2f} GiB: {verdict} {options.device_memory:g} GB, which are {limit:.2f} GiB")
    if memory.host:
        print(f"  {'of the host':18}{memory.host / GIB:9.2f} GiB per rank")


def print_search(options: Options, config: Config) -> None:
    """Print the first layouts that fit, one per line.

    Raises: ConfigurationError, if none would start.
    """
    fitting = list(islice(layouts(options, config), options.search))
    if options.json:
        report = [{"flags": flags(layout), "total": memory.total, **asdict(memory)} for layout, memory in fitting]
        print(json.dumps(report))
        return
    for layout, memory in fitting:
        print(f"{(memory.total + OVERHEAD) / GIB:7.1f} GiB  {flags(layout)}")
    if not fitting:
        estimate(options, replace(config, training=replace(config.training, micro_batch_size=1)))  # may be invalid
        print("nothing fits; give more GPUs (--processes) or a smaller --seq-length")


def table(options: Options, arguments: list[str]) -> str:
    """Return the first layout that fits, by model size and number of GPUs, as a Markdown table."""
    lines = ["| size | GPUs | flags | GiB per GPU |", "|---|---|---|---|"]
    for size, processes in product(TABLE_SIZES, TABLE_PROCESSES):
        _, config = parse_with(Options, __doc__, [*arguments, "--model-size", size], HELP_SECTIONS)
        layout, memory = next(layouts(replace(options, processes=processes), config), (None, None))
        text = f"`{flags(layout)}` | {(memory.total + OVERHEAD) / GIB:.1f}" if layout else "none fits | "
        if memory and memory.host:
            text += f", {memory.host / GIB:.0f} of the host"
        lines.append(f"| {size} | {processes} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """Run the tool from the command line; a mistake exits with code 2."""
    arguments = sys.argv[1:]
    try:
        if "--table" in arguments:
            arguments = ["--model-size", TABLE_SIZES[0], *arguments]
        options, config = parse_with(Options, __doc__, arguments, HELP_SECTIONS)
        if options.table:
            print(table(options, arguments))
        elif options.search:
            print_search(options, config)
        else:
            print_estimate(options, config)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    stop_signals.run_tool(main)
