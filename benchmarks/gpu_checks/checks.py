"""What must hold on a device before a figure measured on it counts, each as a function of the device.

A check returns its figures, or raises `CheckError`. Models are small, so that most checks take a second; those that
compile take longer. On a CPU they run too, as a rehearsal: what only CUDA has is skipped with its reason.
"""

import json
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.harness import kernel_choices_restored
from megatron.config.sections import Config, OptimizerConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import IndexedDatasetWriter
from megatron.model import linear_cross_entropy
from megatron.model.linear_cross_entropy import PLAIN, WHOLE, Terms
from megatron.objectives.registry import OBJECTIVES, document_rules
from megatron.parallel.engine import Engine
from megatron.parallel.launch import join
from megatron.parallel.mesh import build_parallel_context, destroy_parallel
from megatron.parallel.meta_gradient import MetaGradient
from megatron.torch_private import forget_compiled_code
from megatron.training import launcher, optimizer
from megatron.training.averaging import Average
from megatron.training.build_engine import start_engine
from megatron.training.command_line import parse
from megatron.training.environment import choose_precision, cpp_compiler, device_name, prepare_device
from megatron.training.step import reseed, train_step
from megatron.training.step_benchmark import batches_by_step, random_batches

VOCABULARY = Vocabulary(500)
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --lr 1e-2 "
MODEL += "--micro-batch-size 4 --global-batch-size 8 --train-iters 1"
STEPS = 6
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # largest relative difference of a loss
COSINE = 0.999  # smallest of a parameter's gradient, compiled and uncompiled
# every objective, and what changes the model, its batches or its gradients
FP32_CASES = [f"--objective {name}" for name in OBJECTIVES] + [
    "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    "--group-query-attention --num-query-groups 1 --normalization layernorm --add-bias-linear --qk-layernorm",
    "--label-smoothing 0.1 --z-loss 1e-3",
    "--randmask-ratio 0.5 --masked-input-weight 0.4",
    "--optimizer muon",
    "--meta-gradient-norm 0.5",
    "--num-loops 2",
]
LAYOUTS = [f"--zero-stage {stage}" for stage in (0, 2, 3)]
LAYOUTS += [f"--recompute-granularity {kind}" for kind in ("selective", "full")]
OFFLOADED = ["--cpu-offload", "--cpu-offload --zero-stage 3"]  # CUDA only
HEADS = {"768": "--hidden-size 768 --num-attention-heads 12", "1792": "--hidden-size 1792 --num-attention-heads 14"}
GRADIENT_CASES = {
    "cuda": [
        f"--objective mdm {HEADS['768']} --seq-length 2112 --bf16",
        f"--objective block-diffusion {HEADS['768']} --seq-length 1056 --bf16",
        f"--objective ar {HEADS['768']} --seq-length 2048 --fp32",
        f"--objective ar {HEADS['1792']} --seq-length 2048 --bf16",
    ],
    "cpu": ["--objective mdm --fp32"],
}


class CheckError(Exception):
    """A check failed; the message is one line."""


class SkipCheck(Exception):
    """A check does not apply to this machine; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """A check by name."""

    name: str
    run: Callable[[torch.device], dict]


def checks(device: torch.device) -> list[Check]:
    """Return all checks of a device, the most valuable ones first."""
    layouts = LAYOUTS + (OFFLOADED if device.type == "cuda" else [])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    terms = {"nll": PLAIN, "terms": Terms(label_smoothing=0.1, z_loss=1e-3)}
    listed = [Check("defaults", defaults)]
    listed += [
        Check(f"kernels of the head, {name}, {kind}", partial(head_kernels, dtype=dtype, terms=term))
        for name, dtype in dtypes.items()
        for kind, term in terms.items()
    ]
    listed += [Check(f"fp32 follows the CPU: {flags}", partial(fp32_follows_the_cpu, flags)) for flags in FP32_CASES]
    eager = "--no-compile"
    listed += [Check(f"no synchronisation: {name}", partial(no_synchronisation, name, eager)) for name in OBJECTIVES]
    listed += [Check("deterministic resume, eager", partial(deterministic_resume, "ar", eager))]
    listed += [Check(f"default precision: {name}", partial(default_precision, name)) for name in OBJECTIVES]
    listed += [Check(f"layout: {flags}", partial(layout_changes_nothing, flags)) for flags in layouts]
    listed += [Check("no synchronisation, compiled: mdm", partial(no_synchronisation, "mdm", "--compile"))]
    listed += [Check("deterministic resume, compiled", partial(deterministic_resume, "mdm", "--compile"))]
    listed += [
        Check(f"compiled gradients: {flags}", partial(compiled_gradients, flags))
        for flags in GRADIENT_CASES[device.type]
    ]
    return listed


def run_check(check: Check, device: torch.device) -> dict:
    """Return the figures of a check; PyTorch's choices of kernels are the same before and after it.

    Raises: CheckError, SkipCheck
    """
    try:
        with kernel_choices_restored():
            return check.run(device)
    finally:
        destroy_parallel()


# ------------------------------------------------------------------ runs


def pretrain(objective: str, flags: str, data: Path, run: Path) -> None:
    """Train a small model in this process, as the entry points do, on the device that they choose."""
    words = f"{MODEL.replace('--train-iters 1', '--train-samples 93')} {flags} --log-interval 1".split()
    words += f"--eval-interval 4 --eval-samples 8 --tokenizer-type ByteTokenizer --train-data-path {data}/train".split()
    words += f"--valid-data-path validation={data}/validation --save {run}".split()
    try:
        launcher.main(objective, words)
    except SystemExit as error:
        expect(not error.code, f"exit code {error.code}: {' '.join(words)}")


@contextmanager
def random_bytes() -> Iterator[Path]:
    """Return a folder with a training and a validation set of random bytes, removed afterwards."""
    generator = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "validation"):
            with IndexedDatasetWriter(Path(folder) / name, 257) as writer:
                for _ in range(40):
                    writer.add_document([*generator.integers(0, 256, 200), 256])
        yield Path(folder)


def bits_of(run: Path) -> tuple[list[dict], dict]:
    """Return the records of a run without times and memory, and size and checksum of the files of its checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds", "tokens_per_second", "mfu", "memory_bytes")
    records = [{key: value for key, value in record.items() if key not in volatile} for record in records]
    newest = max((run / "checkpoints").glob("iter_*"))
    return records, json.loads((newest / "meta.json").read_text())["files"]


