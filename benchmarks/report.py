"""The report of the step benchmark: figures of each implementation, ceilings and gates, as JSON and as tables.

A gate compares the median over rounds with a bound. It is reported, not enforced.
"""

import platform
from dataclasses import asdict, dataclass
from datetime import date
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.contestants import PEERS, Implementation, Shape, version
from benchmarks.work import palm_flops, required_flops
from megatron.training.device_info import peak_flops
from megatron.training.environment import device_name

PACKAGES = ("torch", "transformers", "litgpt", "lightning", "deepspeed")
BEST_PEER = "best compiled AR peer"

# on a CPU: (implementation, lower bound of its speedup, over which other); None: reported only
CPU = (
    ("ours AR eager", 1.15, "litgpt AR eager"),
    ("ours AR eager", 1.30, "transformers AR eager"),
    ("ours AR compiled", 1.15, "litgpt AR eager"),
    ("ours AR compiled", 1.30, "transformers AR eager"),
    ("ours AR compiled", 1.00, "litgpt AR compiled"),
    ("ours AR compiled", 1.00, "transformers AR compiled"),
    ("ours AR compiled", 1.00, "nanogpt AR compiled"),
    ("ours MDM eager", 1.00, "ours AR eager"),
    ("ours MDM compiled", 1.00, "ours AR compiled"),
    ("ours MDM compiled", 1.00, "ours MDM full head compiled"),
    ("ours MDM compiled", 2.00, "dllm MDM eager"),
)
# each with its defaults: no dropout in ours, dropout in the published scripts; the pairs below have equal dropout
PUBLISHED_GATED = ("ours MDM compiled", "published MDM dropout eager")
PUBLISHED_SHORT, PUBLISHED_LONG = 1.5, 2.5  # below and from 2048 tokens a sample
PUBLISHED_REPORTED = (
    ("ours MDM compiled", "published MDM eager"),
    ("ours MDM dropout compiled", "published MDM dropout eager"),
    ("ours MDM dropout eager", "published MDM dropout eager"),
    ("ours AR compiled", "published AR eager"),
    ("ours AR dropout compiled", "published AR dropout eager"),
    ("ours AR dropout eager", "published AR dropout eager"),
)


class Bounds(NamedTuple):
    """Bounds of the gates on a GPU at one size, for samples of 2048 tokens; None: reported only."""

    utilisation: float | None = None  # lower bound of util_ceiling, our AR step
    scored: float | None = None  # lower bound of the speedup of MDM with the head at scored positions only
    peer: float | None = None  # lower bound of the speedup of AR over the fastest compiled peer
    published: float | None = None  # lower bound of the speedup of MDM over published at equal dropout
    floor: float | None = None  # upper bound of step / component floor


GPU = {
    "140M": Bounds(0.52, 1.07, 1.08, 2.5, 1.12),
    "425M": Bounds(0.60, 1.04, 1.06, 1.8, 1.10),
    "1018M": Bounds(0.64, 1.025, 1.04, 1.6, 1.08),
    "2283M": Bounds(0.66, 1.01, 1.03, 1.4, 1.08),
}
MDM_TO_AR = 0.93  # at every size


@dataclass(frozen=True)
class Measurements:
    """Everything that a run measured, by name of the implementation unless noted."""

    ceilings: Ceilings
    exactness: dict[str, float]  # scored positions only against all, fp32: relative loss difference, gradient cosine
    parity: dict[str, dict[str, float]]  # largest relative differences of loss and gradient norm
    num_scored: dict[str, float]  # mean scored positions of a micro-batch, by `Implementation.batches`
    times: dict[str, list[float]]  # seconds per step, one value per round
    memory: dict[str, dict[str, int]]  # bytes; empty on a CPU


def describe(
    options, shape: Shape, device: torch.device, implementations: list[Implementation], measurements: Measurements
) -> dict:
    """Return the report that is written as JSON and printed as tables."""
    ceilings = measurements.ceilings
    times = measurements.times
    positions = options.micro_batch_size * options.seq_length
    micro_batches = options.micro_batches
    peak = peak_flops(device)
    figures = {}
    for implementation in implementations:
        name = implementation.name
        step_seconds = median(times[name])
        tokens_per_second = positions * micro_batches / step_seconds
        work = positions, measurements.num_scored[implementation.batches], implementation.objective == "ar"
        floor = None
        if implementation.system == "ours" and not implementation.dropout:
            floor = ceilings.floor(shape, *work, micro_batches=micro_batches)
        figures[name] = {
            "tokens_per_second": tokens_per_second,
            "mfu_palm": palm_flops(shape) * tokens_per_second / peak if peak else None,
            "util_ceiling": palm_flops(shape) * tokens_per_second / ceilings.matmul,
            "util_exec": micro_batches * required_flops(shape, *work) / step_seconds / ceilings.matmul,
            "floor_seconds": floor,
            "step_over_floor": floor and step_seconds / floor,
            "memory_bytes": measurements.memory.get(name),
            "parity": measurements.parity.get(name),
        }
    return {
        "settings": asdict(options),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": device_name(device),
        "device": device.type,
        "date": date.today().isoformat(),
        "ceilings": asdict(ceilings),
        "exactness": measurements.exactness,
        "seconds_per_step": times,
        "figures": figures,
        "gates": list(gates(options, device, times, figures)),
    }


