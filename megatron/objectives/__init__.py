"""The objectives by name, the options of each, and the input noise that training adds to them.

Each file owns both uses of its forward process: training and evaluation. A new objective is one file and one entry of
OBJECTIVES; see "Adding an objective" in docs/objectives.md.
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
    """How to build an objective, and which fields of ObjectiveConfig it has besides COMMON.

    `build(config, vocabulary, time_block, by_document)` passes each likelihood through `by_document`, which adds the
    document rules. An objective that cannot have document rules gives the reason in `no_document_rules`.
    """

    build: Callable[[ObjectiveConfig, Vocabulary, int, Callable[[Likelihood], Likelihood]], Objective]
    options: tuple[str, ...]
    no_document_rules: str = ""


COMMON = ("objective", "stochastic_depth")
NOISE = ("token_dropout", "token_dropout_max", "random_replacement")
NOISE += ("masked_input_weight", "masked_input_max", "randmask_ratio")
ORDERS = ("num_order_list", "use_predefined_order", "right_to_left_ratio", "target_offset_max", "target_positions")
MASKS = ("mask_times", "mask_eps")
DOCUMENT_RULES = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")  # of DataConfig
PERMUTED = "needs samples that are read from left to right; other orders interleave their documents"


def _autoregressive(config, vocabulary, time_block, by_document):
    orders = Orders(config.num_order_list, config.use_predefined_order, config.right_to_left_ratio)
    return by_document(Autoregressive(orders, config.target_offset_max, config.target_positions))


def _masked_diffusion(config, vocabulary, time_block, by_document, shifted=False):
    objective = MaskedDiffusion(
        vocabulary.mask_id,
        time_block,
        eps=config.mask_eps,
        mask_times=config.mask_times,
        suffix_ratio=config.ar_ratio,
        low_noise_samples=config.low_noise_samples,
        low_noise_ratio=config.low_noise_ratio,
        shifted=shifted,
    )
    return by_document(objective)


def _dual(config, vocabulary, time_block, by_document):
    masked = _masked_diffusion(config, vocabulary, time_block, by_document, shifted=True)
    return Dual(by_document(Autoregressive()), masked, config.causal_samples(time_block), time_block)


def _block_diffusion(config, vocabulary, time_block, by_document):
    return by_document(BlockDiffusion(vocabulary.mask_id, config.diffusion_block_size, config.mask_eps))


OBJECTIVES: dict[str, Entry] = {
    "ar": Entry(_autoregressive, (*NOISE, *ORDERS)),
    "mdm": Entry(_masked_diffusion, (*MASKS, "ar_ratio", "low_noise_samples", "low_noise_ratio")),
    "dual": Entry(_dual, (*MASKS, "causal_ratio")),
    "any-order": Entry(lambda *_: AnyOrder(), NOISE, no_document_rules=PERMUTED),
    "block-diffusion": Entry(_block_diffusion, ("mask_eps", "diffusion_block_size")),
}

# why an option is refused with an objective that does not have it
FOREIGN = {
    **dict.fromkeys(
        NOISE,
        "masked diffusion masks its inputs already, and more input noise would invalidate its bound; "
        "drop the flag or train with pretrain_gpt.py",
    ),
    **dict.fromkeys(MASKS, "acts in masked diffusion only; drop the flag or train with pretrain_mdm.py"),
    **dict.fromkeys(ORDERS, "acts in next-token prediction only (--objective ar); drop the flag"),
    **dict.fromkeys(
        ("ar_ratio", "low_noise_samples", "low_noise_ratio"),
        "acts in masked diffusion only (--objective mdm); drop the flag",
    ),
    "causal_ratio": "acts in --objective dual only; drop the flag or give both",
    "diffusion_block_size": "acts in --objective block-diffusion only; drop the flag or give both",
}


def foreign(name: str) -> list[str]:
    """Return the fields of ObjectiveConfig that objective `name` does not have."""
    known = (*COMMON, *OBJECTIVES[name].options)
    return [field.name for field in fields(ObjectiveConfig) if field.name not in known]


def build_objective(
    config: ObjectiveConfig, vocabulary: Vocabulary, time_block: int, documents: DocumentRules | None = None
) -> Objective:
    """Return the objective that `config` describes; the times of `time_block` samples are stratified together.

    Raises: ConfigurationError for an option that the objective does not have.
    """
    entry = OBJECTIVES[config.objective]
    for field in foreign(config.objective):
        value = getattr(config, field)
        require(value == getattr(ObjectiveConfig(), field), field, value, FOREIGN[field])

    def by_document(likelihood: Likelihood) -> Likelihood:
        return ByDocument(likelihood, documents) if documents else likelihood

    return entry.build(config, vocabulary, time_block, by_document)


def document_rules(data: DataConfig, config: ObjectiveConfig, eod: int) -> DocumentRules | None:
    """Return the rules for documents that end with `eod`; None where all are off and documents are one stream.

    Raises: ConfigurationError where samples are not read from left to right.
    """
    switches = {name: getattr(data, name) for name in DOCUMENT_RULES}
    if not any(switches.values()):
        return None
    first_flag = next(name for name, is_on in switches.items() if is_on)
    reason = OBJECTIVES[config.objective].no_document_rules
    if config.num_order_list > 1 or config.right_to_left_ratio:
        reason = PERMUTED
    if config.target_offset_max > 1:
        reason = f"with --target-offset-max {config.target_offset_max}, targets lie beyond the end of a document"
    require(not reason, first_flag, True, f"{reason}; leave one of them out")
    return DocumentRules(eod, **switches)


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
    """Return the noise that `config` sets, for a model of `num_layers` blocks."""
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
