"""What a device says of time and memory: all that the benchmark of steps asks of CUDA itself."""

import time

import torch


def clock(device: torch.device) -> float:
    """Return the CPU seconds of this process, so that other load counts less; on CUDA wall time, when it is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def start_memory(device: torch.device) -> int | None:
    """Return the bytes that are taken now, and measure the peak from here; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that were taken since `start_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
