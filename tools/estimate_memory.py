#!/usr/bin/env python3
"""Compute the memory of a training on each of its GPUs, before anything is started.

    python tools/estimate_memory.py --model-size 1018M --processes 8
    python tools/estimate_memory.py --model-size 6796M --processes 8 --zero-stage 3 --recompute-granularity full
    python tools/estimate_memory.py --model-size 6796M --processes 8 --global-batch-size 256 --search 5

It takes the flags of a training (pretrain_gpt.py, pretrain_mdm.py) and says how many processes, one a GPU, would share
it. Printed is that process which needs most, at that moment of a step when it holds most, part by part in GiB. What
CUDA, NCCL and the gaps of the allocator take on top is a flat 2 GiB, which is a guess; all else is computed as
megatron/config/memory.py says, for blocks that are not compiled (compiled ones take less) and bf16, unless --fp32.

--search N lists layouts that fit, in this order: least tensor x pipeline parallelism (tensor within one node of eight,
before pipeline), lowest ZeRO stage from 1 on, no recomputation before selective and full; with the largest micro-batch
up to --micro-batch-size. The host's memory is used (--cpu-offload) where nothing else fits.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.flags import flag, require, typed
from megatron.config.memory import Memory, memory_per_process
from megatron.config.resolve import check_batch, check_layout
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse_with

GIB = 2**30
BESIDE = 2 * GIB  # CUDA's context, NCCL's buffers, gaps of the allocator: a guess
NODE = 8  # GPUs
TOLD = ("model", "training", "parallel")  # sections that --help shows; the flags of the others are taken too
TABLE_SIZES = ("106M", "425M", "1018M", "2283M", "4084M", "6796M", "9293M", "16183M")
TABLE_PROCESSES = (1, 8, 64, 512)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Estimate: for how many GPUs, of which size."""

    processes: int = flag(1, "processes that share the training, one a GPU")
    vocabulary_size: int = flag(GPT2_VOCABULARY, "ids of the tokenizer; the default is GPT-2's")
    device_memory: float = flag(
        80.0, "memory of one GPU in GB of 10^9 bytes; an A100 or H100 of 80 GB has somewhat more"
    )
    search: int | None = flag(None, "list the first N layouts that fit", metavar="N")
    table: bool = flag(
        False, "print the table of docs/layouts.md: the first layout that fits each size and number of GPUs"
    )
    json: bool = flag(False, "print JSON, in bytes")

    def __post_init__(self):
        for name in ("processes", "vocabulary_size", "device_memory", "search"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")

    def fits(self, memory: Memory) -> bool:
        return memory.total + BESIDE <= self.device_memory * 1e9


def estimate(options: Options, config: Config) -> Memory:
    """Return the memory of a training; raise ConfigurationError where it would not start."""
    require(
        not config.parallel.deepspeed,
        "deepspeed",
        True,
        "the formula is FSDP2's; leave it out, with --deepspeed-config",
    )
    check_layout(config, options.processes)
    check_batch(config, options.processes)
    precision = "fp32" if config.training.fp32 else "bf16"
    return memory_per_process(config, Vocabulary(options.vocabulary_size), options.processes, precision)


def layouts(options: Options, config: Config) -> Iterator[tuple[Config, Memory]]:
    """Yield layouts that fit, in the order that the description of this file states."""
    powers = [1 << power for power in range(10)]
    shares = sorted(product(powers[:4], powers), key=lambda share: (share[0] * share[1], share[1]))
    for offload, (tensor, stages) in product((False, True), shares):
        for zero, recompute in product((1, 2, 3), (None, "selective", "full")):
            found = (
                _largest(options, config, micro, tensor, stages, zero, recompute, offload)
                for micro in range(config.training.micro_batch_size, 0, -1)
            )
            fitting = next(filter(None, found), None)
            if fitting:
                yield fitting


def _largest(options, config, micro: int, tensor: int, stages: int, zero: int, recompute, offload: bool):
    """Return the configuration with this layout and its memory, None where it cannot be or does not fit."""
    if tensor * stages > options.processes or tensor > NODE:
        return None
    try:
        config = replace(
            config,
            training=replace(config.training, micro_batch_size=micro),
            parallel=replace(
                config.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=stages,
                zero_stage=zero,
                recompute_granularity=recompute,
                cpu_offload=offload,
            ),
        )
        memory = estimate(options, config)
    except ConfigurationError:
        return None
    return (config, memory) if options.fits(memory) else None


def flags(config: Config) -> str:
    """Return what a search decides as flags, those at their defaults left out."""
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
    memory = estimate(options, config)
    if options.json:
        report = asdict(memory) | {"total": memory.total, "beside": BESIDE, "fits": options.fits(memory)}
        print(json.dumps(report | {"device_memory": options.device_memory * 1e9}, indent=1))
        return
    stages = config.parallel.pipeline_model_parallel_size
    print(f"stage {memory.stage + 1} of {stages}, {memory.moment}" if stages > 1 else memory.moment)
    for name, size in memory.parts.items():
        print(f"  {name.replace('_', ' '):18}{size / GIB:9.2f} GiB")
    print(f"  {'CUDA and NCCL':18}{BESIDE / GIB:9.2f} GiB, a guess")
    share, limit = (memory.total + BESIDE) / GIB, options.device_memory * 1e9 / GIB
    verdict = "fits" if options.fits(memory) else "does not fit"
    print(f"  {'total':18}{share:9.2f} GiB: {verdict} {options.device_memory:g} GB, which are {limit:.2f} GiB")
    if memory.host:
        print(f"  {'of the host':18}{memory.host / GIB:9.2f} GiB a process")


def print_search(options: Options, config: Config) -> None:
    found = list(islice(layouts(options, config), options.search))
    if options.json:
        print(json.dumps([{"flags": flags(each), "total": memory.total, **asdict(memory)} for each, memory in found]))
        return
    for each, memory in found:
        print(f"{(memory.total + BESIDE) / GIB:7.1f} GiB  {flags(each)}")
    if not found:
        print("nothing fits; more processes (--processes), or a smaller --seq-length")


def table(options: Options, arguments: list[str]) -> str:
    """Return the first layout that fits each size on each number of GPUs, as a table in Markdown."""
    lines = ["| size | GPUs | flags | GiB a GPU |", "|---|---|---|---|"]
    for size, processes in product(TABLE_SIZES, TABLE_PROCESSES):
        _, config = parse_with(Options, __doc__, [*arguments, "--model-size", size], TOLD)
        found = next(layouts(replace(options, processes=processes), config), None)
        text = f"`{flags(found[0])}` | {(found[1].total + BESIDE) / GIB:.1f}" if found else "none fits | "
        if found and found[1].host:
            text += f", {found[1].host / GIB:.0f} of the host"
        lines.append(f"| {size} | {processes} | {text} |")
    return "\n".join(lines)


def main() -> None:
    arguments = sys.argv[1:]
    try:
        if "--table" in arguments:
            arguments = ["--model-size", TABLE_SIZES[0], *arguments]
        options, config = parse_with(Options, __doc__, arguments, TOLD)
        if options.table:
            print(table(options, arguments))
        elif options.search:
            print_search(options, config)
        else:
            print_estimate(options, config)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
