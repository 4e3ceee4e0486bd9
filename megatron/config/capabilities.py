"""What an objective declares about its models and samples. Other packages read this instead of comparing names."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.sections import Config

Form = Literal["causal", "masked"]
ScoringForm = Literal["causal", "masked", "blocks", "permuted"]


@dataclass(frozen=True)
class Refused:
    """A use that models of an objective do not have; the `reason` continues "such a model ..."."""

    reason: str


@dataclass(frozen=True)
class Capabilities:
    """How models of an objective are used, and what its samples need.

    "causal" is from left to right, one token after another; "masked" is by predicting [MASK] from both sides; "blocks"
    is that within a block, given the text before it; "permuted" is causal in any order of the tokens. The first form
    that a model is scored in is the default, and the last one has the likelihoods of orders (`--likelihood`).
    """

    generation: Form | Refused
    scoring: tuple[ScoringForm, ...]
    export: Form | Refused
    infilling: Literal["masked"] | Refused
    export_limits: str = ""  # a sentence of the model card: what the export cannot do
    masked_offset: int = 0  # of masked predictions: the output at position j predicts token j + masked_offset
    target_positions: bool = False  # the model is given the position of each target
    needs_mask: bool = False  # inputs contain [MASK] without any regulariser
    needs_attention_mask: bool = False  # `Batch.blocked` instead of causal or full attention
    positions_per_token: int = 1  # of one forward pass over a sample
    mixes_kinds: bool = False  # samples of two kinds, in blocks of the global batch size; a micro-batch has one kind
    in_megatron_deepspeed: bool = False  # the published system (2507.15857) trains it


def mask_flags(config: Config, declared: Capabilities) -> dict[str, Any]:
    """Return the flags, by field name with their values, that make batches need an attention mask; empty without one.

    `declared` are the capabilities of the objective of `config`.
    """
    flags = {
        "reset_attention_mask": config.data.reset_attention_mask,
        "randmask_ratio": config.objective.randmask_ratio,
        "objective": declared.needs_attention_mask and config.objective.objective,
    }
    return {name: value for name, value in flags.items() if value}
