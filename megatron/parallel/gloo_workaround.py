"""Workaround for a race in the gloo process groups of torch 2.11 to 2.13.

A group has two threads, and each writes the name of its last operation to one shared string, without a lock
(ProcessGroupGloo::runLoop). A name longer than 15 characters is allocated on the heap: if both threads write at once it
is freed twice, and the process aborts. Of the operations that we use only the functional all-gather, which DTensor uses
too, has such a name, ALLGATHER_COALESCED; an all-gather into a preallocated tensor is an ALLGATHER.
"""

import functools

import torch
from torch import Tensor

from megatron.torch_private import COLLECTIVES


@functools.cache
def gather_under_a_short_name() -> torch.library.Library:
    """Make functional all-gathers on a CPU write into a preallocated tensor; valid as long as the result is alive."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_gather_into_tensor", _all_gather, "CPU")
    return library


def _all_gather(shard: Tensor, size: int, group: str) -> Tensor:
    shard = shard.reshape(1) if shard.ndim == 0 else shard
    shards = shard.new_empty(size * shard.shape[0], *shard.shape[1:])
    return COLLECTIVES.all_gather_into_tensor_out(shard, size, group, out=shards)
