"""The private API of torch that this project uses, and nothing else may.

Tried with torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0 on a CPU. A new release of torch is checked here first: each name
says what it is for, and what public API lacks.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed._functional_collectives  # declares the operators
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data._utils import signal_handling

# Elementwise operations on lists of tensors in a few kernels; what torch's own fused optimizers and clipping use.
foreach_add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul = torch._foreach_mul  # pyright: ignore[reportPrivateImportUsage]
foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
foreach_sub = torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]

# The functional operators return new tensors: collectives that write into an output tensor silently lose its gradient
# in code compiled by torch 2.11. The Python functions for these operators have other names in 2.13.
COLLECTIVES = torch.ops._c10d_functional

# The operators that scaled_dot_product_attention and flex_attention call, for selective recomputation to know them.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
CHECKPOINT_LOGGER = "torch._higher_order_ops.wrap"  # of checkpoints in compiled code

# Of a process group that exists: those of a mesh cannot be given one. Public from torch 2.14, where the old name warns.
set_group_timeout = vars(distributed_c10d).get("set_timeout", _set_pg_timeout)


class LocalAdamW(torch.optim.AdamW):
    """AdamW whose kernels get the local shards of DTensors: for lists of DTensors the host takes longer to dispatch.

    Parameters, gradients and moments are DTensors everywhere else.
    """

    def _init_group(self, group: dict, *lists: list) -> bool:
        """Fill the lists with the tensors of a parameter group: weights, gradients, moments and step counts."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return has_complex


def fsdp_parameters(modules: Iterable[FSDPModule]) -> list[Any]:
    """Return FSDP2's records (FSDPParam) of the parameters of modules that `fully_shard` was applied to.

    They have the gathered weights and unreduced gradients, which the public API does not show.
    """
    groups = (cast(Any, module)._get_fsdp_state()._fsdp_param_group for module in modules)
    return [parameter for group in groups for parameter in group.fsdp_params]


def add_up_gradients(parameters: list[Any]) -> None:
    """Do in a few kernels what FSDP2 does after a backward pass of a micro-batch whose gradients it does not reduce.

    `parameters` are of `fsdp_parameters`. FSDP2 adds the gradients of a lower precision than fp32 to those of earlier
    micro-batches one by one; autograd adds up the others.
    """
    rounded = [
        parameter
        for parameter in parameters
        if (gradient := parameter._unsharded_param.grad) is not None and gradient.dtype != torch.float32
    ]
    if not rounded:
        return
    gradients = [parameter._unsharded_param.grad for parameter in rounded]
    in_fp32 = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    foreach_copy_(in_fp32, gradients)
    sums = [parameter.unsharded_accumulated_grad for parameter in rounded]
    for parameter, gradient in zip(rounded, in_fp32, strict=True):
        parameter._unsharded_param.grad = None
        if parameter.unsharded_accumulated_grad is None:
            parameter.unsharded_accumulated_grad = gradient
    added = [(total, gradient) for total, gradient in zip(sums, in_fp32, strict=True) if total is not None]
    if added:
        foreach_add_(*map(list, zip(*added, strict=True)))


def with_layout(local: Tensor, tensor: Tensor) -> Tensor:
    """Return `local` as the local shard of a DTensor with the layout of `tensor`, if that is one.

    DTensor.from_local would move it to the mesh's device.
    """
    if not isinstance(tensor, DTensor):
        return local
    names, layout = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names} | {"_local_tensor": local}
    return DTensor.__tensor_unflatten__(inner, layout, tensor.size(), tensor.stride())


def sharded_file_keys() -> tuple[str, str]:
    """Return the keys of a safetensors header that a distributed checkpoint needs: of the layout, and of offsets in it.

    The writer of torch.distributed.checkpoint sets them; ours writes the same files with checksums.
    """
    keys = import_module("torch.distributed.checkpoint._hf_utils")
    return keys.CUSTOM_METADATA_KEY, keys.SAVED_OFFSETS_KEY


def cpu_has_bf16() -> bool:
    """Return whether the CPU has bf16 arithmetic of its own: AVX-512 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def inductor_config() -> Any:
    """Return the settings of the compiler's code generator."""
    return import_module("torch._inductor.config")


def forget_compiled_code() -> None:
    """Drop what torch.compile has compiled in this process, which counts towards its limit of recompilations."""
    torch._dynamo.reset()


compiled_models: WeakSet[nn.Module] = WeakSet()
hidden_gradients: list[tuple[nn.Parameter, Tensor]] = []


def hide_gradients_from_compiler(model: nn.Module) -> None:
    """Hide the gradients of a model while code is compiled: torch.compile refuses fp32 gradients of bf16 weights.

    FSDP2 of torch 2.15 leaves such gradients on gathered weights between the micro-batches of a step, of which the
    second may be the first of its shape or objective. Before 2.15 it keeps them elsewhere.
    """
    compiled_models.add(model)
    handler = import_module("torch._dynamo.callback").callback_handler
    if hide_gradients not in handler.start_callbacks:  # forget_compiled_code drops them
        handler.register_start_callback(hide_gradients)
        handler.register_end_callback(show_gradients)


def hide_gradients(_: object) -> None:
    """Take the gradients of all compiled models away until `show_gradients`."""
    parameters = [parameter for model in compiled_models for parameter in model.parameters()]
    for parameter in parameters:
        if parameter.grad is not None:
            hidden_gradients.append((parameter, parameter.grad))
            parameter.grad = None


def show_gradients(_: object) -> None:
    """Give back what `hide_gradients` took."""
    for parameter, gradient in hidden_gradients:
        parameter.grad = gradient
    hidden_gradients.clear()


def leave_child_signals_alone() -> None:
    """Keep data loaders from setting a handler that raises anywhere in the main thread when a worker dies."""
    signal_handling._SIGCHLD_handler_set = True
