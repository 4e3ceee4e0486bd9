"""How initial weights, learning rates and multipliers depend on width and depth (--parametrization).

muP keeps the size of every activation and of its change in a step independent of the width, CompleteP of the depth,
too, so that hyperparameters tuned on a small base model serve larger ones. With m = hidden size / base hidden size and
n = layers / base layers (1 with muP), each use of a block in a loop being a layer, in multiples of the base model's
values:

| | initial std | AdamW's lr | Muon's lr | AdamW's epsilon | multiplier in the forward pass |
|---|---|---|---|---|---|
| matrices of the blocks | m^-1/2 | 1/m | m^-1/2 | 1/(m n) | 1/n for what a block adds to the residual stream |
| vectors of the blocks | 1 | 1 | | 1/(m n) | |
| embedding, final norm, head | 1 | 1 | | 1/m | 1/m for the logits |

Embedding and head have the same row, so that they may be tied. A model of the base model's size is the standard one.

Yang et al., Tensor Programs V (2203.03466), table 8 and appendix B.3 (epsilon); Dey et al., CompleteP (2505.01618),
table 1 with alpha = 1. Muon: an orthogonal update of RMS r has the spectral norm r sqrt(width), where a change of
constant size needs a constant one (Yang et al., 2310.17813, condition 1).
"""

import math
from dataclasses import dataclass

from megatron.config.sections import ModelConfig

PARAMETRIZATION_FIELDS = ("parametrization", "base_hidden_size", "base_num_layers", "base_kv_channels")
PARAMETRIZATION_FIELDS += ("weight_decay_scaling",)


@dataclass(frozen=True)
class Scale:
    """Factors of learning rate, weight decay and epsilon of a group of parameters, relative to the base model."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The multipliers of a model relative to its base model; all are 1 with the standard parametrization."""

    width: float = 1.0  # m
    depth: float = 1.0  # n
    weight_decay_scaling: str = "inverse-lr"

    @classmethod
    def of(cls, config: ModelConfig) -> "Parametrization":
        """Return the multipliers of a model."""
        return cls(
            width=config.hidden_size / (config.base_hidden_size or config.hidden_size),
            depth=config.depth / (config.base_num_layers or config.depth),
            weight_decay_scaling=config.weight_decay_scaling,
        )

    @property
    def residual(self) -> float:
        """Factor of what attention and MLP add to the residual stream."""
        return 1 / self.depth

    @property
    def logits(self) -> float:
        """Factor of the logits."""
        return 1 / self.width

    @property
    def matrix_std(self) -> float:
        """Factor of the initial standard deviation of the matrices of the blocks."""
        return 1 / math.sqrt(self.width)

    def scale(self, *, in_block: bool, is_matrix: bool, optimizer: str) -> Scale:
        """Return the factors of a parameter that `optimizer` ("adamw" or "muon") updates."""
        if not in_block:
            return Scale(eps=1 / self.width)
        eps = 1 / (self.width * self.depth)
        if not is_matrix:
            return Scale(eps=eps)
        lr = 1 / math.sqrt(self.width) if optimizer == "muon" else 1 / self.width
        weight_decay = {"none": 1.0, "inverse-lr": 1 / lr, "sqrt-width": math.sqrt(self.width)}
        return Scale(lr=lr, weight_decay=weight_decay[self.weight_decay_scaling], eps=eps)


STANDARD = Parametrization()


def attention_scale(config: ModelConfig) -> float | None:
    """Return the factor of q k, sqrt(base head dimension) / head dimension; None for the usual 1 / sqrt of the latter.

    2203.03466, definition 4.1: with training, queries and keys become correlated, so their product grows with the
    dimension and not with its square root.
    """
    return config.base_kv_channels and math.sqrt(config.base_kv_channels) / config.head_size


def residual_output_std_layers(config: ModelConfig) -> int:
    """Return L in the initial std / sqrt(2L) of projections into the residual stream.

    With CompleteP it is the depth of the base model: the residual multiplier accounts for the ratio.
    """
    return config.base_num_layers or config.depth


def standard_settings(model: dict) -> dict:
    """Return the settings of a recorded model section with the standard parametrization."""
    defaults = {name: getattr(ModelConfig, name) for name in PARAMETRIZATION_FIELDS if name in model}
    return model | defaults
