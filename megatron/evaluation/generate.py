"""Text from a trained model: the next token, over and over; or an answer of masks, filled in by masked diffusion.

A text depends on the model, the seed and its own prompt: neither batch size nor the other prompts change what is drawn
for it.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron.config.flags import spelling
from megatron.config.sections import DataConfig, ObjectiveConfig
from megatron.errors import ConfigurationError
from megatron.evaluation.generate_diffusion import OnStep, fill
from megatron.evaluation.sampling import Sampling, choose, keys
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer
from megatron.objectives import DOCUMENT_RULES
from megatron.randomness import stream

logger = logging.getLogger(__name__)

CAUSAL = ("ar", "dual")
REFUSED = {
    "any-order": "is told the place of each token it must say, which reading on from kept keys and values does not do",
    "block-diffusion": "reads a text twice, with a mask of its blocks, which filling in does not do",
}


def check_objective(objective_name: str, config: ObjectiveConfig | None = None) -> None:
    """Raise ConfigurationError where no text is generated from models of an objective, trained by `config`."""
    if objective_name not in (*CAUSAL, "mdm"):
        raise ConfigurationError(
            f"--objective {objective_name}: such a model {REFUSED[objective_name]}; take one of ar, dual or mdm"
        )
    if config is not None and config.target_positions:
        raise ConfigurationError(f"--target-positions: such a model {REFUSED['any-order']}; take a run without it")


def check_gaps(objective_name: str) -> None:
    """Raise ConfigurationError where a model cannot fill a gap in a text."""
    if objective_name != "mdm":
        reason = "knows what comes next, and a gap is filled by what stands on both sides of it"
        if objective_name == "dual":
            reason = "says at a position what stands at the next one, which filling gaps does not read"
        raise ConfigurationError(
            f"--objective {objective_name}: such a model {reason}; take a run of mdm, or --prompt alone"
        )


def check_sampling(objective_name: str, sampling: Sampling) -> None:
    """Raise ConfigurationError for settings of masked diffusion where the next token is predicted."""
    for name in sampling.masked_only() if objective_name in CAUSAL else ():
        raise ConfigurationError(
            f"{spelling(name)} {getattr(sampling, name)}: acts in masked diffusion, and --objective {objective_name} "
            "generates one token after another; leave it out"
        )
    if objective_name == "mdm" and not sampling.remask and (sampling.steps or 0) > sampling.max_new_tokens:
        raise ConfigurationError(
            f"--steps {sampling.steps}: is more than --max-new-tokens {sampling.max_new_tokens}, and each step fills "
            "at least one; give fewer, or --remask"
        )


def check_empty_prompt(config: DataConfig) -> None:
    """Raise ConfigurationError where a model, trained by `config`, has not learned how text begins behind `eod`."""
    for name in DOCUMENT_RULES:
        if getattr(config, name):
            raise ConfigurationError(
                f"{spelling(name)}: this model has never read on behind the end of another document, where an empty "
                "prompt begins; give a prompt"
            )


@torch.no_grad()
def generate(
    model: Transformer,
    objective_name: str,
    prompts: list[list[int]],
    sampling: Sampling,
    eod: int,
    batch_size: int = 16,
    seq_length: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    on_step: OnStep | None = None,
    finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to its first `eod`, which is left out.

    An empty prompt stands for the start of a document: it is read as `eod`. Prompts that with the new tokens would be
    longer than `seq_length`, the longest that the model was trained on, lose their beginning. `advance` is told of
    `max_new_tokens` a prompt, as they are decided, and `on_step` of each step of masked diffusion. `finished` is asked
    after each token whether the new tokens of a text so far are enough; masked diffusion, which does not write in
    order, does not ask. Raises ConfigurationError for objectives that cannot be generated from, and settings that do
    not act in this one.
    """
    check_objective(objective_name)
    check_sampling(objective_name, sampling)
    prompts = fitting([prompt or [eod] for prompt in prompts], sampling.max_new_tokens, seq_length)
    if objective_name == "mdm":
        asked = [prompt + [model.vocabulary.mask_id] * sampling.max_new_tokens for prompt in prompts]
        filled = fill(model, asked, sampling, batch_size, keys(prompts), eod, True, advance, on_step)
        answers = [text[len(prompt) :] for text, prompt in zip(filled, prompts, strict=True)]
        return [_up_to(answer, eod) for answer in answers]
    return _Continuing(model, sampling, eod, advance, finished).texts(prompts, batch_size)


