"""The benchmark model in plain PyTorch, as a nanoGPT-style script writes it: the baseline without a framework.

RMSNorm, rotary embeddings, SwiGLU, no biases, causal SDPA, tied embeddings. It returns logits at every position. Run
it under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig


class GPT(nn.Module):
    """Decoder-only transformer; `padded_vocab_size` is the number of rows of the tied embedding."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, seq_length: int):
        super().__init__()
        self.embedding = nn.Embedding(padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        half = torch.arange(config.head_size // 2) * (2 / config.head_size)
        angles = torch.arange(seq_length)[:, None] / config.rotary_base**half  # [S, D/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits: [B, S] -> [B, S, V]."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin)
        return F.linear(self.norm(hidden), self.embedding.weight)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_size
        self.head_size = config.head_size
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_epsilon)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.mix = nn.Linear(inner, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_epsilon)
        self.gate_up = nn.Linear(width, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the hidden states after the block: [B, S, H] -> [B, S, H]."""
        projections = self.qkv(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in projections)
        query = apply_rotary(query, cos, sin)
        key = apply_rotary(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, S, D]
        hidden = hidden + self.mix(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [B, heads, S, D] with channels i and i + D/2 rotated by the angle of their position."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(heads)
