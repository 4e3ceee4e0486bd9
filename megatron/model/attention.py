"""Self-attention: bidirectional, causal, or under an attention mask."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron.config.parametrization import attention_scale
from megatron.config.sections import ModelConfig
from megatron.model.kv_cache import LayerKVCache
from megatron.model.norm import normalisation
from megatron.model.rotary import RotaryTable, rotate

# Additive mask [B or 1, 1, S, P] in the compute dtype, 0 where a query attends to a key, else -inf; or a FlexAttention
# BlockMask, with which fully masked 128x128 tiles are skipped
Mask = Tensor | BlockMask


class AttentionContext(NamedTuple):
    """Rotary embeddings, attention mask and KV cache of a batch; the same in all blocks but for the cache."""

    query_rotary: RotaryTable
    key_rotary: RotaryTable
    causal: bool  # used where `mask` is None
    mask: Mask | None = None
    kv_cache: LayerKVCache | None = None  # in generation and scoring


class Attention(nn.Module):
    """Multi-head attention; `--group-query-attention` gives fewer key/value heads than query heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.dropout = config.attention_dropout
        self.scale = attention_scale(config)
        query_size = config.num_attention_heads * config.head_size
        key_size = config.key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.add_bias_linear)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.add_bias_linear)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.add_bias_linear)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.add_bias_linear)
        self.q_norm = normalisation(config, config.head_size) if config.qk_layernorm else nn.Identity()
        self.k_norm = normalisation(config, config.head_size) if config.qk_layernorm else nn.Identity()

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the attention output, [B, S, H] -> [B, S, H]."""
        return self.o_proj(self.attend(hidden, context))

    def attend(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the attention output before `o_proj`, [B, S, heads * D], for hidden states [B, S, H]."""
        # head counts are inferred by `unflatten`, so that a tensor-parallel shard of the heads works unchanged
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_size)))  # [B, S, heads, D]
        k = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.head_size)))  # [B, S, kv_heads, D]
        v = self.v_proj(hidden).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # [B, kv_heads, S, D]
        # rotated before the transposition, so that compiled code writes the gradients in the layout of the projections
        q = rotate(q, context.query_rotary).transpose(1, 2)  # [B, heads, S, D]
        k = rotate(k, context.key_rotary).transpose(1, 2)  # [B, kv_heads, S, D]
        if context.kv_cache is not None:
            k, v = context.kv_cache.extend(k, v)  # [B, kv_heads, P + S, D]
        if isinstance(context.mask, BlockMask):
            result = flex_attention(q, k, v, block_mask=context.mask, scale=self.scale, enable_gqa=self.grouped)
            output = cast(Tensor, result)  # it is a tuple with return_lse or return_aux only
        else:
            repeats = self.grouped and needs_equal_heads(q.device.type, q.dtype, context.mask is not None)
            if repeats:
                k, v = (_repeat_heads(states, q.shape[1]) for states in (k, v))  # [B, heads, P + S, D]
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=context.mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=context.causal,
                scale=self.scale,
                enable_gqa=self.grouped and not repeats,
            )
        return output.transpose(1, 2).flatten(2)  # [B, heads, S, D] -> [B, S, heads * D]


def needs_equal_heads(device_type: str, dtype: torch.dtype, has_mask: bool) -> bool:
    """Return whether attention must get as many key/value heads as query heads, so that it runs as a fused kernel.

    On CUDA only FlashAttention and cuDNN take fewer key/value heads, neither of them in fp32 and only cuDNN with a mask
    tensor, where `disable_cudnn_attention` excludes it. PyTorch would store the matrix of all scores instead, in fp32.
    """
    return device_type == "cuda" and (has_mask or dtype == torch.float32)


def _repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Return keys or values [B, kv_heads, S, D] with each head repeated: [B, num_heads, S, D]."""
    return states.repeat_interleave(num_heads // states.shape[1], dim=1)


def disable_cudnn_attention() -> None:
    """Make attention of this process use FlashAttention, or under a mask tensor the memory-efficient kernel.

    PyTorch 2.11 to 2.13 prefer cuDNN on Hopper and Blackwell. With a mask tensor its gradients can be NaN where the
    length modulo 128 is 64 (pytorch#196678), and it makes an execution plan for each new shape, which takes a second.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def dense_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask [B, 1, S, P] of `visible`, bool [B, S, P].

    Attention would convert a boolean mask in every block, and store the result for the backward pass.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]


def block_mask(visible: Tensor) -> BlockMask:
    """Return the FlexAttention BlockMask of `visible`, bool [B or 1, S, S]; kernels skip fully masked tiles."""
    batch_size, length, _ = visible.shape
    shared = visible[0]  # indexing with 0 inside the mask function would synchronise host and device

    def batch_mask(sequence, head, query, key):
        return visible[sequence, query, key]

    def shared_mask(sequence, head, query, key):
        return shared[query, key]

    mask_mod = shared_mask if batch_size == 1 else batch_mask
    return create_block_mask(mask_mod, batch_size, None, length, length, device=visible.device)