def defaults(device: torch.device) -> dict:
    """Check that a run without flags for them takes this device, and the precision that suits it."""
    with random_bytes() as data:
        pretrain("ar", "", data, data / "run")
        config = json.loads((data / "run" / "config.json").read_text())
        records = [json.loads(line) for line in (data / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = "bf16" if device.type == "cuda" else choose_precision(parse("ar", MODEL.split()), device)
    expect(config["device"] == device_name(device), f"the run took {config['device']}")
    expect(config["precision"] == expected, f"the run took {config['precision']}, not {expected}")
    memory = min(record["memory_bytes"] for record in records if record["kind"] == "train")
    expect(memory > 0, "no memory is recorded")
    return {"device": config["device"], "precision": config["precision"], "compiled": config["compiled"]}


def deterministic_resume(objective: str, flags: str, device: torch.device) -> dict:
    """Check that an interrupted run with --deterministic and dropout ends with the bits of an uninterrupted one."""
    require_compiler(flags)
    flags += " --deterministic --mlp-dropout 0.1"
    with random_bytes() as data:
        pretrain(objective, flags, data, data / "uninterrupted")
        pretrain(objective, f"{flags} --exit-interval 5", data, data / "resumed")
        pretrain(objective, flags, data, data / "resumed")
        (expected, weights), (records, resumed_weights) = (bits_of(data / run) for run in ("uninterrupted", "resumed"))
    differing = sum(left != right for left, right in zip(expected, records)) + abs(len(expected) - len(records))
    expect(not differing, f"{differing} of {len(expected)} records differ")
    expect(weights == resumed_weights, "the checkpoints differ")
    return {"equal_records": len(records)}


# ------------------------------------------------------------------ steps


def start(flags: str, device: torch.device) -> tuple[Config, Engine, torch.optim.Optimizer, Iterator]:
    """Return configuration, engine, optimizer and micro-batches by step of a small model on random text."""
    forget_compiled_code()
    config = parse("ar", [*MODEL.split(), *flags.split()])
    join(detect_failures=False)
    ranks = build_parallel_context(0, 1, device)
    prepare_device(config, device)
    bf16, compile = choose_precision(config, device) == "bf16", bool(config.training.compile)
    engine, optimizer = start_engine(config, VOCABULARY, ranks, bf16=bf16, compile=compile, steps=0)
    documents = document_rules(config.data, config.objective, eod=0)
    data = random_batches(config, VOCABULARY, ranks, documents=documents, steps=STEPS)
    return config, engine, optimizer, batches_by_step(data, device)


def losses(flags: str, device: torch.device) -> list[float]:
    """Return the losses of `STEPS` steps."""
    config, engine, optimizer, steps = start(flags, device)
    rates = {"learning_rate": config.optimizer.lr, "weight_decay": 0.1, "clip_grad": 1.0}
    rates["meta_gradient"] = MetaGradient.at(config.optimizer, config.optimizer.lr)
    values = []
    for step, batches in enumerate(steps):
        reseed(1, step, engine.ranks)
        values.append(train_step(engine, optimizer, batches, **rates).loss)
    destroy_parallel()
    return [float(value) for value in values]


def fp32_follows_the_cpu(flags: str, device: torch.device) -> dict:
    """Check the losses in fp32 against those on the CPU."""
    expected = losses(f"{flags} --fp32 --no-compile", torch.device("cpu"))
    return compared(losses(f"{flags} --fp32 --no-compile", device), expected, TOLERANCE["fp32"])


def default_precision(objective: str, device: torch.device) -> dict:
    """Check the losses in the default precision against fp32 on the CPU."""
    flags = f"--objective {objective} --no-compile"
    return compared(losses(flags, device), losses(f"{flags} --fp32", torch.device("cpu")), TOLERANCE["bf16"])


def layout_changes_nothing(flags: str, device: torch.device) -> dict:
    """Check the losses of masked diffusion in a layout of one device against those without it."""
    plain = "--objective mdm --fp32 --no-compile"
    return compared(losses(f"{plain} {flags}", device), losses(plain, device), TOLERANCE["fp32"])


def compared(values: list[float], expected: list[float], tolerance: float) -> dict:
    """Return the largest relative difference. Raises: CheckError if it is above `tolerance`"""
    difference = max(abs(value - reference) / abs(reference) for value, reference in zip(values, expected, strict=True))
    message = f"losses differ by {difference:.2g} of their size: {values} and {expected}"
    expect(all(map(math.isfinite, values)) and difference <= tolerance, message)
    return {"loss_difference": difference}


def no_synchronisation(objective: str, flags: str, device: torch.device) -> dict:
    """Check that the host does not wait for the device anywhere in a step, including a weight average."""
    require_compiler(flags)
    with mock.patch.object(optimizer, "apex_adam", lambda: None):  # apex's kernel cannot skip a step on the device
        _, engine, adam, steps = start(f"--objective {objective} {flags}", device)
    average = Average(engine, OptimizerConfig(ema_decay=0.9))
    for step, batches in enumerate(steps):
        with synchronisation_is_an_error(device) if step == STEPS - 1 else nullcontext():
            train_step(engine, adam, batches, learning_rate=1e-3, weight_decay=0.1, clip_grad=1.0)
            average.update(8 * (step + 1))
    return {}


@contextmanager
def synchronisation_is_an_error(device: torch.device) -> Iterator[None]:
    """Raise CheckError where the host waits for a CUDA device; on a CPU nothing waits."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise CheckError(f"{place.filename}:{place.lineno}: {place.line}: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ kernels


def head_kernels(device: torch.device, *, dtype: torch.dtype, terms: Terms) -> dict:
    """Check loss and gradient of the head's Triton kernels against those of plain operators."""
    kernels = linear_cross_entropy._kernels(device.type)
    if kernels is None:
        raise SkipCheck("needs CUDA and Triton")
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(300, 50_304, device=device, generator=generator).mul_(4).to(dtype)  # [C, V]
    targets = torch.randint(50_258, (300,), device=device, generator=generator)
    weights = torch.rand(300, device=device, generator=generator)
    results = []
    for implementation in (kernels, None):
        gradient = logits.clone()
        with mock.patch.object(linear_cross_entropy, "_kernels", lambda _, chosen=implementation: chosen):
            loss = linear_cross_entropy._to_gradient_(
                gradient, targets, weights, vocab_size=50_258, shard=WHOLE, terms=terms
            )
        results.append((loss, gradient.float()))
    (loss, gradient), (expected_loss, expected) = results
    relative = 1e-2 if dtype == torch.bfloat16 else 1e-4
    expect(torch.allclose(loss, expected_loss, rtol=1e-5, atol=1e-5), "the losses differ")
    expect(torch.allclose(gradient, expected, rtol=relative, atol=1e-7), "the gradients differ")
    expect(not gradient[:, 50_258:].any(), "padding rows have gradients")
    return {"gradient_difference": float((gradient - expected).abs().max())}


def compiled_gradients(flags: str, device: torch.device) -> dict:
    """Check the gradient of each parameter with compiled blocks against the one with uncompiled blocks.

    The loss and the norm of all gradients hide a wrong gradient of a small parameter. PyTorch has had such faults, in
    norms (pytorch#193061) and in FlexAttention (pytorch#158212, pytorch#165838).
    """
    require_compiler("--compile")
    expected, compiled = (gradients(f"{flags} {compile}", device) for compile in ("--no-compile", "--compile"))
    cosines = {name: float(torch.cosine_similarity(g, compiled[name], dim=0)) for name, g in expected.items()}
    name = min(cosines, key=lambda name: cosines[name] if math.isfinite(cosines[name]) else -math.inf)
    expect(cosines[name] > COSINE, f"the gradients of {name} have a cosine of {cosines[name]:.6f}")
    return {"smallest_cosine": cosines[name], "parameter": name}


def gradients(flags: str, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients by name of one micro-batch, each as a vector."""
    _, engine, _, steps = start(flags, device)
    batch = next(steps)[0]
    engine.backward([batch], batch.count)
    whole = {
        name: cast(DTensor, parameter.grad).full_tensor().flatten() for name, parameter in engine.named_parameters()
    }
    destroy_parallel()
    return whole


def expect(condition: bool, message: str) -> None:
    """Raise CheckError with the message unless the condition holds."""
    if not condition:
        raise CheckError(message)


def require_compiler(flags: str) -> None:
    """Skip a check that compiles where no C++ compiler is installed."""
    if "--compile" in flags.split() and cpp_compiler() is None:
        raise SkipCheck("needs a C++ compiler")
