#!/usr/bin/env python3
"""Train the same steps in every parallel layout that fits the world size; print speed, memory and loss of each.

    python benchmarks/layouts/run.py --output layouts.json                                     # one GPU, or the CPU
    torchrun --standalone --nproc-per-node 8 benchmarks/layouts/run.py --output layouts.json

FSDP2 with ZeRO 0 to 3, activation checkpointing, CPU offload and compiled blocks; DeepSpeed with ZeRO 0 to 3 if it is
installed; tensor and pipeline parallelism if the world size allows it. The losses must agree: all layouts train on the
same tokens and masks. Offload needs a GPU. Times are of single steps after warm-up.
"""

import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
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
from megatron.config.flags import flag
from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY, parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.device_info import peak_flops
from megatron.training.environment import choose_precision
from megatron.training.step_benchmark import WARM_UP, attempt

LOSS_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # relative, at the last step


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    objective: str = flag("mdm", "the training objective", choices=("ar", "mdm"))
    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    seq_length: int = flag(2048, "tokens per sample")
    micro_batch_size: int = flag(8, "samples per micro-batch")
    micro_batches: int = flag(4, "micro-batches per step and rank, if every rank is data parallel")
    steps: int = flag(10, f"timed steps, after {WARM_UP} warm-up steps")
    compile: bool = flag(True, "also try compiled blocks")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("micro_batch_size", "micro_batches", "steps"))


def layouts(ranks: int, cuda: bool) -> list[str]:
    """Return the layouts to try, as the flags that a user would type."""
    flags = [f"--zero-stage {stage} --no-compile" for stage in range(4)]
    flags += ["--compile", "--zero-stage 3 --compile"]
    flags += [f"--recompute-granularity {kind} --no-compile" for kind in ("selective", "full")]
    flags += ["--recompute-granularity full --compile"]
    if cuda:
        flags += ["--cpu-offload --no-compile"]
    if ranks > 1:
        tensor, pipeline = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
        flags += [f"{tensor} --no-compile", f"{tensor} --compile", f"{pipeline} --no-compile", f"{pipeline} --compile"]
    if ranks > 3:
        flags += [f"{tensor} {pipeline} --compile", "--num-distributed-optimizer-instances 2 --compile"]
    if find_spec("deepspeed"):
        flags += [f"--deepspeed --zero-stage {stage} --no-compile" for stage in range(4)]
    return flags


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    try:
        report = measure(options)
    except ConfigurationError as error:
        refuse(error)
    finally:
        destroy_parallel()
    if report:
        publish(report, table(report), options.output)
        check(report)


def measure(options: Options) -> dict | None:
    """Return the report on rank 0, None on all other ranks."""
    ranks = initialize_parallel()
    results = {}
    for flags in layouts(ranks.size, ranks.device.type == "cuda"):
        if not options.compile and "--no-compile" not in flags:
            continue
        results[flags] = measure_layout(options, flags, ranks)
        if ranks.rank == 0:
            print(f"{flags}: {json.dumps(results[flags])}", file=sys.stderr)
    if ranks.rank:
        return None
    config = configuration(options, "", ranks.size)
    return {
        "environment": environment(ranks.device, "deepspeed"),
        "precision": choose_precision(config, ranks.device),
        "settings": vars(options) | {"parameters": parameter_count(config.model, Vocabulary(GPT2_VOCABULARY))},
        "layouts": results,
    }


def configuration(options: Options, flags: str, ranks: int) -> Config:
    """Return the configuration of a layout."""
    global_batch_size = options.micro_batch_size * options.micro_batches * ranks
    base = f"--model-size {options.model_size} --seq-length {options.seq_length} --train-iters 1 "
    base += f"--micro-batch-size {options.micro_batch_size} --global-batch-size {global_batch_size} "
    return parse(options.objective, (base + flags).split())


def measure_layout(options: Options, flags: str, ranks: ParallelContext) -> dict:
    """Return speed, memory and loss of a layout, or why it could not be trained."""
    config = configuration(options, flags, ranks.size)
    vocabulary = Vocabulary(GPT2_VOCABULARY)
    trial = attempt(config, vocabulary, options.steps)
    if isinstance(trial, str):
        return {"failed": trial}
    peak = peak_flops(ranks.device) * ranks.size
    mfu = 6 * parameter_count(config.model, vocabulary) * trial.tokens_per_second / peak if peak else None
    return asdict(trial) | {"mfu": mfu}


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    rows = []
    for flags, result in report["layouts"].items():
        if "failed" in result:
            rows.append((f"`{flags}`", result["failed"], "", "", ""))
            continue
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.3f}"
        memory = f"{result['memory_bytes'] / 1e9:.2f}"
        rows.append((f"`{flags}`", f"{result['tokens_per_second']:,.0f}", mfu, memory, f"{result['loss']:.6f}"))
    setting = f"{report['settings']['objective'].upper()}, {report['settings']['model_size']}, {report['precision']}"
    return f"{setting}\n\n{markdown_table(('layout', 'tokens/s', 'MFU', 'peak GB', 'loss'), rows)}"


def check(report: dict) -> None:
    """Exit with code 1 if the losses of two layouts differ."""
    losses = {flags: result["loss"] for flags, result in report["layouts"].items() if "loss" in result}
    lowest = min(losses, key=losses.get)
    highest = max(losses, key=losses.get)
    if losses[highest] > losses[lowest] * (1 + LOSS_TOLERANCE[report["precision"]]):
        sys.exit(f"the layouts disagree: loss {losses[lowest]:.6f} with {lowest}, {losses[highest]:.6f} with {highest}")


if __name__ == "__main__":
    main()
