"""The last block: o_proj and the MLP at the scored positions only.

At a position without a score, only the keys and values of the last block are used. So its o_proj and MLP, the final
norm and the head run at the scored positions only: for masked diffusion, half of them on average.
"""

import torch
from torch import Tensor

from megatron.model.attention import AttentionContext
from megatron.model.block import Block
from megatron.model.scored_positions import Selection


class LastBlock(Block):
    """A block, with the same parameters, that can return the hidden states of selected positions only.

    `attend` and `finish` are compiled separately where positions are selected between them.
    """

    def forward(
        self,
        hidden: Tensor,
        context: AttentionContext,
        residual_scale: Tensor | None = None,
        selection: Selection | None = None,
    ) -> Tensor:
        """Return what `Block.forward` does; with a `selection` at its positions only, [chunks * size, H]."""
        attended = self.attend(hidden, context)  # [B, S, heads * D]
        if selection is None:
            return self.finish(hidden, attended, residual_scale)
        inputs = [selection.take(hidden), selection.take(attended)]
        if residual_scale is not None:
            inputs.append(selection.take(residual_scale.expand(*hidden.shape[:2], 1)))
        return torch.cat([self.finish(*chunk) for chunk in zip(*inputs, strict=True)])

    def attend(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the attention output before `o_proj`, [B, S, heads * D]."""
        return self.self_attn.attend(self.input_layernorm(hidden), context)

    def finish(self, hidden: Tensor, attended: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        """Add o_proj of `attended` [..., heads * D], then the MLP, to `hidden` [..., H], position by position."""
        hidden = hidden + self.residual(self.self_attn.o_proj(attended), residual_scale)
        return hidden + self.residual(self.mlp(self.post_attention_layernorm(hidden)), residual_scale)
