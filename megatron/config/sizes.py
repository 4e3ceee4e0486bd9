"""The published ladder of model sizes, parameter and FLOPs counts, and the papers' budgets.

Sources: 2507.15857 (Diffusion Beats Autoregressive in Data-Constrained Settings) and its published scripts, whose
sizes come from 2305.16264 (Scaling Data-Constrained Language Models).
"""

from math import prod
from typing import TypedDict

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError

# name: layers, hidden size, heads, head dimension. The names count a 4h GELU model; the published runs, and
# --model-size, use SwiGLU of hidden size floor(8h/3/64)*64. For six sizes heads x head dimension differs from h.
LADDER = {
    "7M": (3, 128, 4, 32),
    "14M": (4, 224, 7, 32),
    "20M": (5, 288, 7, 32),
    "35M": (6, 448, 7, 32),
    "44M": (8, 512, 8, 64),
    "57M": (9, 576, 9, 64),
    "74M": (10, 640, 10, 64),
    "90M": (13, 640, 10, 64),
    "106M": (16, 640, 10, 64),
    "117M": (12, 768, 12, 64),
    "140M": (15, 768, 12, 64),
    "163M": (18, 768, 12, 64),
    "175M": (14, 896, 14, 64),
    "196M": (16, 896, 14, 64),
    "217M": (18, 896, 14, 64),
    "251M": (16, 1024, 16, 64),
    "278M": (18, 1024, 16, 64),
    "306M": (20, 1024, 16, 64),
    "425M": (18, 1280, 10, 128),
    "489M": (21, 1280, 10, 128),
    "509M": (18, 1408, 11, 128),
    "552M": (24, 1280, 10, 128),
    "587M": (21, 1408, 11, 128),
    "632M": (19, 1536, 12, 128),
    "664M": (24, 1408, 11, 128),
    "724M": (22, 1536, 12, 128),
    "816M": (25, 1536, 12, 128),
    "893M": (20, 1792, 14, 128),
    "1018M": (23, 1792, 14, 128),
    "1143M": (26, 1792, 14, 128),
    "1266M": (22, 2048, 16, 128),
    "1424M": (22, 2176, 17, 128),
    "1429M": (25, 2048, 16, 128),
    "1593M": (28, 2048, 16, 128),
    "1609M": (25, 2176, 17, 128),
    "1731M": (24, 2304, 18, 128),
    "1794M": (28, 2176, 17, 128),
    "2007M": (28, 2304, 18, 128),
    "2283M": (32, 2304, 18, 128),
    "2298M": (26, 2560, 20, 128),
    "2639M": (30, 2560, 20, 128),
    "2980M": (34, 2560, 20, 128),
    "3530M": (36, 2688, 21, 128),
    "3802M": (36, 2816, 22, 128),
    "4084M": (36, 2944, 23, 128),
    "4516M": (36, 3072, 24, 128),
    "6796M": (40, 3584, 28, 128),
    "9293M": (42, 4096, 32, 128),
    "11452M": (47, 4352, 32, 128),
    "12295M": (44, 4608, 36, 128),
    "12569M": (47, 4608, 32, 128),
    "13735M": (47, 4864, 32, 128),
    "14940M": (49, 4992, 32, 128),
    "16183M": (47, 5120, 40, 128),
}
GPT2_VOCABULARY = 50257  # vocabulary size of the papers' tokenizer

# (objective, training FLOPs by the published convention): the best size of the papers
COMPUTE_OPTIMAL = {
    ("ar", 1e19): "217M",
    ("ar", 3e19): "425M",
    ("ar", 1e20): "724M",
    ("mdm", 1e19): "117M",
    ("mdm", 3e19): "217M",
    ("mdm", 1e20): "425M",
}
# objective: size and epochs of the best published runs on 100M unique tokens, and their validation loss
BEST_ON_100M = {"ar": ("140M", 50, 3.71), "mdm": ("425M", 500, 3.55)}


