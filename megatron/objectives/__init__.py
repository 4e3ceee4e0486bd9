"""The objectives by name. Each file owns all uses of its forward process: training and evaluation."""

from megatron.config.sections import ObjectiveConfig, Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.token_dropout import TokenDropout


def build_objective(name: str, config: ObjectiveConfig, vocabulary: Vocabulary, time_block: int):
    """Return the objective "ar" or "mdm"; `time_block` is the number of run positions stratified together."""
    if name == "ar":
        return Autoregressive()
    return MaskedDiffusion(vocabulary.mask_id, time_block, config.mask_eps, config.mask_times)


def build_token_dropout(name: str, config: ObjectiveConfig, vocabulary: Vocabulary) -> TokenDropout:
    """Return the input corruption composed with an objective in training."""
    dropout = TokenDropout(vocabulary.mask_id, config.token_dropout, config.token_dropout_max)
    if name == "mdm" and (dropout.ratio or dropout.maximum):
        raise ConfigurationError(
            f"--token-dropout {max(dropout.ratio, dropout.maximum)}: masked diffusion masks its inputs already, and "
            "an unscored [MASK] would break its bound; drop the flag or train with pretrain_gpt.py"
        )
    return dropout
