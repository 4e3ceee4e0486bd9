"""Peak FLOP/s and memory of the device."""

import os
import resource

import torch

# dense bf16 peaks in FLOP/s from vendor data sheets; no MFU for devices that are not listed
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float:
    """Return the bf16 peak of one device in FLOP/s, or 0 if it is not listed."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory(device: torch.device) -> int:
    """Return the memory in bytes: of the GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
