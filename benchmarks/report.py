"""What the benchmark of steps says: figures of each contestant, ceilings, and gates; as numbers and as tables.

A gate compares the median over rounds with a bound. It is reported, not enforced.
"""

import platform
from dataclasses import asdict, dataclass
from datetime import date
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.contestants import PEERS, Contestant, Shape, version
from benchmarks.work import asked_flops, palm_flops
from megatron.training.device_info import peak_flops
from megatron.training.environment import device_name

PACKAGES = ("torch", "transformers", "litgpt", "lightning", "deepspeed")
BEST_PEER = "best compiled AR peer"

# on a CPU: (contestant, at least so many times as fast, as which other); None is reported only
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
# as their users run them: a run of ours has no dropout unless it is asked for, the published scripts have it; then
# equal dropout
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


class Aims(NamedTuple):
    """What a GPU is held to at one size, with samples of 2048 tokens; None is reported only."""

    utilisation: float | None = None  # of our AR step: util_ceiling at least
    scored: float | None = None  # MDM with the head at scored positions : at all, at least
    peer: float | None = None  # AR : the fastest compiled peer, at least
    published: float | None = None  # MDM : published at equal dropout, at least
    floor: float | None = None  # step / component floor at most


GPU = {
    "140M": Aims(0.52, 1.07, 1.08, 2.5, 1.12),
    "425M": Aims(0.60, 1.04, 1.06, 1.8, 1.10),
    "1018M": Aims(0.64, 1.025, 1.04, 1.6, 1.08),
    "2283M": Aims(0.66, 1.01, 1.03, 1.4, 1.08),
}
MDM_TO_AR = 0.93  # at every size


@dataclass(frozen=True)
class Found:
    """What a run measured; by the names of contestants, but for `rows`."""

    ceilings: Ceilings
    exactness: dict[str, float]  # scored positions only and all, in fp32: relative loss, gradient cosine
    parity: dict[str, dict[str, float]]  # largest relative differences of loss and gradient norm
    rows: dict[str, float]  # scored positions of a mean micro-batch, by kind of batches
    times: dict[str, list[float]]  # seconds of a step, one a round
    memory: dict[str, dict[str, int]]  # bytes; empty on a CPU


def describe(options, shape: Shape, device: torch.device, contestants: list[Contestant], found: Found) -> dict:
    """Return everything that the tables and the JSON say."""
    ceilings, times = found.ceilings, found.times
    positions, each = options.micro_batch_size * options.seq_length, options.micro_batches
    figures = {}
    for contestant in contestants:
        step, causal = median(times[contestant.name]), contestant.objective == "ar"
        work = positions, found.rows[contestant.batches], causal
        speed, peak = positions * each / step, peak_flops(device)
        floor = None
        if contestant.system == "ours" and not contestant.dropout:
            floor = ceilings.floor(shape, *work, micro_batches=each)
        figures[contestant.name] = {
            "tokens_per_second": speed,
            "mfu_palm": palm_flops(shape) * speed / peak if peak else None,
            "util_ceiling": palm_flops(shape) * speed / ceilings.matmul,
            "util_exec": each * asked_flops(shape, *work) / step / ceilings.matmul,
            "floor_seconds": floor,
            "step_over_floor": floor and step / floor,
            "memory_bytes": found.memory.get(contestant.name),
            "parity": found.parity.get(contestant.name),
        }
    return {
        "settings": asdict(options),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": device_name(device),
        "device": device.type,
        "date": date.today().isoformat(),
        "ceilings": asdict(ceilings),
        "exactness": found.exactness,
        "seconds_per_step": times,
        "figures": figures,
        "gates": list(gates(options, device, times, figures)),
    }


def gates(options, device: torch.device, times: dict[str, list[float]], figures: dict):
    """Yield the comparisons that can be made."""
    aims = GPU.get(options.model_size, Aims()) if options.seq_length == 2048 else Aims()
    pairs = CPU + cpu_published(options.seq_length) if device.type == "cpu" else gpu(aims)
    rivals = [f"{peer} AR compiled" for peer, (objective, _) in PEERS.items() if objective == "ar"]
    rivals = sorted((name for name in rivals if name in times), key=lambda name: median(times[name]))
    for name, bound, other in pairs:
        other = rivals[0] if other == BEST_PEER and rivals else other
        if name in times and other in times:
            ratios = [theirs / own for own, theirs in zip(times[name], times[other], strict=True)]
            yield gate(f"{name} : {other}", ratios, at_least=bound)
    if device.type == "cpu":
        return
    for name in ("ours AR compiled", "ours MDM compiled"):
        if name in times:
            step, found = median(times[name]), figures[name]
            if name == "ours AR compiled":
                shares = [found["util_ceiling"] * step / seconds for seconds in times[name]]
                yield gate(f"{name}, util_ceiling", shares, at_least=aims.utilisation)
            floors = [seconds / found["floor_seconds"] for seconds in times[name]]
            yield gate(f"{name}, step / floor", floors, at_most=aims.floor)


