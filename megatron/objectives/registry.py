"""The objectives by name: how each is built, which options it has, and what its models can do.

A new objective is one file and one entry of OBJECTIVES; see "Adding an objective" in docs/objectives.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from megatron.config.capabilities import Capabilities, Refused
from megatron.config.flags import require
from megatron.config.sections import DataConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.any_order import AnyOrder
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.base import Likelihood, Objective
from megatron.objectives.block_diffusion import BlockDiffusion
from megatron.objectives.documents import ByDocument, DocumentRules
from megatron.objectives.dual import Dual
from megatron.objectives.mask_times import Bell, TimeSampling, Uniform, Window
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.orders import Orders


@dataclass(frozen=True)
class Entry:
    """How to build an objective, which fields of ObjectiveConfig it has besides COMMON, and what its models can do.

    `build(config, vocabulary, time_block, by_document)` passes each likelihood through `by_document`, which adds the
    document rules. An objective that cannot have document rules gives the reason in `no_document_rules`.
    """

    title: str  # as in --help and in the card of an export
    build: Callable[[ObjectiveConfig, Vocabulary, int, Callable[[Likelihood], Likelihood]], Objective]
    options: tuple[str, ...]
    capabilities: Capabilities
    no_document_rules: str = ""


COMMON = ("objective", "stochastic_depth")
NOISE = ("token_dropout", "token_dropout_max", "random_replacement")
NOISE += ("masked_input_weight", "masked_input_max", "randmask_ratio")
ORDERS = ("num_order_list", "use_predefined_order", "right_to_left_ratio", "target_offset_max", "target_positions")
TIMES = ("mask_time_distribution", "mask_time_low", "mask_time_high", "mask_time_center", "mask_time_std")
TIMES += ("mask_time_uniform_share", "mask_time_weighting", "mdm_loss")
MASKS = ("mask_times", "mask_eps", *TIMES)
DOCUMENT_RULES = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")  # of DataConfig
PERMUTED = "needs samples that are read from left to right; other orders interleave their documents"


def _autoregressive(config, vocabulary, time_block, by_document):
    orders = Orders(config.num_order_list, config.use_predefined_order, config.right_to_left_ratio)
    return by_document(Autoregressive(orders, config.target_offset_max, config.target_positions))


def _time_sampling(config: ObjectiveConfig) -> TimeSampling:
    share = config.uniform_time_share
    densities = {
        "uniform": Uniform(),
        "window": Window(config.mask_time_low, config.mask_time_high, share),
        "bell": Bell(config.mask_time_center, config.mask_time_std, share),
    }
    density = densities[config.mask_time_distribution]
    return TimeSampling(density, config.importance_weighted_times, simple=config.mdm_loss == "simple")


def _masked_diffusion(config, vocabulary, time_block, by_document, shifted=False):
    objective = MaskedDiffusion(
        vocabulary.mask_id,
        time_block,
        eps=config.mask_eps,
        mask_times=config.mask_times,
        suffix_ratio=config.ar_ratio,
        low_noise_samples=config.low_noise_samples,
        low_noise_ratio=config.low_noise_ratio,
        time_sampling=_time_sampling(config),
        shifted=shifted,
    )
    return by_document(objective)


def _dual(config, vocabulary, time_block, by_document):
    masked = _masked_diffusion(config, vocabulary, time_block, by_document, shifted=True)
    return Dual(by_document(Autoregressive()), masked, config.causal_samples(time_block), time_block)


def _block_diffusion(config, vocabulary, time_block, by_document):
    sampling = _time_sampling(config)
    return by_document(BlockDiffusion(vocabulary.mask_id, config.diffusion_block_size, config.mask_eps, sampling))


NO_GAPS = Refused("predicts the next token from the tokens before it, and a gap needs both sides")
NO_TARGET_POSITIONS = Refused("is given the position of each target, which generation with a KV cache does not do")
NO_BLOCK_MASK = Refused("processes a text twice with a mask of its blocks, which generation does not do")

OBJECTIVES: dict[str, Entry] = {
    "ar": Entry(
        "autoregressive",
        _autoregressive,
        (*NOISE, *ORDERS),
        Capabilities("causal", ("causal",), "causal", infilling=NO_GAPS, in_megatron_deepspeed=True),
    ),
    "mdm": Entry(
        "masked diffusion",
        _masked_diffusion,
        (*MASKS, "ar_ratio", "low_noise_samples", "low_noise_ratio"),
        Capabilities("masked", ("masked",), "masked", infilling="masked", needs_mask=True, in_megatron_deepspeed=True),
    ),
    "dual": Entry(
        "autoregressive and masked diffusion, jointly",
        _dual,
        (*MASKS, "causal_ratio"),
        Capabilities(
            "causal",
            ("causal", "masked"),
            "causal",
            infilling=Refused("predicts the token of the next position, which filling gaps does not support"),
            export_limits="This is its autoregressive side; its masked-diffusion side predicts the next token at each "
            "position, and no stock class does that.",
            masked_offset=1,
            needs_mask=True,
            mixes_kinds=True,
        ),
    ),
    "any-order": Entry(
        "the next token in a random order",
        lambda *_: AnyOrder(),
        NOISE,
        Capabilities(
            NO_TARGET_POSITIONS,
            ("causal", "permuted"),
            Refused(
                "predicts in random orders and needs target positions as an input, which no stock class of "
                "transformers accepts"
            ),
            infilling=NO_GAPS,
            target_positions=True,
        ),
        no_document_rules=PERMUTED,
    ),
    "block-diffusion": Entry(
        "blocks left to right, masked diffusion within a block",
        _block_diffusion,
        ("mask_eps", *TIMES, "diffusion_block_size"),
        Capabilities(
            NO_BLOCK_MASK,
            ("blocks",),
            Refused(
                "attends to each text and its masked copy under an attention mask of its own, which no stock class of "
                "transformers has"
            ),
            infilling=NO_GAPS,
            needs_mask=True,
            needs_attention_mask=True,
            positions_per_token=2,  # a sample and its masked copy
        ),
    ),
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


def capabilities(name: str) -> Capabilities:
    """Return what objective `name` declares about its models and samples.

    Raises: ConfigurationError for a name that this version does not know, as of a run of another one.
    """
    require(name in OBJECTIVES, "objective", name, f"is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].capabilities


def can(use: str) -> str:
    """Return the objectives whose models have a use, a field of Capabilities, as text: "ar, mdm or dual"."""
    values = {name: getattr(capabilities(name), use) for name in OBJECTIVES}
    names = [name for name, value in values.items() if value and not isinstance(value, Refused)]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


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
        require(value == getattr(ObjectiveConfig, field), field, value, FOREIGN[field])

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
