"""A way around a fault in the gloo groups of torch 2.11 to 2.13.

A group has two threads, and each notes the name of the operation it did last in one string, without a lock
(ProcessGroupGloo::runLoop). A name of more than 15 letters lives on the heap: where both threads write at once it is
freed twice, and the process aborts. Of what is used here only the functional all-gather, which is DTensor's too, has
such a name, ALLGATHER_COALESCED; gathering into a given tensor is an ALLGATHER.
"""

import functools

import torch
import torch.distributed._functional_collectives  # declares the operators
from torch import Tensor


@functools.cache
def gather_under_a_short_name() -> torch.library.Library:
    """Let functional all-gathers on a CPU fill a given tensor; what is returned keeps it so."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_gather_into_tensor", _gather, "CPU")
    return library


def _gather(part: Tensor, size: int, group: str) -> Tensor:
    part = part.reshape(1) if part.ndim == 0 else part
    parts = part.new_empty(size * part.shape[0], *part.shape[1:])
    return torch.ops._c10d_functional.all_gather_into_tensor_out(part, size, group, out=parts)
