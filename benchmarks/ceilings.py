"""What the device gives in bf16: a large product, a copy, and every product and attention of the benchmark's network.

The component floor is the time that a step takes if each of its products runs as fast as it does alone at the shape of
one micro-batch, attention as fast as with the fastest kernel, and all else moves its bytes at the speed of a copy:

    sum over linear layers of FLOPs / measured rate of its shape (forward and both gradients)
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

from benchmarks.contestants import Shape
from benchmarks.meter import clock
from benchmarks.work import attention_flops, bytes_moved, linears

SQUARE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the large product
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes, more than any cache holds
SUSTAINED = {"cuda": 2.0, "cpu": 0.3}  # seconds that a window of the large product lasts, until clocks have settled
BRIEF = {"cuda": 0.2, "cpu": 0.02}  # of all else
WINDOWS = 3
KERNELS = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cpu": (),
}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. A layer goes by "inputs x outputs", attention by its kernel and "causal" or "full"."""

    matmul: float  # FLOP/s
    copy: float  # bytes read and written a second
    layers: dict[str, dict[str, float]]  # FLOP/s of forward, input gradient and weight gradient
    attention: dict[str, dict[str, float]]  # FLOP/s of forward and backward, the causal half or the whole square

    def floor(self, shape: Shape, positions: int, rows: float, causal: bool, micro_batches: int) -> float:
        """Return the component floor of a step in seconds."""
        products = sum(
            2 * count * inputs * outputs / rate
            for count, inputs, outputs in linears(shape, positions, rows)
            for rate in self.layers[_layer(inputs, outputs)].values()
        )
        kind = "causal" if causal else "full"
        fastest = max(rates[kind] for rates in self.attention.values() if kind in rates)
        attention = attention_flops(shape, positions, causal) / fastest
        moved = bytes_moved(shape, positions, rows, micro_batches) / self.copy
        return micro_batches * (products + attention) + moved


def measure(shape: Shape, micro_batch_size: int, device: torch.device) -> Ceilings:
    """Measure all that `Ceilings` holds, at the shape of one micro-batch."""
    torch.manual_seed(1)
    matmul, copy = _square_rate(device), _copy_rate(device)
    positions = micro_batch_size * shape.seq_length
    sizes = dict.fromkeys((inputs, outputs) for _, inputs, outputs in linears(shape, 1, 1))
    layers = {_layer(*pair): _layer_rates(positions, *pair, device) for pair in tqdm(sizes, "ceilings", leave=False)}
    attention = {"default": dict(_attention_rates(shape, micro_batch_size, None, device))}
    for kernel in KERNELS[device.type]:
        name = kernel.name.removesuffix("_ATTENTION").lower()
        attention[name] = dict(_attention_rates(shape, micro_batch_size, kernel, device))
    return Ceilings(matmul, copy, layers, attention)


def fastest(run: Callable[[], object], device: torch.device, seconds: dict[str, float] = BRIEF) -> float:
    """Return the seconds of one call in the fastest of some windows, each of which lasts at least about `seconds`."""
    run()
    start = clock(device)
    run()
    count = max(1, round(seconds[device.type] / max(clock(device) - start, 1e-6)))
    windows = []
    for _ in range(WINDOWS):
        start = clock(device)
        for _ in range(count):
            run()
        windows.append((clock(device) - start) / count)
    return min(windows)


def _square_rate(device: torch.device) -> float:
    side = SQUARE[device.type]
    left, right = _random(device, side, side), _random(device, side, side)
    return 2 * side**3 / fastest(lambda: left @ right, device, SUSTAINED)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / fastest(lambda: target.copy_(source), device)


def _layer(inputs: int, outputs: int) -> str:
    return f"{inputs} x {outputs}"


def _layer_rates(positions: int, inputs: int, outputs: int, device: torch.device) -> dict[str, float]:
    given, weight = _random(device, positions, inputs), _random(device, outputs, inputs)
    gradient = _random(device, positions, outputs)
    products = {
        "forward": lambda: given @ weight.T,
        "input gradient": lambda: gradient @ weight,
        "weight gradient": lambda: gradient.T @ given,
    }
    flops = 2 * positions * inputs * outputs
    return {name: flops / fastest(product, device) for name, product in products.items()}


def _attention_rates(
    shape: Shape, samples: int, kernel: SDPBackend | None, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield the rates of a kernel, or of PyTorch's own choice, for heads as the model lays them out."""
    model = shape.model
    size = samples, shape.seq_length, model.num_attention_heads, model.head_size
    heads = [_random(device, *size).transpose(1, 2).requires_grad_() for _ in range(3)]
    gradient = _random(device, *size).transpose(1, 2)
    for kind, causal in (("causal", True), ("full", False)):

        def both(causal=causal):
            torch.autograd.grad(F.scaled_dot_product_attention(*heads, is_causal=causal), heads, gradient)

        try:
            with sdpa_kernel(kernel) if kernel else nullcontext():
                seconds = fastest(both, device)
        except RuntimeError:  # the kernel is not for this shape or device
            continue
        yield kind, attention_flops(shape, samples * shape.seq_length, causal) / model.num_layers / seconds


def _random(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device).bfloat16()
