"""Activation recomputation: what the backward pass needs is computed again instead of kept."""

import functools
import logging
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config.sections import ParallelConfig
from megatron.model.transformer import Transformer

ATEN = torch.ops.aten
# what is dear to compute
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default}
ATTENTION = {
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def recompute(model: Transformer, parallel: ParallelConfig) -> None:
    """Let the blocks that `parallel` names recompute all, or all but matrix products and attention, in place.

    Attention with dropout is computed again: a kept result would leave the generator where it was, and what the block
    drops after it would not be what the forward pass dropped.
    """
    if parallel.recompute_granularity is None:
        return
    contexts = {}
    if parallel.recompute_granularity == "selective":
        policy = functools.partial(_policy, PRODUCTS if model.config.attention_dropout else PRODUCTS | ATTENTION)
        # compiled, it warns of operators in place, and a block has none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    blocks = list(model.layers.values())
    for block in blocks[: parallel.recompute_num_layers]:
        block.forward = _recomputed(block.forward, contexts)


def _recomputed(forward: Callable, contexts: dict) -> Callable:
    """Return `forward` under a checkpoint, as a function of Python: what compiles the block begins at one."""

    def recomputed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    return recomputed


def _policy(kept: set, context, operator, *arguments, **words) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
