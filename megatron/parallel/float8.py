"""Matrix products of the blocks in float8, by torchao; parameters, gradients and the optimizer state do not change.

Inputs, weights and output gradients are rounded to e4m3 (output gradients with "tensorwise" to e5m2) just before a
product, with one scale per tensor or one per row (2209.05433); results are bf16. Head and norms are not converted.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch

from megatron.config.flags import require
from megatron.config.sections import Config
from megatron.model.transformer import Transformer

MULTIPLE = 16  # the kernels need every dimension of a product to be a multiple of this
CAPABILITY = (8, 9)  # compute capability of the first GPUs with float8 products


def check_float8(config: Config, device: torch.device | None) -> None:
    """Check that the matrix products of `config` can be computed in float8.

    Without a device, only what does not depend on one is checked.
    Raises: ConfigurationError.
    """
    recipe, parallel, model = config.training.fp8_recipe, config.parallel, config.model
    if recipe is None:
        return
    reason = "needs the package torchao; bash install.sh --with-fp8 installs it"
    require(find_spec("torchao") is not None, "fp8_recipe", recipe, reason)
    has_float8 = device is None or device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY
    reason = "needs a GPU of compute capability 8.9 or more, such as an H100; leave it out"
    require(has_float8, "fp8_recipe", recipe, reason)
    reason = "is not available for layers that --tensor-model-parallel-size splits; leave one of them out"
    require(parallel.tensor_model_parallel_size == 1, "fp8_recipe", recipe, reason)
    require(not parallel.deepspeed, "fp8_recipe", recipe, "is not available with --deepspeed; leave one of them out")
    sizes = {
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.mlp_size,
        "--num-attention-heads times --kv-channels": model.num_attention_heads * model.head_size,
        "--num-query-groups times --kv-channels": model.key_value_heads * model.head_size,
        "--seq-length": config.data.seq_length,
    }
    for name, size in sizes.items():
        reason = f"needs matrix dimensions that are multiples of {MULTIPLE}, and {name} is {size}; change it, or leave "
        require(size % MULTIPLE == 0, "fp8_recipe", recipe, reason + "--fp8-recipe out")


def convert_to_float8(model: Transformer, recipe: str, device: torch.device) -> None:
    """Make the linear layers of all blocks compute in float8, in place; parameters keep names and values.

    A CPU has no float8 products: they are emulated in bf16 from the rounded factors.
    """
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda")
    convert_to_float8_training(model.layers, config=config)
