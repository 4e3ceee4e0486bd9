"""The objectives by name. Each file owns all uses of its forward process: training and evaluation."""

from megatron.config.flags import require
from megatron.config.sections import ObjectiveConfig, Vocabulary
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.token_dropout import TokenDropout

# what an objective has no use for, and why
FOREIGN = {
    "ar": (("mask_times", "mask_eps"), "acts in masked diffusion only; drop the flag or train with pretrain_mdm.py"),
    "mdm": (
        ("token_dropout", "token_dropout_max"),
        "masked diffusion masks its inputs already, and an unscored [MASK] would break its bound; "
        "drop the flag or train with pretrain_gpt.py",
    ),
}


def build_objective(name: str, config: ObjectiveConfig, vocabulary: Vocabulary, time_block: int):
    """Return the objective "ar" or "mdm"; `time_block` is the number of run positions stratified together."""
    _refuse_foreign(name, config)
    if name == "ar":
        return Autoregressive()
    return MaskedDiffusion(vocabulary.mask_id, time_block, config.mask_eps, config.mask_times)


def build_token_dropout(name: str, config: ObjectiveConfig, vocabulary: Vocabulary) -> TokenDropout:
    """Return the input corruption composed with an objective in training."""
    _refuse_foreign(name, config)
    return TokenDropout(vocabulary.mask_id, config.token_dropout, config.token_dropout_max)


def _refuse_foreign(name: str, config: ObjectiveConfig) -> None:
    fields, rule = FOREIGN[name]
    for field in fields:
        value = getattr(config, field)
        require(value == getattr(ObjectiveConfig(), field), field, value, rule)
