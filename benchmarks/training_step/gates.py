"""Gates: the median over rounds of a ratio or a utilisation against a bound. They are reported, not enforced."""

from statistics import median
from typing import NamedTuple

import torch

from benchmarks.harness import ratios
from benchmarks.training_step.options import Options
from benchmarks.training_step.peers import PEERS

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
    memory: float | None = None  # upper bound of the peak in bytes, micro-batches of 16 samples, no recomputation
    target: float | None = None  # of util_ceiling, above its bound


GPU = {
    "140M": Bounds(utilisation=0.52, scored=1.07, peer=1.08, published=2.5, floor=1.12, memory=20e9, target=0.57),
    "425M": Bounds(utilisation=0.60, scored=1.04, peer=1.06, published=1.8, floor=1.10, memory=40e9, target=0.65),
    "1018M": Bounds(utilisation=0.64, scored=1.025, peer=1.04, published=1.6, floor=1.08, memory=70e9, target=0.69),
    "2283M": Bounds(utilisation=0.66, scored=1.01, peer=1.03, published=1.4, floor=1.08, memory=125e9, target=0.72),
}
MDM_TO_AR = 0.93  # at every size


def gates(options: Options, device: torch.device, times: dict[str, list[float]], figures: dict):
    """Yield the gates of all pairs that were timed."""
    bounds = GPU.get(options.model_size, Bounds()) if options.seq_length == 2048 else Bounds()
    pairs = CPU + cpu_published(options.seq_length) if device.type == "cpu" else gpu(bounds)
    peers = [f"{peer} AR compiled" for peer, (objective, _) in PEERS.items() if objective == "ar"]
    peers = sorted((name for name in peers if name in times), key=lambda name: median(times[name]))
    for name, bound, other in pairs:
        other = peers[0] if other == BEST_PEER and peers else other
        if name in times and other in times:
            yield gate(f"{name} : {other}", ratios(times[other], times[name]), at_least=bound)
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
