"""Our model as a transformers model: Llama, Qwen3 with QK-norm, EuroBert if bidirectional.

Parameter names are the same up to a prefix, so conversion slices the vocabulary rows and permutes nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.config.flags import typed
from megatron.config.sections import ModelConfig
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer

if TYPE_CHECKING:  # takes seconds to import, and only conversion needs it
    from transformers import PreTrainedConfig, PreTrainedModel

TABLES = ("embed_tokens.weight", "lm_head.weight")  # [V padded, H]


@dataclass(frozen=True)
class Family:
    """The transformers classes of one architecture."""

    config: str
    model: str
    biases: tuple[str, ...]  # config fields that turn biases of linear layers on
    bidirectional: bool = False
    normalised_queries: bool = False  # QK-norm

    def config_class(self) -> "type[PreTrainedConfig]":
        """Return the configuration class."""
        return getattr(_transformers(), self.config)

    def new_config(self, **fields: Any) -> "PreTrainedConfig":
        """Return a configuration with these `fields`, which depend on the class."""
        return getattr(_transformers(), self.config)(**fields)

    def model_class(self) -> "type[PreTrainedModel]":
        """Return the model class."""
        return getattr(_transformers(), self.model)


FAMILIES = {  # by the model_type of config.json
    "llama": Family("LlamaConfig", "LlamaForCausalLM", ("attention_bias", "mlp_bias")),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", ("attention_bias",), normalised_queries=True),
    "eurobert": Family("EuroBertConfig", "EuroBertForMaskedLM", ("attention_bias", "mlp_bias"), bidirectional=True),
}


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            f"conversion needs the package transformers, which cannot be imported ({error}); install it: "
            "bash install.sh --with-eval"
        ) from None
    return transformers


def family_of(config: ModelConfig, bidirectional: bool = False) -> Family:
    """Return the classes that compute this model exactly.

    Raises: ConfigurationError if there are none: with LayerNorm, GELU, QK-norm together with biases or bidirectional
    attention, or a number of heads that transformers refuses.
    """
    support = "the transformers classes for this architecture support"
    obstacles = {
        "normalization": (config.normalization != "rmsnorm", f"{support} RMSNorm only"),
        "swiglu": (not config.swiglu, f"{support} SwiGLU only"),
        "add_bias_linear": (
            config.add_bias_linear and config.qk_layernorm,
            f"{support} no biases in all linear layers together with --qk-layernorm",
        ),
        "qk_layernorm": (
            config.qk_layernorm and bidirectional,
            "EuroBertForMaskedLM, the bidirectional Llama of transformers, has no QK-norm",
        ),
        "num_attention_heads": (
            config.hidden_size % config.num_attention_heads and not config.qk_layernorm,
            f"does not divide --hidden-size {config.hidden_size}, which transformers requires of a Llama whatever its "
            "head dimension",
        ),
    }
    for name, (present, reason) in obstacles.items():
        if present:
            raise ConfigurationError(
                f"{typed(name, getattr(config, name))}: {reason}; this model cannot be exported, use its run folder"
            )
    return FAMILIES["eurobert" if bidirectional else "qwen3" if config.qk_layernorm else "llama"]


def hugging_face_config(
    config: ModelConfig, *, vocabulary_rows: int, max_positions: int, bidirectional: bool = False, **tokens: int | None
) -> "PreTrainedConfig":
    """Return the transformers configuration of the model.

    Loops are unrolled: each use of a block is a layer. `tokens` are further fields: bos_token_id, eos_token_id,
    pad_token_id (default None), mask_token_id.

    Raises: ConfigurationError as `family_of` does.
    """
    family = family_of(config, bidirectional)
    result = family.new_config(
        vocab_size=vocabulary_rows,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_size,
        max_position_embeddings=max_positions,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        tie_word_embeddings=not config.untie_embeddings_and_output_weights,
        initializer_range=config.init_method_std,
        attention_dropout=config.attention_dropout,
        **dict.fromkeys(family.biases, config.add_bias_linear),
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens},
    )
    result.rope_theta = config.rotary_base  # transformers before 5 reads only this field, and defaults to 10000
    return result


def hugging_face_model(model: Transformer, config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return the transformers model of `config`, from `hugging_face_config`, with the weights of `model`.

    Both share the memory of their weights, but for the further uses of a block in a loop, which are copies; vocabulary
    rows that `config` does not have are left out.
    """
    family = FAMILIES[config.model_type]
    with torch.device("meta"):  # skips initialisation, which takes time and memory
        converted = family.model_class()(config)
    weights = {_hugging_face_name(name): tensor for name, tensor in _unrolled(model).items()}
    weights["lm_head.weight"] = model.lm_weight().detach()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: config.vocab_size]
    if isinstance(converted.lm_head.bias, nn.Parameter):  # EuroBert's head has a bias if its MLP has
        weights["lm_head.bias"] = weights["lm_head.weight"].new_zeros(config.vocab_size)
    converted.load_state_dict(weights, assign=True)
    converted.tie_weights()
    converted.model.rotary_emb = type(converted.model.rotary_emb)(config=config)  # a buffer, not in the state dict
    return converted.eval()


def _unrolled(model: Transformer) -> dict[str, Tensor]:
    """Return the state dict of the model without loops that computes the same."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    used = set()
    for position, layer in model.schedule:
        for name, tensor in model.layers[layer].state_dict().items():
            weights[f"layers.{position}.{name}"] = tensor.clone() if layer in used else tensor
        used.add(layer)
    return weights


def extra_rows(model: Transformer, rows: int) -> dict[str, Tensor]:
    """Return the vocabulary rows of embedding and untied head from index `rows` on, by our names."""
    return {name: table[rows:].clone() for name, table in model.state_dict().items() if name in TABLES}


def our_name(name: str) -> str:
    """Return our name of a parameter of a transformers model."""
    return name.removeprefix("model.")


def _hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"
