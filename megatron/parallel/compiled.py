"""torch.compile for the blocks of a model, each as one graph of static shapes."""

from typing import Any, cast

import torch

from megatron.model.last_block import LastBlock
from megatron.model.transformer import Transformer

# inductor options: on a CPU its own RNG draws dropout masks element by element, which costs more than compiling saves
OPTIONS = {"cpu": {"fallback_random": True}}


def compile_blocks(model: Transformer, device: torch.device) -> None:
    """Compile every block in place; the last one as two functions, between which scored positions are selected.

    Masks become FlexAttention BlockMasks where that works; fully masked tiles are skipped then.
    """
    config = model.config
    # FlexAttention has no dropout, no head size below 16 and, on a CPU, no backward pass
    model.uses_block_mask = device.type == "cuda" and config.attention_dropout == 0 and config.head_size >= 16
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": OPTIONS.get(device.type)}
    blocks = list(model.layers.values())
    if model.is_last_stage and model.selects_scored_positions:
        last = cast(LastBlock, blocks.pop())
        last.attend = torch.compile(last.attend, **settings)
        last.finish = torch.compile(last.finish, **settings)
    for block in blocks:
        block.compile(**settings)
