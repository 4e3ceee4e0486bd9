#!/usr/bin/env python3
"""Measure the peak memory of training steps and compare it with the formula of megatron/parallel/memory_estimate.py.

    python benchmarks/memory/run.py
    python benchmarks/memory/run.py --output memory.json

On a CUDA device: sizes of the ladder on one GPU, by torch.cuda.max_memory_allocated, which has no breakdown. On the
CPU: small models on one to four ranks over gloo, by the bytes of all live tensors that PyTorch operators have returned.
Temporary memory inside an operator or a backend is in the first measure only.
"""

import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import environment, markdown_table, output_flag, publish, read_options
from benchmarks.memory.cases import CPU_CASES, CUDA_CASES, RICH, SHORT, SMALL, Case
from benchmarks.memory.live_bytes import LiveBytes
from megatron.batch import Batch
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.model.distillation import Distillation
from megatron.parallel.apply import build_engine
from megatron.parallel.memory_estimate import Memory
from megatron.parallel.mesh import build_parallel_context, destroy_parallel, initialize_parallel
from megatron.parallel.meta_gradient import MetaGradient
from megatron.parallel.teachers import build_teacher
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.step import train_step

STEPS = 2  # the first one allocates what persists between steps


def measure(case: Case, rank: int, device: torch.device, steps: int = STEPS) -> dict[str, int]:
    """Return the peak bytes of a training step on this rank, and on the CPU their breakdown by kind."""
    config = case.config
    parallel = config.parallel
    vocabulary = Vocabulary(case.vocabulary_size)
    ranks = build_parallel_context(
        rank,
        case.processes,
        device,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(case.processes)),
    )
    bf16 = not config.training.fp32
    engine = build_engine(config.model, vocabulary, ranks, parallel, seed=0, bf16=bf16, compile=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    teachers = [build_teacher(config.model, vocabulary, ranks, parallel, dtype=dtype) for _ in range(case.num_teachers)]
    if teachers:
        states = tuple(teacher.teacher_states for teacher in teachers)
        engine.models[0].distillation = Distillation(states, weight=0.5, temperature=1.0)
    optimizer = build_optimizer(engine, config.optimizer)
    start_state(optimizer, 0)
    batches = [random_batch(config, vocabulary, seed) for seed in range(case.micro_batches)]
    rates = {"learning_rate": 1e-4, "weight_decay": 0.1, "meta_gradient": MetaGradient.at(config.optimizer, 1e-4)}
    step = partial(train_step, engine, optimizer, batches, **rates, clip_grad=1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return {"total": torch.cuda.max_memory_allocated()}
    counter = LiveBytes()
    for parameter in engine.parameters():
        counter.add(parameter, "master weights")
        for moment in optimizer.state[parameter].keys() - {"step"}:
            counter.add(optimizer.state[parameter][moment], "optimizer states")
    for parameter in (parameter for teacher in teachers for parameter in teacher.parameters()):
        counter.add(parameter, "compute weights")
    for batch in batches:
        for name in ("tokens", "targets", "weights", "scored_positions"):
            counter.add(getattr(batch, name))
    with counter:
        for _ in range(steps):
            counter.reset_peak()
            step()
    return {"total": counter.peak_bytes, **counter.bytes_by_kind_at_peak}


def random_batch(config: Config, vocabulary: Vocabulary, seed: int) -> Batch:
    """Return an AR micro-batch of random tokens; every position is scored."""
    shape = (config.training.micro_batch_size, config.data.seq_length)  # [B, S]
    tokens = torch.randint(vocabulary.size, shape, generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.clone(), torch.ones(shape), np.full(len(tokens), shape[-1]), causal=True)


def on_cpu(cases: list[Case], steps: int = STEPS) -> list[dict[str, int]]:
    """Return the measurement of each case, from the rank with the highest peak; spawns the ranks of each world size."""
    peaks: dict[Case, dict] = {}
    for world_size in sorted({case.processes for case in cases}):
        same_size = [case for case in cases if case.processes == world_size]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_measure_on_rank, (world_size, folder, same_size, steps), nprocs=world_size)
            by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
        for case, measurements in zip(same_size, zip(*by_rank, strict=True), strict=True):
            peaks[case] = max(measurements, key=lambda measurement: measurement["total"])
    return [peaks[case] for case in cases]


def _measure_on_rank(rank: int, world_size: int, folder: str, cases: list[Case], steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    measurements = [measure(case, rank, torch.device("cpu"), steps) for case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measurements))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread may outlive its process group and abort a regular exit


def on_cuda(cases: list[Case]) -> list[dict[str, int]]:
    """Return the measurement of each case on one GPU."""
    ranks = initialize_parallel()
    measurements = []
    for case in cases:
        measurements.append(measure(case, 0, ranks.device))
        gc.collect()
        torch.cuda.empty_cache()
    destroy_parallel()
    return measurements


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    output: str | None = output_flag()


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CUDA_CASES if kind == "cuda" else CPU_CASES
    measurements = on_cuda(cases) if kind == "cuda" else on_cpu(cases)
    rows = [(case, case.formula(kind), measurement) for case, measurement in zip(cases, measurements, strict=True)]
    report = {
        "environment": environment(torch.device(kind)),
        "cases": [
            asdict(case) | {"formula": asdict(formula), "measured": measurement} for case, formula, measurement in rows
        ],
    }
    publish(report, f"not compiled\n\n{table(rows)}", options.output)


def table(rows: list[tuple[Case, Memory, dict[str, int]]]) -> str:
    """Return (case, formula, measurement) as a Markdown table."""
    names = {SMALL: "small", SHORT: "short", RICH: "rich", SMALL.replace("--bf16", "--fp32"): "small in fp32"}
    lines = []
    for case, formula, measurement in rows:
        flags = case.flags
        for long, short in names.items():
            flags = flags.replace(long, short)
        sizes = (f"{measurement['total'] / 1e6:.1f}", f"{formula.total / 1e6:.1f}")
        ratio = f"{formula.total / measurement['total']:.3f}"
        moment = f"stage {formula.stage}, {formula.moment}" if "pipeline" in flags else formula.moment
        lines.append((case.processes, case.micro_batches, flags, *sizes, ratio, moment))
    columns = ("processes", "micro-batches", "flags", "measured MB", "formula MB", "ratio", "peak predicted at")
    return markdown_table(columns, lines)


if __name__ == "__main__":
    main()
