"""One transformer block: the unit that is compiled, sharded and recomputed."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig
from megatron.model.attention import Attention, Sight
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

    def forward(self, hidden: Tensor, sight: Sight, branch: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; `branch` [B, 1, 1] scales what is added, for stochastic depth.

        Plain tensors and flags, so that the block compiles as one graph.
        """
        hidden = hidden + self._added(self.self_attn(self.input_layernorm(hidden), sight), branch)
        return hidden + self._added(self.mlp(self.post_attention_layernorm(hidden)), branch)

    def _added(self, output: Tensor, branch: Tensor | None) -> Tensor:
        output = F.dropout(output, self.dropout, self.training)
        return output if branch is None else output * branch.to(output.dtype)
