"""The report of the step benchmark: figures of each implementation, ceilings and gates, as JSON and as tables."""

from dataclasses import asdict, dataclass
from statistics import median

import torch

from benchmarks.harness import environment, markdown_table, spread
from benchmarks.training_step.ceilings import Ceilings
from benchmarks.training_step.gates import gates
from benchmarks.training_step.implementations import Implementation, Shape
from benchmarks.training_step.options import Options
from benchmarks.training_step.work import palm_flops, required_flops
from megatron.training.device_info import peak_flops

PACKAGES = ("transformers", "litgpt", "lightning", "deepspeed")
PRODUCTS = ("forward", "input gradient", "weight gradient")
KINDS = ("causal", "full")
COLUMNS = ("ms/step", "min - max", "tokens/s", "mfu_palm", "util_ceiling", "util_exec", "step / floor")
COLUMNS += ("peak GB", "step GB", "loss diff", "norm diff")


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that a run measured, by name of the implementation unless noted."""

    ceilings: Ceilings
    exactness: dict[str, float]  # scored positions only against all, fp32: relative loss difference, gradient cosine
    parity: dict[str, dict[str, float] | None]  # largest relative differences of loss and gradient norm
    num_scored: dict[str, float]  # mean scored positions of a micro-batch, by `Implementation.batches`
    times: dict[str, list[float]]  # seconds per step, by round
    memory: dict[str, dict[str, int]]  # bytes; empty on a CPU


def describe(
    options: Options,
    shape: Shape,
    device: torch.device,
    *,
    implementations: list[Implementation],
    measurements: Measurements,
) -> dict:
    """Return the report that is written as JSON and printed as tables."""
    times = measurements.times
    figures = {
        implementation.name: _figures(options, shape, device, implementation=implementation, measurements=measurements)
        for implementation in implementations
    }
    return {
        "settings": asdict(options),
        "environment": environment(device, *PACKAGES),
        "ceilings": asdict(measurements.ceilings),
        "exactness": measurements.exactness,
        "seconds_per_step": times,
        "figures": figures,
        "gates": list(gates(options, device, times, figures)),
    }


def _figures(
    options: Options, shape: Shape, device: torch.device, *, implementation: Implementation, measurements: Measurements
) -> dict:
    """Return the row of an implementation: speed, utilisation, memory, and how closely it agrees with the reference."""
    name = implementation.name
    ceilings = measurements.ceilings
    positions = options.micro_batch_size * options.seq_length
    micro_batches = options.micro_batches
    peak = peak_flops(device)
    step_seconds = median(measurements.times[name])
    tokens_per_second = positions * micro_batches / step_seconds
    work = positions, measurements.num_scored[implementation.batches], implementation.objective == "ar"
    floor = None
    if implementation.system == "ours" and not implementation.dropout:
        floor = ceilings.floor(shape, *work, micro_batches=micro_batches)
    return {
        "tokens_per_second": tokens_per_second,
        "mfu_palm": palm_flops(shape) * tokens_per_second / peak if peak else None,
        "util_ceiling": palm_flops(shape) * tokens_per_second / ceilings.matmul,
        "util_exec": micro_batches * required_flops(shape, *work) / step_seconds / ceilings.matmul,
        "floor_seconds": floor,
        "step_over_floor": floor and step_seconds / floor,
        "memory_bytes": measurements.memory.get(name),
        "parity": measurements.parity.get(name),
    }


def tables(report: dict) -> str:
    """Return the report as Markdown tables."""
    settings = report["settings"]
    ceilings = report["ceilings"]
    exactness = report["exactness"]
    lines = [
        f"bf16; {settings['micro_batches']} x {settings['micro_batch_size']} x {settings['seq_length']} tokens a step; "
        f"scored positions only against all, in fp32: relative loss difference {exactness['loss']:.1e}, "
        f"gradient cosine {exactness['cosine']:.8f}\n",
        f"{ceilings_line(Ceilings(**ceilings))}\n",
    ]
    layers = [(name, *(_tera(rates[product]) for product in PRODUCTS)) for name, rates in ceilings["layers"].items()]
    lines.append(markdown_table(("linear layer, TFLOP/s", *PRODUCTS), layers))
    attention = [(name, *(_tera(rates.get(kind)) for kind in KINDS)) for name, rates in ceilings["attention"].items()]
    lines.append(markdown_table(("attention, forward and backward, TFLOP/s", *KINDS), attention))
    seconds_per_step = report["seconds_per_step"]
    rows = [(name, *_row(seconds, report["figures"][name])) for name, seconds in seconds_per_step.items()]
    lines.append(markdown_table(("implementation", *COLUMNS), rows))
    gates = [(gate["what"], *spread(gate["values"]), *_verdict(gate)) for gate in report["gates"]]
    lines.append(markdown_table(("gate", "median", "min - max", "bound", ""), gates))
    return "\n".join(lines)


def ceilings_line(ceilings: Ceilings) -> str:
    """Return the rates of the large matmul and of a copy as a line."""
    return f"ceilings: matmul {_tera(ceilings.matmul)} TFLOP/s, copy {ceilings.copy / 1e9:.1f} GB/s"


def _row(seconds: list[float], figures: dict) -> list[str]:
    memory = figures["memory_bytes"] or {}
    parity = figures["parity"] or {}
    return [
        *spread(seconds, ".1f", unit=1e-3),
        f"{figures['tokens_per_second']:.0f}",
        *(_cell(figures[name], ".3f") for name in ("mfu_palm", "util_ceiling", "util_exec")),
        _cell(figures["step_over_floor"], ".2f"),
        *(_cell(memory.get(name), ".1f", 1e9) for name in ("peak", "step")),
        *(_cell(parity.get(name), ".1e") for name in ("loss", "gradient norm")),
    ]


def _cell(value: float | None, format_spec: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, format_spec)


def _tera(rate: float | None) -> str:
    return _cell(rate, ".3f" if rate and rate < 1e13 else ".0f", 1e12)


def _verdict(gate: dict) -> tuple[str, str]:
    if gate["passed"] is None:
        return "-", ""
    bound = f"<= {gate['at_most']:.3g}" if gate["at_least"] is None else f">= {gate['at_least']:.3g}"
    return bound, "pass" if gate["passed"] else "FAIL"
