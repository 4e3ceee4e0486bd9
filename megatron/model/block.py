"""One transformer block: the unit of compilation, sharding and activation checkpointing."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.parametrization import Parametrization
from megatron.config.sections import ModelConfig
from megatron.model.attention import Attention, AttentionContext
from megatron.model.mlp import MLP
from megatron.model.norm import normalisation


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.multiplier = Parametrization.of(config).residual
        self.input_layernorm = normalisation(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = normalisation(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, context: AttentionContext, residual_scale: Tensor | None = None) -> Tensor:
        """Return the new hidden states, [B, S, H] -> [B, S, H].

        `residual_scale` [B, 1, 1] multiplies what attention and MLP add (stochastic depth). All arguments are tensors
        and flags, so that the block compiles as one graph.
        """
        hidden = hidden + self.residual(self.self_attn(self.input_layernorm(hidden), context), residual_scale)
        return hidden + self.residual(self.mlp(self.post_attention_layernorm(hidden)), residual_scale)

    def residual(self, output: Tensor, residual_scale: Tensor | None) -> Tensor:
        """Return what the output of attention or MLP [..., H] adds to the residual stream: with dropout, scaled."""
        output = F.dropout(output, self.dropout, self.training)
        if self.multiplier != 1:
            output = output * self.multiplier
        return output if residual_scale is None else output * residual_scale.to(output.dtype)
