"""Training steps on a CUDA device without memory and kernels, which a CPU build of PyTorch takes with fake tensors.

    FAKE_CUDA=fake_cuda.so python -m tests.fake_cuda "0/1 --objective mdm --bf16 --no-compile" ...

takes a step of rank 0 of 1 for each line of flags and prints a line of JSON: the number of operators, or the error.
Shapes, dtypes and devices are those of a GPU. Operands on different devices, and results that the host would have to
wait for, are errors. Compiled code is traced as for a GPU, and its graphs run operator by operator. The other ranks do
not exist: collectives return at once. tests/test_fake_cuda.py compiles the library.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib import import_module
from types import ModuleType, SimpleNamespace
from unittest import mock

ctypes.CDLL(os.environ["FAKE_CUDA"], mode=ctypes.RTLD_GLOBAL)  # before PyTorch looks for hooks of CUDA

import torch
import torch._dynamo  # here rather than in each child
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of fake tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_checks import checks
from megatron.batch import Batch
from megatron.config.layout_checks import check_layout
from megatron.config.sections import OptimizerConfig
from megatron.model import linear_cross_entropy
from megatron.model.transformer import Transformer
from megatron.parallel import apply, pipeline
from megatron.parallel.mesh import ParallelContext, build_parallel_context
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.averaging import Average
from megatron.training.command_line import parse
from megatron.training.step import train_step

DEVICE = torch.device("cuda", 0)
STEADY = 3  # the step whose operators are counted; earlier ones set up state
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm}
# what raises an error on CUDA with --deterministic, of PyTorch's documentation of use_deterministic_algorithms
NONDETERMINISTIC = {ATEN.bincount, ATEN.cumsum, ATEN.histc, ATEN.kthvalue, ATEN.median, ATEN.put_}


class Operators(TorchDispatchMode):
    """Counts operators; refuses what makes the host wait, products of different dtypes, and nondeterministic kernels.

    Fake tensors themselves refuse everything else that is an error on CUDA, or makes the host wait. `adds_on_host` is
    whether FSDP2 adds up the gradients of micro-batches on the host, which waits for each then.
    """

    supports_higher_order_operators = True  # FlexAttention

    def __init__(self, adds_on_host: bool):
        super().__init__()
        self.count = 0
        self.adds_on_host = adds_on_host

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return that code is compiled under this mode; it sees the operators of the graphs when they run."""
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.count += 1
        packet = getattr(function, "overloadpacket", None)
        dtypes = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        if packet in PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"{function} of different dtypes")
        on_cuda = "cuda" in device_types(args)
        if on_cuda and packet in NONDETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{function} has no deterministic kernel")
        result = function(*args, **kwargs)
        waits = not (self.adds_on_host or kwargs.get("non_blocking"))
        if waits and on_cuda and "cpu" in device_types(result):
            raise RuntimeError(f"{function} copies from the device to the host")
        return result


def device_types(values) -> set[str]:
    """Return the device types of all tensors in a nested structure."""
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class Kernel:
    """A Triton kernel, whose launches check the tensors and compute nothing."""

    def __init__(self, _):
        pass

    def __getitem__(self, grid):
        """Return a launch."""
        return self.launch

    def launch(self, *args, **_) -> None:
        """Check the tensors."""
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        if device_types(tensors) != {"cuda"} or not all(map(torch.Tensor.is_contiguous, tensors)):
            raise RuntimeError("a Triton kernel got a tensor of the host, or one that is not contiguous")


