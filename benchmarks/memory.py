#!/usr/bin/env python3
"""Measure the peak of memory over training steps, and compare the formula of megatron/config/memory.py with it.

    python benchmarks/memory.py
    python benchmarks/memory.py --output memory.json

On a CUDA device: sizes of the ladder in one process, by torch.cuda.max_memory_allocated, which knows no parts.
Without one: small networks in one to four processes over gloo, by the bytes of all live tensors that PyTorch's
operators return. What an operator or a backend takes inside, and gives back, is in the first measure only.
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
from megatron.config.memory import Memory, memory_per_process
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import build_parallel_context, destroy_parallel, initialize_parallel
from megatron.training.command_line import parse
from megatron.training.environment import device_name
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.step import train_step

STEPS = 2  # the first makes what later steps find


@dataclass(frozen=True)
class Case:
    """Flags of a training by so many processes, each of which takes `micro_batches` micro-batches a step."""

    flags: str
    processes: int = 1
    micro_batches: int = 1
    vocabulary_size: int = 2000

    @property
    def config(self) -> Config:
        words = self.flags.split()
        given = parse("ar", words)
        share = given.training.micro_batch_size * given.parallel.data_size(self.processes)
        return parse("ar", [*words, "--global-batch-size", str(share * self.micro_batches)])

    def formula(self, device: str) -> Memory:
        config = self.config
        precision = "fp32" if config.training.fp32 else "bf16"
        return memory_per_process(config, Vocabulary(self.vocabulary_size), self.processes, precision, device)


SMALL = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --micro-batch-size 4 --bf16"
# parameters outweigh activations
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
# sizes of the ladder, chosen after the formula was finished: it has seen none of their peaks
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
    Case(f"{flags} {more}", 1, micro_batches, GPT2_VOCABULARY)
    for flags, more, micro_batches in (
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
    """Counts the bytes of the storages that operators have made and nobody has dropped, by kind.

    FSDP2 gives its gathered weights memory, and takes it back, by resizing their storages: that is their mark. A
    storage that is first seen through a view of it was made where no operator of PyTorch is called, as the copies
    are on which gloo works: it is not counted.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.parts, self.parts_at_peak = 0, 0, Counter(), Counter()
        self._known: dict[int, tuple] = {}
        self._resize = torch.UntypedStorage.resize_

    def add(self, tensor: Tensor, kind: str = "rest", besides: set[int] = frozenset()) -> None:
        for storage in storages(tensor):
            key = storage._cdata
            if key not in self._known and key not in besides:
                self._known[key] = (storage.nbytes(), kind, weakref.ref(storage, partial(self._drop, key)))
                self._change(kind, storage.nbytes())

    def begin_step(self) -> None:
        self.peak, self.parts_at_peak = self.live, self.parts.copy()

    def _drop(self, key: int, _) -> None:
        size, kind, _ = self._known.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.live += size
        self.parts[kind] += size
        if self.live > self.peak:
            self.begin_step()

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        self._resize(storage, size)
        if storage._cdata in self._known:
            before, kind, reference = self._known[storage._cdata]
            self._known[storage._cdata] = (size, "gathered", reference)
            self._change(kind, -before)
            self._change("gathered", size)

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), words=None):
        result = function(*arguments, **(words or {}))
        given = {storage._cdata for tensor in tensors((arguments, words)) for storage in storages(tensor)}
        for tensor in tensors(result):
            self.add(tensor, besides=given)
        return result


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if torch.is_tensor(leaf)]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the memory of a tensor, or of the parts of a DTensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [storage for part in parts if torch.is_tensor(part) for storage in storages(part)]


