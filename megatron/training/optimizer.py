"""AdamW over two parameter groups: matrices decay, vectors do not."""

from torch import nn
from torch.optim import AdamW

from megatron.config.sections import OptimizerConfig


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, embeddings included; not to norms and biases."""
    return parameter.dim() >= 2


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return fused AdamW; the learning rate is set at every step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True)
