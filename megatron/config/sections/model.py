"""The model section."""

import re
from dataclasses import dataclass, replace

from megatron.config.flags import Section, flag, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Model: a Llama-style decoder, causal or bidirectional."""

    model_size: str | None = flag(
        None,
        "model size from the published ladder, such as 140M: sets layers, hidden size, heads and head dimension; "
        "explicit flags win",
        metavar="NAME",
    )
    num_layers: int = flag(help="number of transformer blocks", within="[1, inf)")
    num_loops: int = flag(
        1, "passes through the blocks of --loop-layers, all with the same weights", metavar="K", within="[1, inf)"
    )
    loop_layers: str | None = flag(
        None,
        "indices, from 0, of the first and the last block that --num-loops repeats, such as 2-5; default all blocks",
        metavar="A-B",
        needs="num_loops",
    )
    hidden_size: int = flag(help="hidden size: width of the residual stream", within="[1, inf)")
    num_attention_heads: int = flag(help="number of query heads", within="[1, inf)")
    kv_channels: int | None = flag(
        None, "dimension of each head, an even number; default --hidden-size / --num-attention-heads", within="[1, inf)"
    )
    group_query_attention: bool = flag(
        False, "grouped-query attention (GQA) with --num-query-groups key/value heads", needs="num_query_groups"
    )
    num_query_groups: int | None = flag(
        None,
        "number of key/value heads",
        within="[1, inf)",
        needs="group_query_attention",
    )
    ffn_hidden_size: int | None = flag(
        None,
        "hidden size of the MLP; default floor(8h/3/64)*64 (at least 64) with SwiGLU, 4h with GELU, h = --hidden-size",
        within="[1, inf)",
    )
    swiglu: bool = flag(True, "SwiGLU MLP; --no-swiglu is GELU")
    normalization: str = flag("rmsnorm", "normalisation layer", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of RMSNorm or LayerNorm", within="(0, inf)")
    qk_layernorm: bool = flag(
        False, "normalise queries and keys per head before the rotary embedding (QK-norm), as in Qwen3"
    )
    rotary_base: float = flag(10000.0, "base (theta) of the rotary position embedding (RoPE)", within="(0, inf)")
    add_bias_linear: bool = flag(False, "add biases to the linear layers")
    untie_embeddings_and_output_weights: bool = flag(
        False, "give the output head its own weights instead of those of the token embedding"
    )
    softmax_over_padding: bool = flag(
        False,
        "include [MASK] and the padding rows of the vocabulary in the softmax, in training and in validation",
    )
    init_method_std: float = flag(
        0.02,
        "standard deviation of the initial weights; the output projections of attention and MLP use STD / sqrt(2 * "
        "--num-layers), a layer counted once for each of its --num-loops",
        metavar="STD",
        within="(0, inf)",
    )
    parametrization: str = flag(
        "standard",
        "how weights and learning rates depend on the size of the model, so that hyperparameters of a small base model "
        "serve a larger one; mup: on the width; completep: on width and depth",
        choices=("standard", "mup", "completep"),
        needs="base_hidden_size",
    )
    base_hidden_size: int | None = flag(
        None,
        "hidden size of the base model, whose hyperparameters are given",
        within="[1, inf)",
        needs="parametrization",
    )
    base_num_layers: int | None = flag(
        None,
        "transformer blocks of the base model",
        within="[1, inf)",
        needs="parametrization completep",
    )
    base_kv_channels: int | None = flag(
        None,
        "dimension of each head of the base model; default that of this model, whose width is then in more heads",
        within="[1, inf)",
        needs="parametrization",
    )
    weight_decay_scaling: str = flag(
        "inverse-lr",
        "factor of the weight decay of the matrices of the blocks, m = --hidden-size / --base-hidden-size; "
        "inverse-lr: the inverse of the factor of their learning rate, m for AdamW; sqrt-width: the square root of m; "
        "none: 1",
        choices=("inverse-lr", "sqrt-width", "none"),
        needs="parametrization",
    )
    attention_dropout: float = flag(0.0, "dropout of attention probabilities", metavar="P", within="[0, 1)")
    hidden_dropout: float = flag(
        0.0,
        "dropout of the attention and MLP outputs, before they are added to the residual stream",
        metavar="P",
        within="[0, 1)",
    )
    mlp_dropout: float = flag(0.0, "dropout inside the MLP, after the activation", metavar="P", within="[0, 1)")
    embedding_dropout: float = flag(0.0, "dropout of the token embeddings", metavar="P", within="[0, 1)")
    label_smoothing: float = flag(
        0.0,
        "label smoothing of the training loss: (1 - E) nll + E times the mean of -log p over the ids",
        metavar="E",
        within="[0, 1)",
    )
    z_loss: float = flag(
        0.0,
        "z-loss: add C log(Z)^2 to the training loss, Z the normaliser of the softmax",
        metavar="C",
        within="[0, inf)",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"is not a multiple of --num-attention-heads {self.num_attention_heads}; change one or give --kv-channels",
        )
        require(
            self.head_size % 2 == 0,
            "kv_channels" if self.kv_channels else "hidden_size",
            self.kv_channels or self.hidden_size,
            f"gives heads of dimension {self.head_size}, and rotary embeddings need an even one; change it",
        )
        require(
            self.parametrization != "completep" or self.base_num_layers is not None,
            "parametrization",
            self.parametrization,
            "scales with the depth and needs --base-num-layers; give it, or --parametrization mup",
        )
        require(
            self.num_attention_heads % self.key_value_heads == 0,
            "num_query_groups",
            self.num_query_groups,
            f"does not divide --num-attention-heads {self.num_attention_heads}; change one",
        )
        bounds = re.fullmatch(r"(\d+)-(\d+)", self.loop_layers or f"0-{self.num_layers - 1}")
        require(
            bounds is not None and int(bounds[1]) <= int(bounds[2]) < self.num_layers,
            "loop_layers",
            self.loop_layers,
            f"must be A-B with 0 <= A <= B <= {self.num_layers - 1}, the last of --num-layers {self.num_layers}; "
            "change it",
        )

    @property
    def loop_range(self) -> range:
        """Indices of the blocks that run --num-loops times."""
        if self.loop_layers is None:
            return range(self.num_layers)
        first, last = map(int, self.loop_layers.split("-"))
        return range(first, last + 1)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Index of the block of every use, in the order of computation; without loops every block is used once."""
        loop = self.loop_range
        return (*range(loop.start), *(tuple(loop) * self.num_loops), *range(loop.stop, self.num_layers))

    @property
    def depth(self) -> int:
        """Number of blocks that hidden states pass through: --num-layers, with each use in a loop counted."""
        return self.num_layers + (self.num_loops - 1) * len(self.loop_range)

    @property
    def unrolled(self) -> "ModelConfig":
        """The model without loops that computes the same: each use of a block is a block of its own."""
        return replace(self, num_layers=self.depth, num_loops=1, loop_layers=None)

    @property
    def head_size(self) -> int:
        """Dimension of each attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden size of the MLP: --ffn-hidden-size or its default."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # as in the published ladder; see "What Makes ... Data-Constrained Settings", 2507.15857, appendix 8
        return max(64, 8 * self.hidden_size // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size
