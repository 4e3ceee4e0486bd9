#!/usr/bin/env python3
"""Train the same steps in every layout that fits the processes, and print speed, memory and loss of each as JSON.

    python benchmarks/layouts.py --output layouts.json                                     # one GPU, or the CPU
    torchrun --standalone --nproc-per-node 8 benchmarks/layouts.py --output layouts.json

FSDP2 with ZeRO 0 to 3, recomputation, offload and compiled blocks; DeepSpeed with ZeRO 0 to 3 where it is installed;
tensor and pipeline parallelism where there are several processes. The losses must agree: all layouts see the same
tokens and the same masks. Offload needs a GPU. Times are of single steps, the first ones left out.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import version
from benchmarks.options import read_options, refuse
from megatron.config.flags import flag, require
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, parameter_count
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.device_info import peak_flops
from megatron.training.environment import choose_precision, device_name
from megatron.training.step_benchmark import WARM_UP, attempt

AGREEMENT = {"bf16": 2e-2, "fp32": 1e-4}  # relative, of the losses of the last step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained."""

    objective: str = flag("mdm", "what is trained", choices=("ar", "mdm"))
    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    seq_length: int = flag(2048, "tokens of one sample")
    micro_batch_size: int = flag(8, "samples of one micro-batch")
    micro_batches: int = flag(4, "micro-batches of one step and process, in data parallelism alone")
    steps: int = flag(10, f"steps that are timed, after {WARM_UP} that are not")
    compile: bool = flag(True, "try compiled blocks too")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        for name in ("micro_batch_size", "micro_batches", "steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


def layouts(ranks: int, cuda: bool) -> list[str]:
    """Return the layouts to try, as the flags that a user would type."""
    found = [f"--zero-stage {stage} --no-compile" for stage in range(4)]
    found += ["--compile", "--zero-stage 3 --compile"]
    found += [f"--recompute-granularity {kind} --no-compile" for kind in ("selective", "full")]
    found += ["--recompute-granularity full --compile"]
    found += ["--cpu-offload --no-compile"] * cuda
    if ranks > 1:
        tensor, pipeline = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
        found += [f"{tensor} --no-compile", f"{tensor} --compile", f"{pipeline} --no-compile", f"{pipeline} --compile"]
    if ranks > 3:
        found += [f"{tensor} {pipeline} --compile", "--num-distributed-optimizer-instances 2 --compile"]
    if find_spec("deepspeed"):
        found += [f"--deepspeed --zero-stage {stage} --no-compile" for stage in range(4)]
    return found


def main() -> None:
    options = read_options(Options, __doc__)
    try:
        report = measure(options)
    except ConfigurationError as error:
        refuse(error)
    finally:
        destroy_parallel()
    if report:
        print(json.dumps(report, indent=1))
        if options.output:
            Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
        check(report)


def measure(options: Options) -> dict | None:
    """Return what the first process reports; the others return None."""
    first = initialize_parallel()
    results = {}
    tried = layouts(first.size, first.device.type == "cuda")
    for flags in [flags for flags in tried if options.compile or "--no-compile" in flags]:
        results[flags] = measured(options, flags, first)
        if first.rank == 0:
            print(f"{flags}: {json.dumps(results[flags])}", file=sys.stderr)
    if first.rank:
        return None
    config = configuration(options, "", first.size)
    return {
        "date": str(date.today()),
        "device": device_name(first.device),
        "processes": first.size,
        "precision": choose_precision(config, first.device),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")},
        "settings": vars(options) | {"parameters": parameter_count(config.model, Vocabulary(GPT2_VOCABULARY))},
        "layouts": results,
    }


def configuration(options: Options, flags: str, ranks: int) -> Config:
    batch = options.micro_batch_size * options.micro_batches * ranks
    base = f"--model-size {options.model_size} --seq-length {options.seq_length} --train-iters 1 "
    base += f"--micro-batch-size {options.micro_batch_size} --global-batch-size {batch} "
    return parse(options.objective, (base + flags).split())


def measured(options: Options, flags: str, first: ParallelContext) -> dict:
    """Return speed, memory and loss of a layout, or why it could not be trained."""
    config = configuration(options, flags, first.size)
    vocabulary = Vocabulary(GPT2_VOCABULARY)
    found = attempt(config, vocabulary, options.steps)
    if isinstance(found, str):
        return {"failed": found}
    peak = peak_flops(first.device) * first.size
    mfu = 6 * parameter_count(config.model, vocabulary) * found.tokens_per_second / peak if peak else None
    return asdict(found) | {"mfu": mfu}


def check(report: dict) -> None:
    """Leave with 1 where the losses of two layouts differ."""
    losses = {flags: found["loss"] for flags, found in report["layouts"].items() if "loss" in found}
    lowest, highest = min(losses, key=losses.get), max(losses, key=losses.get)
    if losses[highest] > losses[lowest] * (1 + AGREEMENT[report["precision"]]):
        sys.exit(f"the layouts disagree: loss {losses[lowest]:.6f} with {lowest}, {losses[highest]:.6f} with {highest}")


if __name__ == "__main__":
    main()
