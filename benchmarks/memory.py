#!/usr/bin/env python3
"""Measure the peak memory of training steps and compare it with the formula of megatron/parallel/memory_estimate.py.

    python benchmarks/memory.py
    python benchmarks/memory.py --output memory.json

On a CUDA device: sizes of the ladder on one GPU, by torch.cuda.max_memory_allocated, which has no breakdown. On the
CPU: small models on one to four ranks over gloo, by the bytes of all live tensors that PyTorch operators have returned.
Temporary memory inside an operator or a backend is in the first measure only.
"""

import gc
import json
import os
import sys
import tempfile
import weakref
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from benchmarks.options import read_options
from megatron.batch import Batch
from megatron.config.flags import flag
from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.registry import capabilities
from megatron.parallel.apply import build_engine
from megatron.parallel.memory_estimate import Memory, peak_memory
from megatron.parallel.mesh import build_parallel_context, destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.environment import device_name
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.step import train_step

STEPS = 2  # the first one allocates what persists between steps


@dataclass(frozen=True)
class Case:
    """A training configuration: flags, world size, micro-batches per step and rank, vocabulary size."""

    flags: str
    processes: int = 1
    micro_batches: int = 1
    vocabulary_size: int = 2000

    @property
    def config(self) -> Config:
        """Return the configuration, with the global batch size that `micro_batches` implies."""
        flags = self.flags.split()
        config = parse("ar", flags)
        samples = config.training.micro_batch_size * config.parallel.data_size(self.processes) * self.micro_batches
        return parse("ar", [*flags, "--global-batch-size", str(samples)])

    def formula(self, device: str) -> Memory:
        """Return the memory that the formula predicts on "cpu" or "cuda"."""
        config = self.config
        precision = "fp32" if config.training.fp32 else "bf16"
        return peak_memory(
            config,
            Vocabulary(self.vocabulary_size),
            capabilities(config.objective.objective),
            world_size=self.processes,
            precision=precision,
            device=device,
        )


