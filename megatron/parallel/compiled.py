"""Which parts of a model compile, each as one graph of one shape."""

import torch

from megatron.model.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compile every block in place; the last one in two parts, between which the scored positions are selected."""
    whole = list(model.layers.values())
    if model.last and model.selects_early:
        last = whole.pop()
        last.mix = torch.compile(last.mix, fullgraph=True, dynamic=False)
        last.finish = torch.compile(last.finish, fullgraph=True, dynamic=False)
    for block in whole:
        block.compile(fullgraph=True, dynamic=False)
