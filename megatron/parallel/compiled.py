"""torch.compile for the blocks of a model, each or all as one graph of static shapes."""

from typing import Any, cast

import torch

from megatron.model.last_block import LastBlock
from megatron.model.transformer import Transformer
from megatron.torch_private import hide_gradients_from_compiler

# inductor options: on a CPU its own RNG draws dropout masks element by element, which costs more than compiling saves
OPTIONS = {"cpu": {"fallback_random": True}}
LONGEST_GRAPH = 32  # uses of blocks; the time to compile them as one graph grows with their number


# Of FlexAttention in bf16 and fp32, by the KiB of shared memory of a multiprocessor; larger heads do not compile.
# Compute capability 9 and 10 have 228, 8.0 has 164, 8.6, 8.9 and 12 have 100; compiled for each, not run.
LARGEST_HEADS = {200: (256, 256), 160: (256, 128), 0: (128, 64)}


def takes_block_masks(head_size: int, dtype: torch.dtype, shared_memory: int) -> bool:
    """Return whether FlexAttention compiles for a head size, with `shared_memory` bytes per multiprocessor."""
    bf16, fp32 = next(sizes for least, sizes in LARGEST_HEADS.items() if shared_memory >= least * 1024)
    return 16 <= head_size <= (bf16 if dtype == torch.bfloat16 else fp32)


def compile_blocks(model: Transformer, device: torch.device, dtype: torch.dtype, *, as_one_graph: bool = False) -> None:
    """Compile every block in place, or with `as_one_graph` all of them together, up to LONGEST_GRAPH uses.

    One graph costs the host less time per step and more to compile; FSDP2's hooks on blocks rule it out. The last
    block is two functions, between which scored positions are selected. Masks become FlexAttention BlockMasks where
    that works; fully masked tiles are skipped then. The model computes in `dtype`.
    """
    config = model.config
    # FlexAttention has no dropout and, on a CPU, no backward pass
    if device.type == "cuda" and config.attention_dropout == 0:
        shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        model.uses_block_mask = takes_block_masks(config.head_size, dtype, shared_memory)
    hide_gradients_from_compiler(model)
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": OPTIONS.get(device.type)}
    blocks = list(model.layers.values())
    if model.is_last_stage and model.selects_scored_positions:
        last = cast(LastBlock, blocks.pop())
        last.attend = torch.compile(last.attend, **settings)
        last.finish = torch.compile(last.finish, **settings)
    if as_one_graph and len(model.schedule) <= LONGEST_GRAPH:
        model.run_blocks = torch.compile(model.run_blocks, **settings)
    else:
        for block in blocks:
            block.compile(**settings)
