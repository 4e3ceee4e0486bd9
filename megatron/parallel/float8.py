"""Matrix products of the blocks in 8-bit floats, by torchao; weights, gradients and the optimizer know nothing of it.

Inputs, weights and the gradients of outputs are each rounded to e4m3 (gradients under "tensorwise" to e5m2) just
before a product, by one scale a tensor or one a row (2209.05433); results are bf16. Head and norms stay as they are.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch

from megatron.config.flags import require
from megatron.config.sections import Config
from megatron.model.transformer import Transformer

MULTIPLE = 16  # what the kernels ask of every side of a product
CAPABILITY = (8, 9)  # of the first GPUs with such products


def check_float8(config: Config, device: torch.device | None) -> None:
    """Raise ConfigurationError where the products of `config` cannot be computed in 8-bit floats.

    Without a device, as far as it does not depend on that.
    """
    recipe, parallel, model = config.training.fp8_recipe, config.parallel, config.model
    if recipe is None:
        return
    rule = "needs the package torchao; bash install.sh --with-fp8 installs it"
    require(find_spec("torchao") is not None, "fp8_recipe", recipe, rule)
    able = device is None or device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY
    require(able, "fp8_recipe", recipe, "needs a GPU of compute capability 8.9 or more, such as an H100; leave it out")
    rule = "is not available for layers that --tensor-model-parallel-size splits; leave one of them out"
    require(parallel.tensor_model_parallel_size == 1, "fp8_recipe", recipe, rule)
    require(not parallel.deepspeed, "fp8_recipe", recipe, "is not available with --deepspeed; leave one of them out")
    sides = {
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.mlp_size,
        "--num-attention-heads times --kv-channels": model.num_attention_heads * model.head_size,
        "--num-query-groups times --kv-channels": model.key_value_heads * model.head_size,
        "--seq-length": config.data.seq_length,
    }
    for name, size in sides.items():
        rule = f"needs sides of products that {MULTIPLE} divides, and {name} is {size}; change that, or leave it out"
        require(size % MULTIPLE == 0, "fp8_recipe", recipe, rule)


def round_products(model: Transformer, recipe: str, device: torch.device) -> None:
    """Let the linear layers of all blocks compute in 8-bit floats, in place; parameters keep names and values.

    A CPU has no such products, and computes them in bf16 from the rounded factors.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda")
    convert_to_float8_training(model.layers, config=config)
