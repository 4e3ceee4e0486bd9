"""One transformer block: the unit that is compiled, sharded and recomputed."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig
from megatron.model.attention import Attention
from megatron.model.mlp import MLP
from megatron.model.norm import normalisation


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = normalisation(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = normalisation(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Tensor:
        """[B, S, H] -> [B, S, H]; plain tensors and one flag, so that the block compiles as one graph."""
        attended = self.self_attn(self.input_layernorm(hidden), cos, sin, causal)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        transformed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(transformed, self.dropout, self.training)
