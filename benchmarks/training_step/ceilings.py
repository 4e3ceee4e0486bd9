"""Measured rates of the device in bf16: a large matmul, a copy, and every matmul and attention of the benchmark model.

The component floor is the time of a step in which each matmul runs at the rate measured alone at the shape of one
micro-batch, attention at the rate of the fastest kernel, and everything else at the bandwidth of a copy:

    sum over linear layers of FLOPs / measured rate at its shape (forward and both gradients)
    + blocks x measured time of attention, forward and backward
    + bytes (`work.bytes_moved`) / measured bandwidth of a copy
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.harness import clock
from benchmarks.training_step.implementations import Shape
from benchmarks.training_step.work import attention_flops, bytes_moved, linears

MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the large matmul
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # larger than any cache
SUSTAINED_SECONDS = {"cuda": 2.0, "cpu": 0.3}  # per timing window of the large matmul, until clock speeds settle
BRIEF_SECONDS = {"cuda": 0.1, "cpu": 0.02}  # per timing window of everything else
NUM_WINDOWS = 3
KERNELS = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cpu": (),
}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. Layers are keyed by "inputs x outputs", attention by kernel, then "causal" or "full"."""

    matmul: float  # FLOP/s
    copy: float  # bytes read plus bytes written, per second
    layers: dict[str, dict[str, float]]  # FLOP/s of forward, input gradient and weight gradient
    attention: dict[str, dict[str, float]]  # FLOP/s of forward plus backward; causal attention counts half the FLOPs

    def floor(self, shape: Shape, positions: int, num_scored: float, causal: bool, micro_batches: int) -> float:
        """Return the component floor of a step in seconds."""
        matmul_seconds = sum(
            2 * count * inputs * outputs / rate
            for count, inputs, outputs in linears(shape, positions, num_scored)
            for rate in self.layers[_layer_key(inputs, outputs)].values()
        )
        kind = "causal" if causal else "full"
        attention_rate = max(rates[kind] for rates in self.attention.values() if kind in rates)
        attention_seconds = attention_flops(shape, positions, causal) / attention_rate
        copy_seconds = bytes_moved(shape, positions, num_scored, micro_batches) / self.copy
        return micro_batches * (matmul_seconds + attention_seconds) + copy_seconds


def measure(shape: Shape, micro_batch_size: int, device: torch.device) -> Ceilings:
    """Return the measured rates of `device`, at the shape of one micro-batch."""
    torch.manual_seed(1)
    matmul = _matmul_rate(device)
    copy = _copy_rate(device)
    positions = micro_batch_size * shape.seq_length
    sizes = dict.fromkeys((inputs, outputs) for _, inputs, outputs in linears(shape, 1, 1))  # without duplicates
    layers = {
        _layer_key(*size): _layer_rates(positions, *size, device) for size in tqdm(sizes, "ceilings", leave=False)
    }
    attention = {"default": dict(_attention_rates(shape, micro_batch_size, None, device))}
    for kernel in KERNELS[device.type]:
        name = kernel.name.removesuffix("_ATTENTION").lower()
        attention[name] = dict(_attention_rates(shape, micro_batch_size, kernel, device))
    return Ceilings(matmul, copy, layers, attention)


def fastest(run: Callable[[], object], device: torch.device, window_seconds: dict[str, float] = BRIEF_SECONDS) -> float:
    """Return the seconds per call in the fastest of `NUM_WINDOWS` windows of about `window_seconds` each."""
    run()
    start = clock(device)
    run()
    count = max(1, round(window_seconds[device.type] / max(clock(device) - start, 1e-6)))
    windows = []
    for _ in range(NUM_WINDOWS):
        start = clock(device)
        for _ in range(count):
            run()
        windows.append((clock(device) - start) / count)
    return min(windows)


def _matmul_rate(device: torch.device) -> float:
    side = MATMUL_SIDE[device.type]
    left, right = _random(device, side, side), _random(device, side, side)
    return 2 * side**3 / fastest(lambda: left @ right, device, SUSTAINED_SECONDS)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / fastest(lambda: target.copy_(source), device)


def _layer_key(inputs: int, outputs: int) -> str:
    return f"{inputs} x {outputs}"


def _layer_rates(positions: int, inputs: int, outputs: int, device: torch.device) -> dict[str, float]:
    hidden = _random(device, positions, inputs)
    weight = _random(device, outputs, inputs)
    gradient = _random(device, positions, outputs)
    products = {
        "forward": lambda: hidden @ weight.T,
        "input gradient": lambda: gradient @ weight,
        "weight gradient": lambda: gradient.T @ hidden,
    }
    flops = 2 * positions * inputs * outputs
    return {name: flops / fastest(product, device) for name, product in products.items()}


def _attention_rates(
    shape: Shape, samples: int, kernel: SDPBackend | None, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield ("causal" or "full", FLOP/s) of a kernel, or of PyTorch's choice, in the memory layout of the model."""
    model = shape.model
    size = samples, shape.seq_length, model.num_attention_heads, model.head_size
    heads = [_random(device, *size).transpose(1, 2).requires_grad_() for _ in range(3)]
    gradient = _random(device, *size).transpose(1, 2)
    for kind, causal in (("causal", True), ("full", False)):

        def forward_and_backward(causal=causal):
            torch.autograd.grad(F.scaled_dot_product_attention(*heads, is_causal=causal), heads, gradient)

        try:
            with sdpa_kernel(kernel) if kernel else nullcontext():
                seconds = fastest(forward_and_backward, device)
        except RuntimeError:  # the kernel does not support this shape or device
            continue
        yield kind, attention_flops(shape, samples * shape.seq_length, causal) / model.depth / seconds


def _random(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device).bfloat16()