class LadderSettings(TypedDict):
    """The fields that --model-size sets."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    kv_channels: int


def ladder_settings(name: str) -> LadderSettings:
    """Return the fields that --model-size sets.

    Raises: ConfigurationError for a name that is not on the ladder.
    """
    if name not in LADDER:
        millions = int(name[:-1]) if name[:-1].isdigit() and name.endswith("M") else 0
        nearest = min(LADDER, key=lambda known: abs(int(known[:-1]) - millions))
        raise ConfigurationError(
            f"--model-size {name}: is not on the ladder; the nearest is {nearest}, and tools/sizes.py lists all"
        )
    layers, width, heads, head = LADDER[name]
    return {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "kv_channels": head}


def ladder_model(name: str) -> ModelConfig:
    """Return the model of one size in the published form: RMSNorm, SwiGLU, no biases, tied embeddings."""
    return ModelConfig(**ladder_settings(name))


def block_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a block by its name in the block."""
    width, head, mlp = model.hidden_size, model.head_size, model.mlp_size
    query, key_value = model.num_attention_heads * head, model.key_value_heads * head
    layers = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width),
        "self_attn.o_proj": (width, query),
        **({"mlp.gate_proj": (mlp, width)} if model.swiglu else {}),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head} if model.qk_layernorm else {}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items() if model.add_bias_linear}
    shapes |= {f"{name}.weight": (size,) for name, size in norms.items()}
    return shapes | {f"{name}.bias": (size,) for name, size in norms.items() if model.normalization == "layernorm"}


def parameter_count(model: ModelConfig, vocabulary: Vocabulary) -> int:
    """Return N: all parameters of the model, the embedding (padding rows included) counted once."""
    block = sum(prod(shape) for shape in block_shapes(model).values())
    vectors = 1 if model.normalization == "rmsnorm" else 2  # of the final norm
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * block + (vectors + tables * vocabulary.padded_size) * model.hidden_size


def non_embedding_count(model: ModelConfig, vocabulary: Vocabulary) -> int:
    """Return the number of parameters without the input embedding; an untied output head is counted."""
    return parameter_count(model, vocabulary) - vocabulary.padded_size * model.hidden_size


def published_count(model: ModelConfig) -> int:
    """Return N as the published scripts compute it: 4Lh^2 + 3Lhf + 6Lh + 50257h.

    It takes heads x head dimension for the hidden size, and so overcounts the six sizes where they differ.
    """
    layers, width = model.num_layers, model.hidden_size
    return layers * (4 * width**2 + 3 * width * model.mlp_size + 6 * width) + GPT2_VOCABULARY * width


def flops_per_token(model: ModelConfig, vocabulary: Vocabulary, seq_length: int) -> dict[str, float]:
    """Return the training FLOPs per token by each convention, the same for every objective.

    N counts the parameters of a block once for each of its uses (--num-loops).

    - "6nd": 6N, the embedding counted once. Budgets (--train-flops) and records use it.
    - "6nd_published": 6N with the published scripts' N.
    - "6nd_no_embedding": 6 x non-embedding parameters, which the published system logs.
    - "hardware": the matrix products of forward and backward, with attention over the whole [S, S] matrix and the
      head at every position (Megatron's throughput formula, 2104.04473, section 5.1, with SwiGLU's third matrix).
    """
    model = model.unrolled
    width, query = model.hidden_size, model.num_attention_heads * model.head_size
    key_value = model.key_value_heads * model.head_size
    projections = 2 * width * query + 2 * width * key_value + (3 if model.swiglu else 2) * width * model.mlp_size
    attention = 2 * query * seq_length
    products = model.num_layers * (projections + attention) + vocabulary.padded_size * width
    return {
        "6nd": 6.0 * parameter_count(model, vocabulary),
        "6nd_published": 6.0 * published_count(model),
        "6nd_no_embedding": 6.0 * non_embedding_count(model, vocabulary),
        "hardware": 6.0 * products,
    }
