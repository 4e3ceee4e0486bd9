"""One transformer block: the unit of compilation, sharding and activation checkpointing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig
from megatron.model.attention import Attention, AttentionContext
from megatron.model.mlp import MLP
from megatron.model.norm import normalisation
from megatron.model.scored_positions import Selection


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = normalisation(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = normalisation(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        context: AttentionContext,
        residual_scale: Tensor | None = None,
        selection: Selection | None = None,
    ) -> Tensor:
        """Return the new hidden states, [B, S, H] -> [B, S, H].

        `residual_scale` [B, 1, 1] multiplies what attention and MLP add (stochastic depth). With a `selection`, o_proj
        and the MLP run at the selected positions only, chunk by chunk, and the result is [chunks * size, H].

        All arguments are tensors and flags, so that the block compiles as one graph; with a `selection`, `mix` and
        `finish` are compiled separately.
        """
        mixed = self.mix(hidden, context)  # [B, S, heads * D]
        if selection is None:
            return self.finish(mixed, hidden, residual_scale)
        inputs = [selection.take(mixed), selection.take(hidden)]
        if residual_scale is not None:
            inputs.append(selection.take(residual_scale.expand(*hidden.shape[:2], 1)))
        return torch.cat([self.finish(*chunk) for chunk in zip(*inputs, strict=True)])

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the attention output before `o_proj`, [B, S, heads * D]."""
        return self.self_attn(self.input_layernorm(hidden), context)

    def finish(self, mixed: Tensor, hidden: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        """Add the outputs of attention and MLP to `hidden` [..., H]; positions are independent from here on."""
        hidden = hidden + self._scaled(self.self_attn.o_proj(mixed), residual_scale)
        return hidden + self._scaled(self.mlp(self.post_attention_layernorm(hidden)), residual_scale)

    def _scaled(self, output: Tensor, residual_scale: Tensor | None) -> Tensor:
        output = F.dropout(output, self.dropout, self.training)
        return output if residual_scale is None else output * residual_scale.to(output.dtype)
