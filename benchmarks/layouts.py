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
import time
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.contestants import version
from benchmarks.options import read_options, refuse
from megatron.config.flags import flag, require
from megatron.config.resolve import check_layout, check_processes
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, parameter_count
from megatron.errors import ConfigurationError
from megatron.objectives import build_input_noise, build_objective
from megatron.parallel.launch import world_size
from megatron.parallel.mesh import Processes, start_processes, stop_processes
from megatron.training.command_line import parse
from megatron.training.engines import start_engine
from megatron.training.environment import check_device, choose_precision, device_name
from megatron.training.feed import MicroBatches
from megatron.training.metrics import peak_flops, peak_memory
from megatron.training.step import train_step

WARM_UP = 3  # steps that are not timed
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


@dataclass(frozen=True)
class RandomText:
    """Samples by run position, as training reads them."""

    size: int
    seq_length: int

    def __getitem__(self, position: int) -> np.ndarray:
        return np.random.default_rng(position).integers(0, self.size, self.seq_length + 1)


def layouts(processes: int, cuda: bool) -> list[str]:
    """Return the layouts to try, as the flags that a user would type."""
    found = [f"--zero-stage {stage} --no-compile" for stage in range(4)]
    found += ["--compile", "--zero-stage 3 --compile"]
    found += [f"--recompute-granularity {kind} --no-compile" for kind in ("selective", "full")]
    found += ["--recompute-granularity full --compile"]
    found += ["--cpu-offload --no-compile"] * cuda
    if processes > 1:
        tensor, pipeline = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
        found += [f"{tensor} --no-compile", f"{tensor} --compile", f"{pipeline} --no-compile", f"{pipeline} --compile"]
    if processes > 3:
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
        stop_processes()
    if report:
        print(json.dumps(report, indent=1))
        if options.output:
            Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
        check(report)


def measure(options: Options) -> dict | None:
    """Return what the first process reports; the others return None."""
    first = start_processes()
    results = {}
    tried = layouts(first.size, first.device.type == "cuda")
    for flags in [flags for flags in tried if options.compile or "--no-compile" in flags]:
        results[flags] = attempt(options, flags, first)
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


def configuration(options: Options, flags: str, processes: int) -> Config:
    batch = options.micro_batch_size * options.micro_batches * processes
    base = f"--model-size {options.model_size} --seq-length {options.seq_length} --train-iters 1 "
    base += f"--micro-batch-size {options.micro_batch_size} --global-batch-size {batch} "
    return parse(options.objective, (base + flags).split())


def attempt(options: Options, flags: str, first: Processes) -> dict:
    """Return speed, memory and loss of a layout, or why it could not be trained."""
    config = configuration(options, flags, first.size)
    try:
        check_layout(config, world_size())
        check_processes(config, world_size())
        check_device(config, first.device)
    except ConfigurationError as error:
        return {"refused": str(error)}
    try:
        return train(options, config, first)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}


def train(options: Options, config: Config, first: Processes) -> dict:
    parallel, vocabulary = config.parallel, Vocabulary(GPT2_VOCABULARY)
    processes = start_processes(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(first.size)),
    )
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bf16 = choose_precision(config, processes.device) == "bf16"
    compile = bool(config.training.compile)
    engine, optimizer = start_engine(config, vocabulary, processes, bf16=bf16, compile=compile, steps=0)
    batch = config.training.global_batch_size
    data = MicroBatches(
        RandomText(vocabulary.size, options.seq_length),
        build_objective(config.objective, vocabulary, batch),
        build_input_noise(config.objective, vocabulary, config.model.num_layers),
        seed=1,
        first_sample=0,
        train_samples=(WARM_UP + options.steps) * batch,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=batch,
        rank=processes.data_rank,
        size=processes.data_size,
    )
    seconds = []
    for step in range(data.steps):
        batches = [batch for index in range(data.per_step) for batch in data[step * data.per_step + index]]
        begin = time.perf_counter()
        result = train_step(engine, optimizer, batches, learning_rate=1e-4, weight_decay=0.1, clip_grad=1.0)
        (loss,) = processes.sum(float(result.loss))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    step = median(seconds[WARM_UP:])
    speed = batch * options.seq_length / step
    peak = peak_flops(processes.device) * processes.size
    return {
        "seconds_per_step": step,
        "tokens_per_second": speed,
        "mfu": 6 * parameter_count(config.model, vocabulary) * speed / peak if peak else None,
        "first_step_seconds": seconds[0],
        "memory_bytes": peak_memory(processes.device),
        "loss": loss,
        "grad_norm": float(result.grad_norm),
    }


def check(report: dict) -> None:
    """Leave with 1 where the losses of two layouts differ."""
    losses = {flags: found["loss"] for flags, found in report["layouts"].items() if "loss" in found}
    lowest, highest = min(losses, key=losses.get), max(losses, key=losses.get)
    if losses[highest] > losses[lowest] * (1 + AGREEMENT[report["precision"]]):
        sys.exit(f"the layouts disagree: loss {losses[lowest]:.6f} with {lowest}, {losses[highest]:.6f} with {highest}")


if __name__ == "__main__":
    main()