SMALL = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --micro-batch-size 4 --bf16"
# parameters take more memory than activations
SHORT = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --bf16"
RICH = (
    "--num-layers 3 --hidden-size 192 --num-attention-heads 6 --group-query-attention --num-query-groups 2 "
    "--qk-layernorm --add-bias-linear --hidden-dropout 0.1 --mlp-dropout 0.1 --untie-embeddings-and-output-weights "
    "--seq-length 256 --micro-batch-size 4 --bf16"
)
DROPOUT = "--hidden-dropout 0.1 --mlp-dropout 0.1 --attention-dropout 0.1"
GELU = "--no-swiglu --normalization layernorm"
TENSOR, PIPELINE = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"
FULL, SELECTIVE = "--recompute-granularity full", "--recompute-granularity selective"
CPU_CASES = [
    Case(SMALL),
    Case(SMALL, 1, 2),
    Case(f"{SMALL.replace('--bf16', '--fp32')}"),
    Case(f"{SMALL} {GELU}"),
    Case(f"{SMALL} {FULL}"),
    Case(f"{SMALL} {SELECTIVE}"),
    *(Case(f"{SMALL} --zero-stage {stage}", 2, 2) for stage in (0, 1, 2, 3)),
    *(Case(f"{SHORT} --zero-stage {stage}", 2) for stage in (0, 1, 3)),
    Case(f"{SMALL} {TENSOR}", 2),
    Case(f"{SHORT} {TENSOR}", 2),
    Case(f"{SMALL} {PIPELINE}", 2, 4),
    Case(f"{SHORT} {PIPELINE}", 2, 4),
    Case(f"{SMALL} {PIPELINE} --zero-stage 3", 2, 4),
    Case(f"{SMALL} {INTERLEAVED}", 2, 4),
    Case(f"{SMALL} {PIPELINE} {FULL}", 2, 4),
    Case(RICH, 2, 1, 20000),
    Case(f"{RICH} {TENSOR}", 2, 1, 20000),
    Case(f"{RICH} {PIPELINE}", 2, 3, 20000),
    Case(f"{RICH} --zero-stage 3 {FULL}", 2, 1, 20000),
    Case(f"{SMALL} --zero-stage 3", 4),
    Case(f"{SHORT} --num-distributed-optimizer-instances 2", 4, 2),
    Case(f"{SMALL} {TENSOR} {PIPELINE}", 4, 4),
    Case(f"{SMALL} {TENSOR} {PIPELINE} {FULL}", 4, 4),
    Case(f"{SMALL} {TENSOR} {INTERLEAVED}", 4, 8),
    Case(f"{SMALL} {TENSOR} --zero-stage 3 {SELECTIVE}", 4, 2),
    Case(f"{SMALL} --pipeline-model-parallel-size 4", 4, 8),
    Case(f"{SMALL} {PIPELINE} {FULL} --recompute-num-layers 1", 4, 2),
]
# sizes of the ladder, chosen after the formula was finished: it was not tuned on them
WIDE = "--seq-length 512 --micro-batch-size 2 --bf16"
CPU_CASES += [
    Case(f"--model-size 35M {WIDE}", 1, 3, GPT2_VOCABULARY),
    Case(f"--model-size 35M {WIDE} --micro-batch-size 4 {FULL} --zero-stage 2", 2, 2, GPT2_VOCABULARY),
    Case(f"--model-size 44M {WIDE} {INTERLEAVED} {SELECTIVE} --zero-stage 3", 2, 6, 8000),
    Case(f"--model-size 44M {WIDE} {TENSOR} {FULL} --zero-stage 3 --qk-layernorm {GELU}", 2, 2, 8000),
    Case(f"--model-size 57M {WIDE} {PIPELINE} --untie-embeddings-and-output-weights --hidden-dropout 0.1", 2, 3, 30000),
    Case(
        f"--model-size 20M {WIDE.replace('--bf16', '--fp32')} --zero-stage 3 "
        f"--num-distributed-optimizer-instances 2 {GELU} --add-bias-linear",
        4,
        1,
        GPT2_VOCABULARY,
    ),
    Case(f"--model-size 44M {WIDE} --micro-batch-size 1 {TENSOR} {PIPELINE} {SELECTIVE}", 4, 5, GPT2_VOCABULARY),
]
LADDER_140M = "--model-size 140M --micro-batch-size 8 --bf16"
CUDA_CASES = [
    Case(f"{flags} {extra_flags}", 1, micro_batches, GPT2_VOCABULARY)
    for flags, extra_flags, micro_batches in (
        (LADDER_140M, "", 1),
        (LADDER_140M, "", 4),
        (LADDER_140M, "--zero-stage 3", 4),
        (LADDER_140M, FULL, 1),
        (LADDER_140M, SELECTIVE, 1),
        (LADDER_140M, DROPOUT, 1),
        (LADDER_140M, GELU, 1),
        (LADDER_140M.replace("--bf16", "--fp32"), "", 1),
        ("--model-size 425M --micro-batch-size 8 --bf16", "", 2),
        ("--model-size 1018M --micro-batch-size 4 --bf16", "", 2),
        ("--model-size 1018M --micro-batch-size 8 --bf16", FULL, 2),
        ("--model-size 2283M --micro-batch-size 4 --bf16", FULL, 1),
    )
]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operators have allocated, by kind.

    FSDP2 allocates and frees its gathered weights by resizing their storages, which identifies them. A storage that is
    first seen through a view was allocated outside PyTorch operators, like the copies that gloo works on: it is not
    counted.
    """

    def __init__(self):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_by_kind = Counter()
        self.bytes_by_kind_at_peak = Counter()
        self._known: dict[int, tuple] = {}  # address of the storage -> (bytes, kind, weak reference)
        self._resize = torch.UntypedStorage.resize_

    def add(self, tensor: Tensor, kind: str = "rest", excluded: set[int] = frozenset()) -> None:
        """Count the storages of `tensor` that are neither known nor `excluded`."""
        for storage in storages(tensor):
            key = storage._cdata
            if key not in self._known and key not in excluded:
                self._known[key] = (storage.nbytes(), kind, weakref.ref(storage, partial(self._free, key)))
                self._change(kind, storage.nbytes())

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are live now."""
        self.peak_bytes = self.live_bytes
        self.bytes_by_kind_at_peak = self.bytes_by_kind.copy()

    def _free(self, key: int, _) -> None:
        size, kind, _ = self._known.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.live_bytes += size
        self.bytes_by_kind[kind] += size
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _resize_and_count(self, storage: torch.UntypedStorage, size: int) -> None:
        self._resize(storage, size)
        if storage._cdata in self._known:
            previous_size, kind, reference = self._known[storage._cdata]
            self._known[storage._cdata] = (size, "gathered", reference)
            self._change(kind, -previous_size)
            self._change("gathered", size)

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self._resize_and_count(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {storage._cdata for tensor in tensors((args, kwargs)) for storage in storages(tensor)}
        for tensor in tensors(result):
            self.add(tensor, excluded=inputs)
        return result


def tensors(tree) -> list[Tensor]:
    """Return the tensors of a pytree."""
    return [leaf for leaf in tree_iter(tree) if torch.is_tensor(leaf)]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storage of a tensor, or the storages inside a wrapper such as a DTensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [storage for value in inner if torch.is_tensor(value) for storage in storages(value)]


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
    engine = build_engine(config.model, vocabulary, 0, ranks, parallel, bf16=bf16, compile=False)
    optimizer = build_optimizer(engine, config.optimizer)
    start_state(optimizer, 0)
    batches = [random_batch(config, vocabulary, seed) for seed in range(case.micro_batches)]
    step = partial(train_step, engine, optimizer, batches, learning_rate=1e-4, weight_decay=0.1, clip_grad=1.0)
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

    output: str | None = flag(None, "also write the JSON to a file", metavar="FILE")


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CUDA_CASES if kind == "cuda" else CPU_CASES
    measurements = on_cuda(cases) if kind == "cuda" else on_cpu(cases)
    rows = [(case, case.formula(kind), measurement) for case, measurement in zip(cases, measurements, strict=True)]
    device = device_name(torch.device(kind))
    print(f"{date.today()}, {device}, torch {torch.__version__}, eager\n")
    print_table(rows)
    if options.output:
        report = [
            {**asdict(case), "formula": asdict(formula), "measured": measurement} for case, formula, measurement in rows
        ]
        Path(options.output).write_text(json.dumps({"device": device, "torch": torch.__version__, "cases": report}))


def print_table(rows: list[tuple[Case, Memory, dict[str, int]]]) -> None:
    """Print a Markdown table of (case, formula, measurement)."""
    print("| processes | micro-batches | flags | measured MB | formula MB | ratio | peak predicted at |")
    print("|---|---|---|---|---|---|---|")
    names = {SMALL: "small", SHORT: "short", RICH: "rich", SMALL.replace("--bf16", "--fp32"): "small in fp32"}
    for case, formula, measurement in rows:
        flags = case.flags
        for long, short in names.items():
            flags = flags.replace(long, short)
        ratio = formula.total / measurement["total"]
        moment = f"stage {formula.stage}, {formula.moment}" if "pipeline" in flags else formula.moment
        print(
            f"| {case.processes} | {case.micro_batches} | {flags} | {measurement['total'] / 1e6:.1f} "
            f"| {formula.total / 1e6:.1f} | {ratio:.3f} | {moment} |"
        )


if __name__ == "__main__":
    main()