def infill(
    model: Transformer,
    objective_name: str,
    texts: list[list[int]],
    sampling: Sampling,
    eod: int,
    batch_size: int = 16,
    seq_length: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """Return `texts` whose every [MASK] is replaced by a token, never by `eod`; a gap is as long as it was.

    `sampling.max_new_tokens` has no meaning here. `advance` is told of every [MASK], `on_step` of each step. Raises
    ConfigurationError where a text has no gap, or is longer than `seq_length`, and for other objectives than mdm.
    """
    check_objective(objective_name)
    check_gaps(objective_name)
    for text in texts:
        gaps = text.count(model.vocabulary.mask_id)
        if not gaps:
            raise ConfigurationError("--infill: a text has no gap; write one as {{8}}, with the number of its tokens")
        if seq_length is not None and len(text) > seq_length:
            raise ConfigurationError(
                f"--infill: a text has {len(text)} tokens, gaps counted, and this model was trained on {seq_length} "
                "(--seq-length); shorten it"
            )
        if not sampling.remask and (sampling.steps or 0) > gaps:
            raise ConfigurationError(
                f"--steps {sampling.steps}: is more than the {gaps} tokens of the gaps of a text, and each step "
                "fills at least one; give fewer, or --remask"
            )
    return fill(model, texts, sampling, batch_size, keys(texts), eod, False, advance, on_step)


def fitting(prompts: list[list[int]], new_tokens: int, seq_length: int | None) -> list[list[int]]:
    """Return the prompts, cut on the left so that they and the new tokens are at most `seq_length`; say so.

    Raises ConfigurationError where no token of a prompt would be left.
    """
    if seq_length is None:
        return prompts
    room = seq_length - new_tokens
    if room < 1:
        raise ConfigurationError(
            f"--max-new-tokens {new_tokens}: leaves no room for a prompt in the {seq_length} tokens of --seq-length "
            f"that this model was trained on; give at most {seq_length - 1}"
        )
    long = sum(len(prompt) > room for prompt in prompts)
    if long:
        logger.info(
            "%d of %d prompts lose their beginning: with %d new tokens, %d fit into the %d of --seq-length",
            *(long, len(prompts), new_tokens, room, seq_length),
        )
    return [prompt[-room:] for prompt in prompts]


class _Continuing:
    """Next-token prediction: reads prompts, and goes on token by token."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        eod: int,
        advance: Callable[[int], None],
        finished: Callable[[list[int]], bool],
    ):
        self.model, self.sampling, self.eod, self.advance, self.finished = model, sampling, eod, advance, finished
        self.device = model.embed_tokens.weight.device

    def texts(self, prompts: list[list[int]], batch_size: int) -> list[list[int]]:
        """Return what follows each prompt."""
        length, seed = self.sampling.max_new_tokens, self.sampling.seed
        keyed, answers = keys(prompts), [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # rows of a batch are about as long
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            draws = np.stack([stream(seed, "generation", *keyed[row]).random(length) for row in rows])
            batch = self._batch([prompts[row] for row in rows], torch.from_numpy(draws).to(self.device))
            for row, text in zip(rows, batch, strict=True):
                answers[row] = text
        return answers

    def _batch(self, prompts: list[list[int]], draws: Tensor) -> list[list[int]]:
        """Return what follows each of B prompts; `draws` [B, max_new_tokens] decide each token."""
        past, texts = KVCache(), [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=self.device)
        hidden = self._read_prompts(prompts, past)
        for turn in range(self.sampling.max_new_tokens):
            chosen = choose(self.model.head(hidden), self.sampling, draws[rows, turn])
            left = self.sampling.max_new_tokens - turn
            going = self._write(rows.tolist(), chosen.tolist(), texts, left)
            if not going.all():  # finished rows are read no more
                rows, chosen, past = rows[going], chosen[going], past.select(going.nonzero()[:, 0])
            if left == 1 or not len(rows):
                break
            hidden = self.model.read(chosen[:, None], past)[:, -1]
        return texts

    def _read_prompts(self, prompts: list[list[int]], past: KVCache) -> Tensor:
        """Read B prompts; return what the head reads of their ends, [B, H]."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        # filled up on the left, so that all rows end, and go on, at the same place
        present = torch.arange(longest, device=self.device) >= longest - lengths[:, None]
        return self.model.read(tokens, past, present)[:, -1]

    def _write(self, rows: list[int], tokens: list[int], texts: list[list[int]], left: int) -> Tensor:
        """Add a token to each of R texts; return which of them go on, bool [R]. They have `left` tokens to come."""
        going = []
        for row, token in zip(rows, tokens, strict=True):
            if token != self.eod:
                texts[row].append(token)
            going.append(token != self.eod and not self.finished(texts[row]))
            self.advance(1 if going[-1] else left)
        return torch.tensor(going, device=self.device)


def _up_to(tokens: list[int], eod: int) -> list[int]:
    return tokens[: tokens.index(eod)] if eod in tokens else tokens