def gates(options, device: torch.device, times: dict[str, list[float]], figures: dict):
    """Yield the gates of all pairs that were timed."""
    bounds = GPU.get(options.model_size, Bounds()) if options.seq_length == 2048 else Bounds()
    pairs = CPU + cpu_published(options.seq_length) if device.type == "cpu" else gpu(bounds)
    peers = [f"{peer} AR compiled" for peer, (objective, _) in PEERS.items() if objective == "ar"]
    peers = sorted((name for name in peers if name in times), key=lambda name: median(times[name]))
    for name, bound, other in pairs:
        other = peers[0] if other == BEST_PEER and peers else other
        if name in times and other in times:
            speedups = [
                other_seconds / seconds for seconds, other_seconds in zip(times[name], times[other], strict=True)
            ]
            yield gate(f"{name} : {other}", speedups, at_least=bound)
    if device.type == "cpu":
        return
    for name in ("ours AR compiled", "ours MDM compiled"):
        if name in times:
            if name == "ours AR compiled":
                median_seconds = median(times[name])
                utilisations = [figures[name]["util_ceiling"] * median_seconds / seconds for seconds in times[name]]
                yield gate(f"{name}, util_ceiling", utilisations, at_least=bounds.utilisation)
            floor_ratios = [seconds / figures[name]["floor_seconds"] for seconds in times[name]]
            yield gate(f"{name}, step / floor", floor_ratios, at_most=bounds.floor)


def cpu_published(seq_length: int) -> tuple[tuple[str, float | None, str], ...]:
    """Return the pairs with the published system; its score matrices make it slower the longer the samples are."""
    bound = PUBLISHED_LONG if seq_length >= 2048 else PUBLISHED_SHORT
    name, other = PUBLISHED_GATED
    return (name, bound, other), *((name, None, other) for name, other in PUBLISHED_REPORTED)


def gpu(bounds: Bounds) -> tuple[tuple[str, float | None, str], ...]:
    """Return the pairs on CUDA: (implementation, lower bound of its speedup, over which other)."""
    return (
        ("ours MDM compiled", MDM_TO_AR, "ours AR compiled"),
        ("ours MDM compiled", bounds.scored, "ours MDM full head compiled"),
        ("ours AR compiled", bounds.peer, BEST_PEER),
        ("ours MDM compiled", bounds.published, "published MDM eager"),
        ("ours MDM dropout compiled", bounds.published, "published MDM dropout eager"),
        ("ours MDM compiled", None, "dllm MDM compiled"),
        ("ours AR compiled", None, "published AR eager"),
        ("ours AR dropout compiled", None, "published AR dropout eager"),
    )


def gate(what: str, values: list[float], at_least: float | None = None, at_most: float | None = None) -> dict:
    """Return one row of the table of gates; `passed` is None without a bound."""
    median_value = median(values)
    passed = None
    if at_least is not None:
        passed = median_value >= at_least
    if at_most is not None:
        passed = median_value <= at_most
    return {
        "what": what,
        "values": values,
        "median": median_value,
        "at_least": at_least,
        "at_most": at_most,
        "passed": passed,
    }


def show(report: dict) -> None:
    """Print the report as Markdown tables."""
    settings = report["settings"]
    ceilings = report["ceilings"]
    exactness = report["exactness"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    thread = ", one thread" if report["device"] == "cpu" else ""
    print(f"{report['date']}, {report['machine']}{thread}, bf16; {versions}")
    print(
        f"{settings['micro_batches']} x {settings['micro_batch_size']} x {settings['seq_length']} tokens a step; "
        f"scored positions only against all, in fp32: relative loss difference {exactness['loss']:.1e}, "
        f"gradient cosine {exactness['cosine']:.8f}\n"
    )
    print(f"ceilings: matmul {_tera(ceilings['matmul'])} TFLOP/s, copy {ceilings['copy'] / 1e9:.1f} GB/s\n")
    products = ("forward", "input gradient", "weight gradient")
    table("linear layer, TFLOP/s", products, {
        name: [_tera(rates[product]) for product in products] for name, rates in ceilings["layers"].items()
    })  # fmt: skip
    kinds = ("causal", "full")
    table("attention, forward and backward, TFLOP/s", kinds, {
        name: [_tera(rates.get(kind)) for kind in kinds] for name, rates in ceilings["attention"].items()
    })  # fmt: skip
    columns = ("ms/step", "min - max", "tokens/s", "mfu_palm", "util_ceiling", "util_exec", "step / floor")
    columns += ("peak GB", "step GB", "loss diff", "norm diff")
    table("implementation", columns, {
        name: _row(seconds, report["figures"][name]) for name, seconds in report["seconds_per_step"].items()
    })  # fmt: skip
    table("gate", ("median", "min - max", "bound", ""), {
        gate["what"]: [
            f"{gate['median']:.2f}", f"{min(gate['values']):.2f} - {max(gate['values']):.2f}", *_verdict(gate)
        ] for gate in report["gates"]
    })  # fmt: skip


def table(title: str, columns: tuple[str, ...], lines: dict[str, list[str]]) -> None:
    """Print a Markdown table; `lines` maps the first cell of a row to the others."""
    print(f"| {' | '.join((title, *columns))} |\n|{'---|' * (1 + len(columns))}")
    for name, cells in lines.items():
        print(f"| {' | '.join((name, *cells))} |")
    print()


def _row(seconds: list[float], figures: dict) -> list[str]:
    memory = figures["memory_bytes"] or {}
    parity = figures["parity"] or {}
    return [
        f"{1000 * median(seconds):.1f}",
        f"{1000 * min(seconds):.1f} - {1000 * max(seconds):.1f}",
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
