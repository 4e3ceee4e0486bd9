"""The normalisation layers: RMSNorm or LayerNorm over the last dimension.

PyTorch's layers compute in fp32 for any input dtype and return that dtype.
"""

from torch import nn

from megatron.config.sections import ModelConfig


def normalisation(config: ModelConfig, width: int) -> nn.RMSNorm | nn.LayerNorm:
    """Return the layer that `--normalization` names, for a last dimension of `width`."""
    layer = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.normalization]
    return layer(width, eps=config.norm_epsilon)
