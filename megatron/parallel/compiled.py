"""Which parts of a model compile, each as one graph of one shape."""

import torch

from megatron.model.transformer import Transformer

# of inductor: on a CPU it would draw dropout's random numbers one by one, and lose more than it gains by compiling
OPTIONS = {"cpu": {"fallback_random": True}}


def compile_blocks(model: Transformer, device: torch.device) -> None:
    """Compile every block in place; the last one in two parts, between which the scored positions are selected.

    What a mask hides is skipped by squares then.
    """
    config = model.config
    # FlexAttention has no dropout, no smaller heads, and on a CPU no gradient
    model.uses_block_mask = device.type == "cuda" and config.attention_dropout == 0 and config.head_size >= 16
    settings = {"fullgraph": True, "dynamic": False, "options": OPTIONS.get(device.type)}
    whole = list(model.layers.values())
    if model.is_last_stage and model.selects_scored_positions:
        last = whole.pop()
        last.mix, last.finish = (torch.compile(part, **settings) for part in (last.mix, last.finish))
    for block in whole:
        block.compile(**settings)
