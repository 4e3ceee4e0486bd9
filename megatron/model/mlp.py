"""The MLP of a block: SwiGLU, or GELU with `--no-swiglu`."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections import ModelConfig


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(gelu(up(x))) with the exact GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.swiglu = config.swiglu
        self.dropout = config.mlp_dropout
        if config.swiglu:
            self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=config.add_bias_linear)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=config.add_bias_linear)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output of the MLP, [..., H] -> [..., H]."""
        active = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden) if self.swiglu else F.gelu(self.up_proj(hidden))
        return self.down_proj(F.dropout(active, self.dropout, self.training))
