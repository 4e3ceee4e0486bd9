"""Text generation: token by token with a KV cache, or by masked diffusion, which unmasks positions step by step.

A text depends on the model, the seed and its own prompt: neither the batch size nor other prompts change its draws.
"""

import logging
from collections.abc import Callable

import torch

from megatron.config.capabilities import Refused
from megatron.config.flags import require, spelling
from megatron.config.sections import DataConfig, ObjectiveConfig
from megatron.errors import ConfigurationError
from megatron.generation.causal import CausalGenerator
from megatron.generation.diffusion import OnStep, fill
from megatron.generation.sampling import Sampling, draw_keys
from megatron.model.transformer import Transformer
from megatron.objectives.registry import DOCUMENT_RULES, NO_TARGET_POSITIONS, can, capabilities

logger = logging.getLogger(__name__)


def check_objective(objective_name: str, config: ObjectiveConfig | None = None) -> None:
    """Raise ConfigurationError where generation does not support an objective or its configuration."""
    generation = capabilities(objective_name).generation
    if isinstance(generation, Refused):
        raise ConfigurationError(
            f"--objective {objective_name}: such a model {generation.reason}; take one of {can('generation')}"
        )
    if config is not None and config.target_positions:
        raise ConfigurationError(
            f"--target-positions: such a model {NO_TARGET_POSITIONS.reason}; take a run without it"
        )
    if config is not None:
        check_direction(config)


def check_direction(config: ObjectiveConfig) -> None:
    """Raise ConfigurationError where a model reads from right to left only."""
    ratio = config.right_to_left_ratio
    message = "trained the model from right to left only, and texts are read from left to right; take another run"
    require(ratio < 1, "right_to_left_ratio", ratio, message)


def check_gaps(objective_name: str) -> None:
    """Raise ConfigurationError where a model cannot fill a gap in a text."""
    infilling = capabilities(objective_name).infilling
    if isinstance(infilling, Refused):
        raise ConfigurationError(
            f"--objective {objective_name}: such a model {infilling.reason}; take a run of {can('infilling')}, or "
            "--prompt alone"
        )


def check_sampling(objective_name: str, sampling: Sampling) -> None:
    """Raise ConfigurationError for settings that do not act for an objective, and for more steps than tokens."""
    masked = capabilities(objective_name).generation == "masked"
    for name in () if masked else sampling.masked_only():
        raise ConfigurationError(
            f"{spelling(name)} {getattr(sampling, name)}: acts in masked diffusion, and --objective {objective_name} "
            "generates one token after another; leave it out"
        )
    if masked and not sampling.remask and (sampling.steps or 0) > sampling.max_new_tokens:
        raise ConfigurationError(
            f"--steps {sampling.steps}: is more than --max-new-tokens {sampling.max_new_tokens}, and each step unmasks "
            "at least one; give fewer, or --remask"
        )


def check_empty_prompt(config: DataConfig) -> None:
    """Raise ConfigurationError where training never had an end-of-document token as context of the next document."""
    for name in DOCUMENT_RULES:
        if getattr(config, name):
            raise ConfigurationError(
                f"{spelling(name)}: this model was not trained to predict a document after the end of another, which "
                "an empty prompt needs; give a prompt"
            )


@torch.no_grad()
def generate(
    model: Transformer,
    objective_name: str,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eod: int,
    batch_size: int = 16,
    seq_length: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    on_step: OnStep | None = None,
    finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to its first `eod`, which is left out.

    An empty prompt is the start of a document: `eod` takes its place. Prompts that are with the new tokens longer than
    `seq_length`, that of training, are truncated on the left. Callbacks:

    * `advance(n)` after n tokens are decided, in all `max_new_tokens` per prompt, for a progress bar;
    * `on_step` after each step of masked diffusion;
    * `finished(new_tokens)` after each token: whether the text is complete. Masked diffusion, which does not generate
      from left to right, does not call it.

    Raises: ConfigurationError for objectives that generation does not support, and settings without effect.
    """
    check_objective(objective_name)
    check_sampling(objective_name, sampling)
    prompts = truncate_prompts([prompt or [eod] for prompt in prompts], sampling.max_new_tokens, seq_length)
    if capabilities(objective_name).generation == "masked":
        masked = [prompt + [model.vocabulary.mask_id] * sampling.max_new_tokens for prompt in prompts]
        settings = {"batch_size": batch_size, "eod": eod, "open_end": True, "advance": advance, "on_step": on_step}
        texts = fill(model, masked, draw_keys(prompts), sampling, **settings)
        answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        return [_up_to(answer, eod) for answer in answers]
    generator = CausalGenerator(model, sampling, eod=eod, advance=advance, finished=finished)
    return generator.generate(prompts, batch_size)


def infill(
    model: Transformer,
    objective_name: str,
    texts: list[list[int]],
    sampling: Sampling,
    *,
    eod: int,
    batch_size: int = 16,
    seq_length: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """Return `texts` with every [MASK] replaced by a token other than `eod`; the length of a gap is fixed.

    `sampling.max_new_tokens` has no effect. `advance(n)` is called after n [MASK] are decided, `on_step` after each
    step.

    Raises: ConfigurationError for a text without a gap or longer than `seq_length`, and for objectives other than mdm.
    """
    check_objective(objective_name)
    check_gaps(objective_name)
    for text in texts:
        num_masked = text.count(model.vocabulary.mask_id)
        if not num_masked:
            raise ConfigurationError("--infill: a text has no gap; write one as {{8}}, with its number of tokens")
        if seq_length is not None and len(text) > seq_length:
            raise ConfigurationError(
                f"--infill: a text has {len(text)} tokens, gaps included, and this model was trained on {seq_length} "
                "(--seq-length); shorten it"
            )
        if not sampling.remask and (sampling.steps or 0) > num_masked:
            raise ConfigurationError(
                f"--steps {sampling.steps}: is more than the {num_masked} tokens of the gaps of a text, and each step "
                "unmasks at least one; give fewer, or --remask"
            )
    settings = {"batch_size": batch_size, "eod": eod, "open_end": False, "advance": advance, "on_step": on_step}
    return fill(model, texts, draw_keys(texts), sampling, **settings)


def truncate_prompts(prompts: list[list[int]], new_tokens: int, seq_length: int | None) -> list[list[int]]:
    """Return prompts that fit into `seq_length` with the new tokens; longer ones are truncated on the left and logged.

    Raises: ConfigurationError where no token of a prompt fits.
    """
    if seq_length is None:
        return prompts
    room = seq_length - new_tokens
    if room < 1:
        raise ConfigurationError(
            f"--max-new-tokens {new_tokens}: leaves no room for a prompt in the {seq_length} tokens of --seq-length "
            f"that this model was trained on; give at most {seq_length - 1}"
        )
    num_truncated = sum(len(prompt) > room for prompt in prompts)
    if num_truncated:
        logger.info(
            "%d of %d prompts are truncated on the left: with %d new tokens, %d fit into the %d of --seq-length",
            *(num_truncated, len(prompts), new_tokens, room, seq_length),
        )
    return [prompt[-room:] for prompt in prompts]


def _up_to(tokens: list[int], eod: int) -> list[int]:
    return tokens[: tokens.index(eod)] if eod in tokens else tokens
