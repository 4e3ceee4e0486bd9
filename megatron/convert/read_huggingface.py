"""Read transformers folders: config.json and safetensors of Llama, Qwen3 and EuroBert.

No code of the folder is executed and nothing is unpickled.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.huggingface import FAMILIES, TABLES, Family, our_name
from megatron.convert.write_imported_run import check_weights
from megatron.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# why a field of config.json cannot be imported
PARTIAL_ROTARY = "rotary embeddings cover the whole head dimension"
ROPE_SCALING = "RoPE scaling is not supported"
SLIDING_WINDOW = "sliding windows are not supported"
BIASES = "either all linear layers have a bias or none has"


@dataclass(frozen=True)
class Folder:
    """Configuration and weights of a transformers folder."""

    path: Path
    family: Family
    config: "PreTrainedConfig"
    model: ModelConfig
    weights: dict[str, Tensor]  # fp32, by our names; embedding and head have the folder's number of rows
    mask_row: int | None  # id of the mask token; None for causal models


def read_folder(path: Path) -> Folder:
    """Return configuration and weights of a folder.

    Raises: ConfigurationError if our model cannot express them.
    """
    raw = read_object(path / "config.json")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ConfigurationError(
            f"{path}/config.json: model_type {kind} cannot be imported; these can: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    try:
        config = family.config_class().from_dict(copy.deepcopy(raw))  # from_dict changes its argument
    except Exception as error:  # the library validates types and raises its own errors
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path}/config.json: transformers refuses it ({reason}); restore the file") from None
    model = model_config(config, raw, path)
    weights = _weights(path, config)
    masked = family.bidirectional
    if masked and not 0 <= config.mask_token_id < len(weights["embed_tokens.weight"]):
        raise ConfigurationError(
            f"{path}/config.json: mask_token_id {config.mask_token_id} is not a row of the embedding; correct it"
        )
    return Folder(
        path=path,
        family=family,
        config=config,
        model=model,
        weights=weights,
        mask_row=config.mask_token_id if masked else None,
    )


def model_config(config: "PreTrainedConfig", raw: dict, path: Path) -> ModelConfig:
    """Return our configuration of the model.

    Raises: ConfigurationError if a field, which it names, has a value that our model does not support.
    """
    family = FAMILIES[config.model_type]
    biases = {name: bool(getattr(config, name)) for name in family.biases}
    normalised = family.normalised_queries
    rope = dict(config.rope_parameters or {})
    kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
    obstacles = {
        "hidden_act": (config.hidden_act != "silu", "the MLP is SwiGLU with silu"),
        "partial_rotary_factor": (raw.get("partial_rotary_factor", 1.0) != 1.0, PARTIAL_ROTARY),
        "rope_scaling": (_scales(raw.get("rope_scaling")), ROPE_SCALING),
        "rope_parameters": (
            _scales(rope) or rope.get("partial_rotary_factor", 1.0) != 1.0,
            f"{ROPE_SCALING}, and {PARTIAL_ROTARY}",
        ),
        "rope_theta": (
            (raw.get("rope_theta") or rope["rope_theta"]) != rope["rope_theta"],
            f"rope_parameters or rope_scaling has {rope['rope_theta']}",
        ),
        "use_sliding_window": (raw.get("use_sliding_window"), SLIDING_WINDOW),
        "sliding_window": (not normalised and raw.get("sliding_window") is not None, SLIDING_WINDOW),
        "layer_types": (kinds, "all layers use full attention"),
        "attention_bias": (biases["attention_bias"] and (normalised or not biases["mlp_bias"]), BIASES),
        "mlp_bias": (biases.get("mlp_bias") and not biases["attention_bias"], BIASES),
        "quantization_config": (raw.get("quantization_config"), "quantized weights are not supported"),
    }
    for name, (present, reason) in obstacles.items():
        if present:
            value = json.dumps(raw.get(name, getattr(config, name, None)))
            raise ConfigurationError(f"{path}/config.json: {name} {value} cannot be imported: {reason}")
    grouped = config.num_key_value_heads != config.num_attention_heads
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        group_query_attention=grouped,
        num_query_groups=config.num_key_value_heads if grouped else None,
        ffn_hidden_size=config.intermediate_size,
        norm_epsilon=config.rms_norm_eps,
        qk_layernorm=normalised,
        rotary_base=float(rope["rope_theta"]),
        add_bias_linear=biases["attention_bias"],
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        init_method_std=config.initializer_range or 0.02,
        attention_dropout=float(config.attention_dropout or 0.0),
    )


def _scales(rope: dict | None) -> bool:
    """Return whether rope_scaling or rope_parameters may scale rotary positions, or differ by layer.

    The types `default`, and `linear` with factor 1, scale nothing. Older versions write `type` for `rope_type`.
    """
    rope = rope or {}
    kind = rope.get("rope_type") or rope.get("type")
    if any(isinstance(value, dict) for value in rope.values()):
        return True
    if kind == "linear":
        return rope.get("factor") != 1
    return kind not in (None, "default") or (kind is None and rope.get("factor", 1) != 1)


def _weights(path: Path, config: "PreTrainedConfig") -> dict[str, Tensor]:
    """Return the weights of a folder in fp32 by our names, without buffers, a tied head and an all-zero head bias."""
    weights = {}
    for file in _files(path):
        for name, tensor in read_tensors(file).items():
            if tensor.dtype not in FLOATS:
                raise ConfigurationError(
                    f"{file}: {name} has dtype {tensor.dtype}; give weights that are not quantized"
                )
            if not name.endswith("rotary_emb.inv_freq"):  # a buffer that older versions saved
                weights[our_name(name)] = tensor.float()
    bias = weights.pop("lm_head.bias", None)
    if bias is not None and bias.any():
        raise ConfigurationError(f"{path}: lm_head.bias is not zero and cannot be imported: our head has no bias")
    head, embedding = weights.get("lm_head.weight"), weights.get("embed_tokens.weight")
    if config.tie_word_embeddings and head is not None:
        if embedding is not None and not torch.equal(head, embedding):
            raise ConfigurationError(
                f"{path}: lm_head.weight differs from the embedding, and config.json ties them (tie_word_embeddings "
                "true); set that to false"
            )
        del weights["lm_head.weight"]
    check_weights(weights, model_config(config, {}, path), Vocabulary(config.vocab_size), str(path))
    for name in [name for name in TABLES if name in weights]:
        if len(weights[name]) != config.vocab_size:
            raise ConfigurationError(
                f"{path}: {name} has {len(weights[name])} rows, and config.json has vocab_size {config.vocab_size}; "
                "restore one of them"
            )
    return weights


def _files(path: Path) -> list[Path]:
    """Return the weight files of a folder: the single one, or those that its index names."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_object(index).get("weight_map", {}).values()))
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise ConfigurationError(f"{index}: names {outside}, which is not a file of this folder; restore the index")
    else:
        names = ["model.safetensors"]
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing is None:
        return [path / name for name in names]
    pickles = [file.name for file in sorted(path.glob("*.bin"))]
    if pickles:
        raise ConfigurationError(
            f"{path}: has no {missing}, and {pickles[0]} is a pickle, which can execute code and is not read; save it "
            "as safetensors on the machine that it comes from"
        )
    raise ConfigurationError(f"{path}: has no {missing}; give a complete transformers folder")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises: ConfigurationError if it is missing or damaged.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{file}: cannot be read as safetensors ({error}); copy it again") from None


def read_object(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises: ConfigurationError if there is none.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; give a transformers folder") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(contents, dict):
        raise ConfigurationError(f"{path}: does not hold a JSON object; copy it again")
    return contents
