"""The normalisation layers: RMSNorm or LayerNorm over the last dimension.

PyTorch's own layers compute in fp32 whatever the dtype of their input, and return that dtype.
"""

from torch import nn

from megatron.config.sections import ModelConfig


def normalisation(config: ModelConfig, width: int) -> nn.Module:
    """Return the layer that `--normalization` names, for vectors of `width` numbers."""
    layer = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.normalization]
    return layer(width, eps=config.norm_epsilon)
