"""Training steps on a CUDA device without memory and kernels, which a CPU build of PyTorch takes with fake tensors.

    FAKE_CUDA=fake_cuda.so python -m tests.fake_cuda "--objective mdm --bf16 --no-compile" ...

prints a line of JSON for each line of flags: the number of operators of a step, or its error. Shapes, dtypes and
devices are those of a GPU. Operands on different devices, and results that the host would have to wait for, are errors.
tests/test_fake_cuda.py compiles the library.
"""

import ctypes
import json
import os
import sys
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from unittest import mock

ctypes.CDLL(os.environ["FAKE_CUDA"], mode=ctypes.RTLD_GLOBAL)  # before PyTorch looks for hooks of CUDA

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_checks import checks
from megatron.batch import Batch
from megatron.config.sections import OptimizerConfig
from megatron.model.transformer import Transformer
from megatron.parallel import apply
from megatron.parallel.mesh import build_parallel_context
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.averaging import Average
from megatron.training.step import train_step

DEVICE = torch.device("cuda", 0)
STEADY = 3  # the step whose operators are counted; earlier ones set up state


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm")}


class Operators(TorchDispatchMode):
    """Counts operators; refuses copies from the device to the host, and matrix products of different dtypes.

    Fake tensors themselves refuse everything else that is an error on CUDA, or makes the host wait.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        dtypes = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        if function.overloadpacket in PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"{function} of different dtypes")
        result = function(*args, **(kwargs or {}))
        if "cuda" in device_types(args) and "cpu" in device_types(result):
            raise RuntimeError(f"{function} copies from the device to the host")
        return result


def device_types(values) -> set[str]:
    """Return the device types of all tensors in a nested structure."""
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def device_present() -> ExitStack:
    """Return patches of what host code needs of `torch.cuda`; streams and events are those of the CPU: no-ops."""
    properties = SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024, name="NVIDIA H200")
    cuda = {name: getattr(torch.cpu, name) for name in ("Stream", "current_stream", "stream", "synchronize")}
    cuda |= {"Event": lambda *_, **__: torch.cpu.Event(), "set_device": lambda _: None}
    cuda |= {"device": lambda _: nullcontext(), "current_device": lambda: 0, "device_count": lambda: 1}
    cuda |= {"is_available": lambda: True, "is_initialized": lambda: True, "is_bf16_supported": lambda **_: True}
    cuda |= {"get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties}
    return patched(*((torch.cuda, name, function) for name, function in cuda.items()))


def patched(*replacements: tuple) -> ExitStack:
    """Return a context in which attributes are replaced, each given as owner, name and value."""
    stack = ExitStack()
    for replacement in replacements:
        stack.enter_context(mock.patch.object(*replacement))
    return stack


def to_device(model: Transformer, device) -> None:
    """Give a model of the meta device parameters and buffers on the fake one."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(value, device=DEVICE))
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty_like(value, device=DEVICE)


def start(flags: str, mode: FakeTensorMode, ranks) -> tuple:
    """Return configuration, engine, optimizer and the micro-batches of some steps; no tensor has values."""
    construction = patched(
        (checks, "join", lambda **_: None),
        (checks, "build_parallel_context", lambda *_: ranks),
        (apply, "initialise", lambda *_: None),
        (Transformer, "to_empty", to_device),
        (Transformer, "to", lambda model, *_: model),
        (torch, "tensor", lambda value, device: torch.full((), value, device=device)),
        (Batch, "pin_memory", lambda batch: batch.map_tensors(mode.from_tensor)),  # as if the loader had pinned it
    )
    with construction:
        with mode, device_present():
            config, engine, optimizer, steps = checks.start(flags, DEVICE)
        return config, engine, optimizer, list(steps)


def operators_of_step(flags: str, mode: FakeTensorMode, ranks) -> int:
    """Return how many operators a step dispatches, including a weight average."""
    config, engine, optimizer, steps = start(flags, mode, ranks)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
    rates["meta_gradient"] = MetaGradient.at(config.optimizer, 1e-3)
    with mode, device_present(), Operators() as operators:
        average = Average(engine, OptimizerConfig(ema_decay=0.9))
        for step in steps[: STEADY + 1]:
            operators.count = 0
            train_step(engine, optimizer, step, **rates)
            average.update(8)
    return operators.count


def main() -> None:
    """Print the operators or the error of a step for each line of flags."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with device_present():
        ranks = build_parallel_context(0, 1, DEVICE)
    for flags in sys.argv[1:]:
        child = os.fork()  # a process each, since a step leaves threads and state of autograd
        if not child:
            print(json.dumps({"flags": flags} | outcome(flags, mode, ranks)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"flags": flags, "error": f"the process ended with status {status}"}), flush=True)


def outcome(flags: str, mode: FakeTensorMode, ranks) -> dict:
    """Return the operators of a step, or its error, whatever that is."""
    try:
        return {"operators": operators_of_step(flags, mode, ranks)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


if __name__ == "__main__":
    main()
