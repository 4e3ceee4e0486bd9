"""Self-attention: every query sees all positions, itself and what stands before it, or what a mask lets it see."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron.config.sections import ModelConfig
from megatron.model.kv_cache import LayerKVCache
from megatron.model.norm import normalisation
from megatron.model.rotary import RotaryTable, rotate

# [B or 1, 1, S, S] in the compute dtype, 0 where a query may see a key, else -inf; or the same by squares of 128
Mask = Tensor | BlockMask


class AttentionContext(NamedTuple):
    """Where the tokens of a batch stand and what each position may see: the same in all blocks."""

    queries: RotaryTable
    keys: RotaryTable
    causal: bool  # where there is no `mask`
    mask: Mask | None = None
    past: LayerKVCache | None = None  # what this block has read before, in generation and scoring


class Attention(nn.Module):
    """Multi-head attention, with fewer key/value heads than query heads under `--group-query-attention`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.dropout = config.attention_dropout
        queries = config.num_attention_heads * config.head_size
        keys = config.key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.add_bias_linear)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.add_bias_linear)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.add_bias_linear)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.add_bias_linear)
        self.q_norm = normalisation(config, config.head_size) if config.qk_layernorm else nn.Identity()
        self.k_norm = normalisation(config, config.head_size) if config.qk_layernorm else nn.Identity()

    def forward(self, hidden: Tensor, sight: AttentionContext) -> Tensor:
        """[B, S, H] -> [B, S, heads * D]: what `o_proj` reads, which the block calls where it is needed."""
        # the head count is left to `unflatten`, so that a layer holding a share of the heads works unchanged
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_size))).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.head_size))).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        key = rotate(key, sight.keys)
        if sight.past is not None:
            key, value = sight.past.extend(key, value)
        query = rotate(query, sight.queries)
        if isinstance(sight.mask, BlockMask):
            mixed = flex_attention(query, key, value, block_mask=sight.mask, enable_gqa=self.grouped)
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=sight.mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=sight.causal,
                enable_gqa=self.grouped,
            )
        return mixed.transpose(1, 2).flatten(2)


def dense_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores of attention, [B, 1, S, P], of what may be seen, bool [B, S, P].

    Attention would make it of a mask in every block, and keep it.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]


def block_mask(visible: Tensor) -> BlockMask:
    """Return the mask of FlexAttention, whose compiled kernels skip squares that nothing in them may see.

    `visible` is bool [B or 1, S, S].
    """
    batch, length, _ = visible.shape
    shared = visible[0]  # an index 0 inside would be copied to the device, and waited for

    def of_each(sequence, head, query, key):
        return visible[sequence, query, key]

    def of_all(sequence, head, query, key):
        return shared[query, key]

    seen = of_all if batch == 1 else of_each
    return create_block_mask(seen, batch, None, length, length, device=visible.device)
