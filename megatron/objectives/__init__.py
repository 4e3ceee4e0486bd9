"""The objectives by name, what each of them understands, and the noise on inputs that training adds to them.

Each file owns all uses of its forward process: training and evaluation. A new objective is one file and one entry of
OBJECTIVES; docs/objectives.md shows it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from megatron.batch import Batch
from megatron.config.flags import require
from megatron.config.sections import DataConfig, ObjectiveConfig, Vocabulary
from megatron.objectives.any_order import AnyOrder
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.base import Likelihood, Objective
from megatron.objectives.block_diffusion import BlockDiffusion
from megatron.objectives.documents import ByDocument, DocumentRules
from megatron.objectives.dual import Dual
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.orders import Orders
from megatron.objectives.row_masking import RowMasking
from megatron.objectives.stochastic_depth import StochasticDepth
from megatron.objectives.token_dropout import MaskedInput, RandomReplacement, TokenDropout


@dataclass(frozen=True)
class Entry:
    """How an objective is built, and the fields of ObjectiveConfig that it understands beside COMMON.

    `build(config, vocabulary, time_block, ruled)` passes each of its likelihoods through `ruled`, which adds the rules
    of documents; without them, `by_document` says why there can be none.
    """

    build: Callable[[ObjectiveConfig, Vocabulary, int, Callable[[Likelihood], Likelihood]], Objective]
    options: tuple[str, ...]
    by_document: str = ""


COMMON = ("objective", "stochastic_depth")
NOISE = ("token_dropout", "token_dropout_max", "random_replacement")
NOISE += ("masked_input_weight", "masked_input_max", "randmask_ratio")
ORDERS = ("num_order_list", "use_predefined_order", "right_to_left_ratio", "target_offset_max", "target_positions")
MASKS = ("mask_times", "mask_eps")
DOCUMENT_RULES = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")  # of DataConfig
PERMUTED = "a sample that is read in another order has its documents mixed"


def _autoregressive(config, vocabulary, time_block, ruled):
    orders = Orders(config.num_order_list, config.use_predefined_order, config.right_to_left_ratio)
    return ruled(Autoregressive(orders, config.target_offset_max, config.target_positions))


def _masked_diffusion(config, vocabulary, time_block, ruled, **options):
    masks = (vocabulary.mask_id, time_block, config.mask_eps, config.mask_times)
    return ruled(MaskedDiffusion(*masks, config.ar_ratio, config.low_noise_samples, config.low_noise_ratio, **options))


def _dual(config, vocabulary, time_block, ruled):
    masked = _masked_diffusion(config, vocabulary, time_block, ruled, shifted=True)
    return Dual(ruled(Autoregressive()), masked, config.causal_samples(time_block), time_block)


def _block_diffusion(config, vocabulary, time_block, ruled):
    return ruled(BlockDiffusion(vocabulary.mask_id, config.diffusion_block_size, config.mask_eps))


OBJECTIVES: dict[str, Entry] = {
    "ar": Entry(_autoregressive, (*NOISE, *ORDERS)),
    "mdm": Entry(_masked_diffusion, (*MASKS, "ar_ratio", "low_noise_samples", "low_noise_ratio")),
    "dual": Entry(_dual, (*MASKS, "causal_ratio")),
    "any-order": Entry(lambda *_: AnyOrder(), NOISE, by_document=PERMUTED),
    "block-diffusion": Entry(_block_diffusion, ("mask_eps", "diffusion_block_size")),
}

# why an option is refused under an objective that does not understand it
FOREIGN = {
    **dict.fromkeys(
        NOISE,
        "masked diffusion masks its inputs already, and other noise on what it may see would break its bound; "
        "drop the flag or train with pretrain_gpt.py",
    ),
    **dict.fromkeys(MASKS, "acts in masked diffusion only; drop the flag or train with pretrain_mdm.py"),
    **dict.fromkeys(ORDERS, "acts in next-token prediction only (--objective ar); drop the flag"),
    **dict.fromkeys(
        ("ar_ratio", "low_noise_samples", "low_noise_ratio"), "acts in masked diffusion only (--objective mdm); drop it"
    ),
    "causal_ratio": "acts in --objective dual only; drop the flag or give both",
    "diffusion_block_size": "acts in --objective block-diffusion only; drop the flag or give both",
}


def foreign(name: str) -> list[str]:
    """Return the fields of ObjectiveConfig that objective `name` does not understand."""
    known = (*COMMON, *OBJECTIVES[name].options)
    return [field.name for field in fields(ObjectiveConfig) if field.name not in known]


def build_objective(
    config: ObjectiveConfig, vocabulary: Vocabulary, time_block: int, documents: DocumentRules | None = None
) -> Objective:
    """Return the objective that `config` describes; `time_block` run positions are stratified together.

    Raises ConfigurationError for an option that has no meaning in it.
    """
    entry = OBJECTIVES[config.objective]
    for field in foreign(config.objective):
        value = getattr(config, field)
        require(value == getattr(ObjectiveConfig(), field), field, value, FOREIGN[field])
    return entry.build(config, vocabulary, time_block, lambda made: ByDocument(made, documents) if documents else made)


def document_rules(data: DataConfig, config: ObjectiveConfig, eod: int) -> DocumentRules | None:
    """Return the rules of documents that end with `eod`, None where documents are read as one stream.

    Raises ConfigurationError where samples are not read from left to right.
    """
    asked = {name: getattr(data, name) for name in DOCUMENT_RULES}
    if not any(asked.values()):
        return None
    name = next(name for name, value in asked.items() if value)
    reason = OBJECTIVES[config.objective].by_document
    reason = PERMUTED if config.num_order_list > 1 or config.right_to_left_ratio else reason
    if config.target_offset_max > 1:
        reason = f"--target-offset-max {config.target_offset_max} asks for tokens beyond the end of a document"
    require(not reason, name, True, f"{reason}; leave one of them out")
    return DocumentRules(eod, *asked.values())


@dataclass(frozen=True)
class InputNoise:
    """What training adds to the batches of an objective, absent in evaluation: noise in turn, then a second pass."""

    noise: tuple[Callable[[Batch, np.ndarray, int], Batch], ...]
    second_pass: MaskedInput | None

    def __call__(self, batch: Batch, sample_indices: np.ndarray, seed: int) -> list[Batch]:
        """Return the batches to train on, one or two, in place of the one at the `sample_indices` [B]."""
        for change in self.noise:
            batch = change(batch, sample_indices, seed)
        return [batch, self.second_pass(batch, sample_indices, seed)] if self.second_pass else [batch]


def build_input_noise(config: ObjectiveConfig, vocabulary: Vocabulary, num_layers: int) -> InputNoise:
    """Return the noise that `config` asks for, for a model of `num_layers` blocks."""
    noise = []
    if config.random_replacement:
        noise.append(RandomReplacement(vocabulary.size, config.random_replacement))
    if config.token_dropout or config.token_dropout_max:
        noise.append(TokenDropout(vocabulary.mask_id, config.token_dropout, config.token_dropout_max))
    if config.randmask_ratio:
        noise.append(RowMasking(config.randmask_ratio))
    if config.stochastic_depth:
        noise.append(StochasticDepth(num_layers, config.stochastic_depth))
    weight, maximum = config.masked_input_weight, config.masked_input_max
    second = MaskedInput(vocabulary.mask_id, maximum=maximum, weight=weight) if weight else None
    return InputNoise(tuple(noise), second)
