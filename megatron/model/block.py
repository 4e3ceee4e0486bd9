"""One transformer block: the unit that is compiled, sharded and recomputed."""

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
        self, hidden: Tensor, sight: AttentionContext, branch: Tensor | None = None, selection: Selection | None = None
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; `branch` [B, 1, 1] scales what is added, for stochastic depth.

        Plain tensors and flags, so that the block compiles as one graph. With a `selection` return its rows only,
        [rows of all parts, H]; then `mix` and `finish` are what compiles.
        """
        mixed = self.mix(hidden, sight)
        if selection is None:
            return self.finish(mixed, hidden, branch)
        parts = [selection.take(mixed), selection.take(hidden)]
        if branch is not None:
            parts.append(selection.take(branch.expand(*hidden.shape[:2], 1)))
        return torch.cat([self.finish(*part) for part in zip(*parts, strict=True)])

    def mix(self, hidden: Tensor, sight: AttentionContext) -> Tensor:
        """Return what the heads of attention read, [B, S, heads * D]."""
        return self.self_attn(self.input_layernorm(hidden), sight)

    def finish(self, mixed: Tensor, hidden: Tensor, branch: Tensor | None = None) -> Tensor:
        """Add attention's and the MLP's share to `hidden`; each position is on its own from here."""
        hidden = hidden + self._added(self.self_attn.o_proj(mixed), branch)
        return hidden + self._added(self.mlp(self.post_attention_layernorm(hidden)), branch)

    def _added(self, output: Tensor, branch: Tensor | None) -> Tensor:
        output = F.dropout(output, self.dropout, self.training)
        return output if branch is None else output * branch.to(output.dtype)