def measure(case: Case, rank: int, device: torch.device, steps: int = STEPS) -> dict[str, int]:
    """Return the peak of bytes of a training step in this process, and on the CPU what was there by kind."""
    config, vocabulary, parallel = case.config, Vocabulary(case.vocabulary_size), case.config.parallel
    processes = build_parallel_context(
        rank,
        case.processes,
        device,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        replicas=parallel.replicas(parallel.data_size(case.processes)),
    )
    bf16 = not config.training.fp32
    engine = build_engine(config.model, vocabulary, 0, processes, parallel, bf16=bf16, compile=False)
    optimizer = build_optimizer(engine, config.optimizer)
    start_state(optimizer, 0)
    batches = [random_batch(config, vocabulary, seed) for seed in range(case.micro_batches)]
    step = partial(train_step, engine, optimizer, batches, learning_rate=1e-4, weight_decay=0.1, clip_grad=1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return {"total": torch.cuda.max_memory_allocated()}
    live = LiveBytes()
    for parameter in engine.parameters():
        live.add(parameter, "master weights")
        for moment in optimizer.state[parameter].keys() - {"step"}:
            live.add(optimizer.state[parameter][moment], "optimizer states")
    for tensor in (
        getattr(batch, name) for batch in batches for name in ("tokens", "targets", "weights", "scored_positions")
    ):
        live.add(tensor)
    with live:
        for _ in range(steps):
            live.begin_step()
            step()
    return {"total": live.peak, **live.parts_at_peak}


def random_batch(config: Config, vocabulary: Vocabulary, seed: int) -> Batch:
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(vocabulary.size, shape, generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.clone(), torch.ones(shape), np.full(len(tokens), shape[-1]), causal=True)


def on_cpu(cases: list[Case], steps: int = STEPS) -> list[dict[str, int]]:
    """Measure each case in processes of its own, and return what the one which needed most says."""
    found: dict[Case, dict] = {}
    for size in sorted({case.processes for case in cases}):
        chosen = [case for case in cases if case.processes == size]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_child, (size, folder, chosen, steps), nprocs=size)
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
        found |= {
            case: max(ways, key=lambda way: way["total"])
            for case, ways in zip(chosen, zip(*ranks, strict=True), strict=True)
        }
    return [found[case] for case in cases]


def _child(rank: int, size: int, folder: str, cases: list[Case], steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    measured = [measure(case, rank, torch.device("cpu"), steps) for case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo may outlive its group and abort a regular exit


def on_cuda(cases: list[Case]) -> list[dict[str, int]]:
    processes, found = initialize_parallel(), []
    for case in cases:
        found.append(measure(case, 0, processes.device))
        gc.collect()
        torch.cuda.empty_cache()
    destroy_parallel()
    return found


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is written."""

    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")


def main() -> None:
    options = read_options(Options, __doc__)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CUDA_CASES if kind == "cuda" else CPU_CASES
    measured = on_cuda(cases) if kind == "cuda" else on_cpu(cases)
    rows = [(case, case.formula(kind), found) for case, found in zip(cases, measured, strict=True)]
    device = device_name(torch.device(kind))
    print(f"{date.today()}, {device}, torch {torch.__version__}, eager\n")
    print_table(rows)
    if options.output:
        report = [{**asdict(case), "formula": asdict(formula), "measured": found} for case, formula, found in rows]
        Path(options.output).write_text(json.dumps({"device": device, "torch": torch.__version__, "cases": report}))


def print_table(rows: list[tuple[Case, Memory, dict[str, int]]]) -> None:
    print("| processes | micro-batches | flags | measured MB | formula MB | ratio | the formula's moment |")
    print("|---|---|---|---|---|---|---|")
    names = {SMALL: "small", SHORT: "short", RICH: "rich", SMALL.replace("--bf16", "--fp32"): "small in fp32"}
    for case, formula, found in rows:
        flags = case.flags
        for long, short in names.items():
            flags = flags.replace(long, short)
        ratio = formula.total / found["total"]
        where = f"stage {formula.stage}, {formula.moment}" if "pipeline" in flags else formula.moment
        print(
            f"| {case.processes} | {case.micro_batches} | {flags} | {found['total'] / 1e6:.1f} "
            f"| {formula.total / 1e6:.1f} | {ratio:.3f} | {where} |"
        )


if __name__ == "__main__":
    main()
