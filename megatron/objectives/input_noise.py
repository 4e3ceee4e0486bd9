"""The noise that training, not evaluation, adds to the batches of any objective."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron.batch import Batch
from megatron.config.sections import ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.row_masking import RowMasking
from megatron.objectives.stochastic_depth import StochasticDepth
from megatron.objectives.token_dropout import MaskedInput, RandomReplacement, TokenDropout


@dataclass(frozen=True)
class InputNoise:
    """Noise that training, not evaluation, adds to the batches of an objective, in sequence; then a second pass."""

    noise: tuple[Callable[[Batch, np.ndarray, int], Batch], ...]
    second_pass: MaskedInput | None

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> list[Batch]:
        """Return the batches to train on, one or two, for the clean `batch` at the `sample_indices` [B]."""
        for add_noise in self.noise:
            batch = add_noise(batch, sample_indices, seed)
        return [batch, self.second_pass(batch, sample_indices, seed)] if self.second_pass else [batch]


def build_input_noise(config: ObjectiveConfig, vocabulary: Vocabulary, num_layers: int) -> InputNoise:
    """Return the noise that `config` sets, for a model of `num_layers` blocks, each use in a loop counted."""
    noise = []
    if config.random_replacement:
        noise.append(RandomReplacement(vocabulary.size, config.random_replacement))
    if config.token_dropout or config.token_dropout_max:
        noise.append(TokenDropout(vocabulary.mask_id, config.token_dropout, config.token_dropout_max))
    if config.randmask_ratio:
        noise.append(RowMasking(config.randmask_ratio))
    if config.stochastic_depth:
        noise.append(StochasticDepth(num_layers, config.stochastic_depth))
    second_pass = None
    if config.masked_input_weight:
        second_pass = MaskedInput(
            vocabulary.mask_id, maximum=config.masked_input_max, weight=config.masked_input_weight
        )
    return InputNoise(tuple(noise), second_pass)
