"""Activation checkpointing: activations are recomputed in the backward pass instead of stored."""

import functools
import logging
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config.sections import ParallelConfig
from megatron.model.transformer import Transformer
from megatron.torch_private import ATTENTION, CHECKPOINT_LOGGER

ATEN = torch.ops.aten
# operators that are expensive to recompute, as ATTENTION is
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default}


def recompute(model: Transformer, parallel: ParallelConfig) -> None:
    """Apply activation checkpointing to blocks as `--recompute-granularity` says, in place.

    "full" stores the input of a block only; "selective" stores the outputs of matrix products and of attention too.
    Attention with dropout is recomputed in any case: with a stored result the RNG would not advance, and later dropout
    in the block would differ from that of the forward pass.
    """
    if parallel.recompute_granularity is None:
        return
    contexts = {}
    if parallel.recompute_granularity == "selective":
        policy = functools.partial(_policy, PRODUCTS if model.config.attention_dropout else PRODUCTS | ATTENTION)
        # when compiled it warns of in-place operators, and a block has none
        logging.getLogger(CHECKPOINT_LOGGER).setLevel(logging.ERROR)
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    blocks = list(model.layers.values())
    for block in blocks[: parallel.recompute_num_layers]:
        block.forward = _checkpointed(block.forward, contexts)


def _checkpointed(forward: Callable, contexts: dict) -> Callable:
    """Return `forward` under a checkpoint, as a Python function: torch.compile starts its graph at one."""

    def checkpointed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    return checkpointed


def _policy(saved: set, context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE
