"""Our network as transformers knows it: Llama, Qwen3 where queries and keys are normalised, EuroBert where it is
bidirectional.

Parameters carry the same names, so weights need a prefix and a cut of the vocabulary's rows, and no permutation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.config.flags import typed
from megatron.config.sections import ModelConfig
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer

if TYPE_CHECKING:  # seconds to load, and only conversion needs it
    from transformers import PreTrainedConfig, PreTrainedModel

TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each id of the padded vocabulary


@dataclass(frozen=True)
class Family:
    """The classes of transformers that compute one kind of network."""

    config: str
    model: str
    biases: tuple[str, ...]  # which fields say that linear layers have biases
    bidirectional: bool = False
    normalised_queries: bool = False

    def config_class(self) -> "type[PreTrainedConfig]":
        return getattr(_transformers(), self.config)

    def model_class(self) -> "type[PreTrainedModel]":
        return getattr(_transformers(), self.model)


FAMILIES = {  # by the model_type of their config.json
    "llama": Family("LlamaConfig", "LlamaForCausalLM", ("attention_bias", "mlp_bias")),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", ("attention_bias",), normalised_queries=True),
    "eurobert": Family("EuroBertConfig", "EuroBertForMaskedLM", ("attention_bias", "mlp_bias"), bidirectional=True),
}


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            f"conversion needs the package transformers, and it cannot be imported ({error}); install it: "
            "bash install.sh --with-eval"
        ) from None
    return transformers


def family_of(config: ModelConfig, bidirectional: bool = False) -> Family:
    """Return the classes that compute this network exactly.

    Raises ConfigurationError where none does: with LayerNorm, GELU, biases or a bidirectional reading beside QK-norm,
    or heads that transformers refuses.
    """
    fixed = "and the classes that transformers has for this network know"
    faults = {
        "normalization": (config.normalization != "rmsnorm", f"{fixed} RMSNorm only"),
        "swiglu": (not config.swiglu, f"{fixed} SwiGLU only"),
        "add_bias_linear": (
            config.add_bias_linear and config.qk_layernorm,
            f"{fixed} no biases of all linear layers beside --qk-layernorm",
        ),
        "qk_layernorm": (
            config.qk_layernorm and bidirectional,
            "and EuroBertForMaskedLM, the bidirectional Llama of transformers, does not normalise queries and keys",
        ),
        "num_attention_heads": (
            config.hidden_size % config.num_attention_heads and not config.qk_layernorm,
            f"does not divide --hidden-size {config.hidden_size}, which transformers asks of a Llama whatever the "
            "width of its heads",
        ),
    }
    for name, (fault, reason) in faults.items():
        if fault:
            raise ConfigurationError(
                f"{typed(name, getattr(config, name))}: {reason}; this network cannot be exported, use its run folder"
            )
    return FAMILIES["eurobert" if bidirectional else "qwen3" if config.qk_layernorm else "llama"]


def hugging_face_config(
    config: ModelConfig, *, rows: int, positions: int, bidirectional: bool = False, **tokens: int | None
) -> "PreTrainedConfig":
    """Return the configuration of the network in transformers, over `rows` ids and at most `positions` of them.

    `tokens` are further fields: bos_token_id, eos_token_id, pad_token_id (None where not given), mask_token_id. Raises
    ConfigurationError as `family_of` does.
    """
    family = family_of(config, bidirectional)
    result = family.config_class()(
        vocab_size=rows,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_size,
        max_position_embeddings=positions,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        tie_word_embeddings=not config.untie_embeddings_and_output_weights,
        initializer_range=config.init_method_std,
        attention_dropout=config.attention_dropout,
        **dict.fromkeys(family.biases, config.add_bias_linear),
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens},
    )
    result.rope_theta = config.rotary_base  # readers before transformers 5 know this field alone, and default to 10000
    return result


def hugging_face_model(model: Transformer, config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return transformers' model of `config`, as `hugging_face_config` makes it, whose weights are those of `model`.

    They share their memory, beside the rows of the vocabulary that `config` leaves out.
    """
    family = FAMILIES[config.model_type]
    with torch.device("meta"):  # its own initial weights would take time and memory
        twin = family.model_class()(config)
    weights = {_outside(name): tensor for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_weight().detach()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: config.vocab_size]
    if isinstance(twin.lm_head.bias, nn.Parameter):  # EuroBert's head has a bias where its MLP has
        weights["lm_head.bias"] = weights["lm_head.weight"].new_zeros(config.vocab_size)
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config)  # its table is no weight
    return twin.eval()


def extra_rows(model: Transformer, rows: int) -> dict[str, Tensor]:
    """Return the rows of embedding and untied head behind the first `rows`, by our names: what no tokenizer says."""
    return {name: table[rows:].clone() for name, table in model.state_dict().items() if name in TABLES}


def our_name(name: str) -> str:
    """Return our name of a weight of transformers."""
    return name.removeprefix("model.")


def _outside(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"
