"""Self-attention: every query sees all positions, or only itself and what stands before it."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig
from megatron.model.norm import normalisation
from megatron.model.rotary import rotate


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

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Tensor:
        """[B, S, H] -> [B, S, H]; `cos` and `sin` are the rotary table [B or 1, 1, S, D]."""
        # the head count is left to `unflatten`, so that a layer holding a share of the heads works unchanged
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_size))).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.head_size))).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            enable_gqa=self.grouped,
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))