def cpu_published(seq_length: int) -> tuple[tuple[str, float | None, str], ...]:
    """Return what is compared with the published system; the longer samples are, the more its squares cost."""
    bound = PUBLISHED_LONG if seq_length >= 2048 else PUBLISHED_SHORT
    name, other = PUBLISHED_GATED
    return (name, bound, other), *((name, None, other) for name, other in PUBLISHED_REPORTED)


def gpu(aims: Aims) -> tuple[tuple[str, float | None, str], ...]:
    """Return (contestant, at least so many times as fast, as which other) on CUDA."""
    return (
        ("ours MDM compiled", MDM_TO_AR, "ours AR compiled"),
        ("ours MDM compiled", aims.scored, "ours MDM full head compiled"),
        ("ours AR compiled", aims.peer, BEST_PEER),
        ("ours MDM compiled", aims.published, "published MDM eager"),
        ("ours MDM dropout compiled", aims.published, "published MDM dropout eager"),
        ("ours MDM compiled", None, "dllm MDM compiled"),
        ("ours AR compiled", None, "published AR eager"),
        ("ours AR dropout compiled", None, "published AR dropout eager"),
    )


def gate(what: str, values: list[float], at_least: float | None = None, at_most: float | None = None) -> dict:
    """Return one line of the table of gates; without a bound it passes and fails nothing."""
    middle, passed = median(values), None
    if at_least is not None:
        passed = middle >= at_least
    if at_most is not None:
        passed = middle <= at_most
    return {
        "what": what, "values": values, "median": middle, "at_least": at_least, "at_most": at_most, "passed": passed
    }  # fmt: skip


def show(report: dict) -> None:
    settings, ceilings, exact = report["settings"], report["ceilings"], report["exactness"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    thread = ", one thread" if report["device"] == "cpu" else ""
    print(f"{report['date']}, {report['machine']}{thread}, bf16; {versions}")
    print(
        f"{settings['micro_batches']} x {settings['micro_batch_size']} x {settings['seq_length']} tokens a step; "
        f"scored positions only and all, in fp32: loss off by {exact['loss']:.1e}, "
        f"gradient cosine {exact['cosine']:.8f}\n"
    )
    print(f"ceilings: product {_tera(ceilings['matmul'])} TFLOP/s, copy {ceilings['copy'] / 1e9:.1f} GB/s\n")
    passes = ("forward", "input gradient", "weight gradient")
    table("linear layer, TFLOP/s", passes, {
        name: [_tera(rates[each]) for each in passes] for name, rates in ceilings["layers"].items()
    })  # fmt: skip
    table("attention, forward and backward, TFLOP/s", ("causal", "full"), {
        name: [_tera(rates.get(each)) for each in ("causal", "full")] for name, rates in ceilings["attention"].items()
    })  # fmt: skip
    columns = ("ms a step", "min - max", "tokens/s", "mfu_palm", "util_ceiling", "util_exec", "step / floor")
    columns += ("peak GB", "step GB", "loss off", "norm off")
    table("contestant", columns, {
        name: _row(seconds, report["figures"][name]) for name, seconds in report["seconds_per_step"].items()
    })  # fmt: skip
    table("gate", ("median", "min - max", "bound", ""), {
        each["what"]: [
            f"{each['median']:.2f}", f"{min(each['values']):.2f} - {max(each['values']):.2f}", *_verdict(each)
        ] for each in report["gates"]
    })  # fmt: skip


def table(title: str, columns: tuple[str, ...], lines: dict[str, list[str]]) -> None:
    print(f"| {' | '.join((title, *columns))} |\n|{'---|' * (1 + len(columns))}")
    for name, cells in lines.items():
        print(f"| {' | '.join((name, *cells))} |")
    print()


def _row(seconds: list[float], figures: dict) -> list[str]:
    low, middle, high = (1000 * value for value in (min(seconds), median(seconds), max(seconds)))
    memory, parity = figures["memory_bytes"] or {}, figures["parity"] or {}
    return [
        f"{middle:.1f}",
        f"{low:.1f} - {high:.1f}",
        f"{figures['tokens_per_second']:.0f}",
        *(_cell(figures[name], ".3f") for name in ("mfu_palm", "util_ceiling", "util_exec")),
        _cell(figures["step_over_floor"], ".2f"),
        *(_cell(memory.get(name), ".1f", 1e9) for name in ("peak", "step")),
        *(_cell(parity.get(name), ".1e") for name in ("loss", "gradient norm")),
    ]


def _cell(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def _tera(rate: float | None) -> str:
    return _cell(rate, ".3f" if rate and rate < 1e13 else ".0f", 1e12)


def _verdict(gate: dict) -> tuple[str, str]:
    if gate["passed"] is None:
        return "-", ""
    bound = f"<= {gate['at_most']:.3g}" if gate["at_least"] is None else f">= {gate['at_least']:.3g}"
    return bound, "pass" if gate["passed"] else "FAIL"
