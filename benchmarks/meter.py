"""Clock and memory counters of a device: the only calls of the step benchmark that depend on CUDA."""

import time

import torch


def clock(device: torch.device) -> float:
    """Return a time in seconds: wall-clock time after a synchronisation on CUDA, CPU time of the process on a CPU.

    CPU time is less sensitive to other load on the machine.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def start_memory(device: torch.device) -> int | None:
    """Return the bytes allocated now and reset the peak counter; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of allocated bytes since `start_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
