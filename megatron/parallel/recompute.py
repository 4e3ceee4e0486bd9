"""Activation recomputation: what the backward pass needs is computed again instead of kept."""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config.sections import ParallelConfig
from megatron.model.transformer import Transformer

ATEN = torch.ops.aten
# what is dear to compute: matrix products and attention
KEPT = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute(model: Transformer, parallel: ParallelConfig) -> None:
    """Let the blocks that `parallel` names recompute all, or all but matrix products and attention, in place."""
    if parallel.recompute_granularity is None:
        return
    selective = parallel.recompute_granularity == "selective"
    # attention that is kept would not draw its dropout again, and all later dropout of the block would differ
    policy = _policy_without_attention if model.config.attention_dropout else _policy
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    blocks = list(model.layers.values())
    for block in blocks[: parallel.recompute_num_layers]:
        block.forward = _recomputed(block.forward, contexts)


def _recomputed(forward: Callable, contexts: dict) -> Callable:
    """Return `forward` under a checkpoint, as a function of Python: what compiles the block begins at one."""

    def recomputed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    return recomputed


def _policy(context, operator, *arguments, **words) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _policy_without_attention(context, operator, *arguments, **words) -> CheckpointPolicy:
    kept = operator in KEPT and "attention" not in operator.__name__
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
