"""Initial weights, each a pure function of (seed, parameter name), so that every layout starts from the same model."""

import math

import torch
from torch import nn

from megatron.config.parametrization import Parametrization, residual_output_std_layers
from megatron.config.sections import ModelConfig
from megatron.randomness import stream

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initialise an unsharded model on the CPU: matrices N(0, std), norm weights 1, biases 0.

    Projections into the residual stream get std / sqrt(2L), so that its variance does not grow with depth: L counts a
    block once for each of its uses, as each adds to the residual stream twice; the
    parametrization scales the matrices of the blocks with the width.
    """
    matrix_std = config.init_method_std * Parametrization.of(config).matrix_std
    residual_scale = math.sqrt(2 * residual_output_std_layers(config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            std = matrix_std if name.startswith("layers.") else config.init_method_std
            scale = residual_scale if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            parameter.normal_(0.0, std / scale, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(stream(seed, f"init/{name}").integers(2**63)))