def load_kernels() -> None:
    """Import the kernels of the head's loss as if Triton were installed and the device could run them."""
    triton = ModuleType("triton")
    vars(triton).update(jit=Kernel, cdiv=lambda count, size: -(-count // size), language=ModuleType("triton.language"))
    vars(triton.language)["constexpr"] = int
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": triton.language}):
        kernels = import_module("megatron.model.softmax_kernels")
    sys.modules[kernels.__name__] = kernels


def device_present(offloads: bool = False) -> ExitStack:
    """Return patches of what host code needs of `torch.cuda`; streams and events are those of the CPU: no-ops.

    The host may wait for events only where FSDP2 `offloads` gradients: at the end of the backward pass.
    """

    def wait(owner=None) -> None:
        if not (offloads and isinstance(owner, torch.cpu.Event)):
            raise RuntimeError("the host waits for the device")

    def event(*_, **__) -> torch.cpu.Event:
        return torch.cpu.Event()

    properties = SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024, name="NVIDIA H200")
    cuda = {name: getattr(torch.cpu, name) for name in ("Stream", "current_stream", "stream")}
    cuda |= {"Event": event, "synchronize": wait, "set_device": lambda _: None}
    cuda |= {"device": lambda _: nullcontext(), "current_device": lambda: 0, "device_count": lambda: 1}
    cuda |= {"is_available": lambda: True, "is_initialized": lambda: True, "is_bf16_supported": lambda **_: True}
    cuda |= {"get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties}
    cuda |= {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None}
    replacements = [(torch.cuda, name, function) for name, function in cuda.items()]
    replacements += [(torch.cpu.Event, "synchronize", wait), (torch.cpu.Stream, "record_event", event)]
    return patched(*replacements)


def patched(*replacements: tuple) -> ExitStack:
    """Return a context in which attributes are replaced, each given as owner, name and value."""
    stack = ExitStack()
    for replacement in replacements:
        stack.enter_context(mock.patch.object(*replacement))
    return stack


def to_device(model: Transformer, device) -> None:
    """Give a model of the meta device parameters and buffers on the fake one, where FSDP2 moves offloaded ones too."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(value, device=DEVICE))
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty_like(value, device=DEVICE)


def with_values(function: Callable) -> Callable:
    """Return a function of the host's own tensors that computes their values, among fake tensors."""

    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def build_ranks(rank: int, size: int, flags: str) -> ParallelContext:
    """Return the context of a rank in the layout of the flags, without the other ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    config, new_group = parse("ar", [*checks.MODEL.split(), *flags.split()]), dist.new_group
    check_layout(config, size)
    parallel = config.parallel
    layout = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "replicas": parallel.replicas(parallel.data_size(size)),
    }
    with device_present(), patched((dist, "new_group", lambda backend, timeout: new_group())):
        return build_parallel_context(rank, size, DEVICE, **layout)


def start(flags: str, mode: FakeTensorMode, ranks: ParallelContext) -> tuple:
    """Return configuration, engine, optimizer and the micro-batches of some steps; no tensor has values."""
    torch_compile = torch.compile

    def compile(code: Callable, **settings) -> Callable:
        return torch_compile(code, **settings | {"options": None, "backend": "aot_eager"})

    construction = patched(
        (checks, "join", lambda **_: None),
        (checks, "build_parallel_context", lambda *_: ranks),
        (apply, "initialise", lambda *_: None),
        (Transformer, "to_empty", to_device),
        (Transformer, "to", lambda model, *_: model),
        (pipeline, "_tied_group", with_values(pipeline._tied_group)),
        (DeviceMesh, "_concatenate", with_values(DeviceMesh._concatenate)),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),  # fake ones on the host
        (torch, "tensor", lambda value, device: torch.full((), value, device=device)),
        (torch, "compile", compile),
        (Batch, "pin_memory", lambda batch: batch.map_tensors(mode.from_tensor)),  # as if the loader had pinned it
    )
    with construction:
        with mode, device_present():
            config, engine, optimizer, steps = checks.start(flags, DEVICE)
        return config, engine, optimizer, list(steps)


def operators_of_step(flags: str, mode: FakeTensorMode, ranks: ParallelContext) -> int:
    """Return how many operators a step dispatches, including a weight average."""
    config, engine, optimizer, steps = start(flags, mode, ranks)
    for root in engine.roots:
        root.register_forward_pre_hook(require_inputs, prepend=True, with_kwargs=True)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
    rates["meta_gradient"] = MetaGradient.at(config.optimizer, 1e-3)
    offloads = config.parallel.cpu_offload
    adds_on_host = offloads and engine.zero_stage >= 2
    other_ranks = patched(
        (ParallelContext, "sum", lambda _, *values: [value + 1.0 for value in values]),  # 1 of the others
        (schedules._PipelineSchedule, "_warmup_p2p", agree_on_shapes),
        (torch.Tensor, "is_pinned", lambda tensor: tensor.device.type == "cpu"),
    )
    with mode, device_present(offloads), other_ranks, Operators(adds_on_host) as operators:
        average = Average(engine, OptimizerConfig(ema_decay=0.9))
        for step in steps[: STEADY + 1]:
            operators.count = 0
            train_step(engine, optimizer, step, **rates)
            average.update(8)
        if linear_cross_entropy._kernels(DEVICE.type) is None:
            raise RuntimeError("the head's loss runs without its kernels")
    return operators.count


def require_inputs(root: nn.Module, args: tuple, kwargs: dict) -> None:
    """Check that a root gets an argument: on CUDA FSDP2 of torch 2.11 reads the first one."""
    if not (args or kwargs):
        raise RuntimeError(f"{type(root).__name__} is called without arguments")


def agree_on_shapes(schedule, stages: list, *_) -> None:
    """Set what the stages of a pipeline agree on at the first step, for which the host waits: shapes are known."""
    for stage in stages:
        stage._inference_mode = schedules.InferenceMode.STATIC


def main() -> None:
    """Print the operators or the error of a step for each line."""
    load_kernels()
    for line in sys.argv[1:]:
        child = os.fork()  # a process each, since a step leaves threads and state of autograd
        if not child:
            print(json.dumps({"line": line} | outcome(line)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"line": line, "error": f"the process ended with status {status}"}), flush=True)


def outcome(line: str) -> dict:
    """Return the operators of a step, or its error, whatever that is."""
    ranks, flags = line.split(maxsplit=1)
    rank, size = map(int, ranks.split("/"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        return {"operators": operators_of_step(flags, mode, build_ranks(rank, size, flags))}
    except Exception as exception:
        error = exception.__cause__ or exception  # a pipeline's own errors are about a micro-batch
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


if __name__ == "__main__":
    main()
