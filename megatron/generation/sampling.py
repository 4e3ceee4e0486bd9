"""From logits to tokens: greedy, or sampled with temperature, top-k and top-p.

Every draw is a uniform number keyed by the prompt, so that a text does not depend on the others of its batch.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.config.flags import flag, require, typed
from megatron.config.policies import ORDERS
from megatron.errors import ConfigurationError

MASKED = ("steps", "block_length", "order", "remask")  # fields that act in masked diffusion only


@dataclass(frozen=True)
class Sampling:
    """Sampling: the number of tokens, and how each is chosen.

    Without --temperature the most probable token is taken. The last four act in masked diffusion only.
    """

    max_new_tokens: int = flag(128, "maximum new tokens of a text; masked diffusion appends exactly as many [MASK]")
    temperature: float = flag(0.0, "sample from softmax(logits / T); 0: take the most probable token", metavar="T")
    top_k: int = flag(0, "sample from the K most probable tokens; 0: from all", metavar="K")
    top_p: float = flag(
        1.0,
        "sample from the smallest set of most probable tokens with this total probability; 1: from all",
        metavar="P",
    )
    seed: int = flag(0, "seed of all random draws")
    steps: int | None = flag(
        None, "masked diffusion: unmask all tokens in N steps, evenly (default: one token per step)", metavar="N"
    )
    block_length: int | None = flag(
        None,
        "masked diffusion: unmask blocks of N tokens from left to right (default: a single block)",
        metavar="N",
    )
    order: str = flag(
        "confidence",
        "masked diffusion: which positions are unmasked first: confidence, highest probability of the best token; "
        "margin, largest difference of the best two; entropy, lowest entropy; random; left-to-right; right-to-left",
        choices=ORDERS,
    )
    remask: float = flag(
        0.0, "masked diffusion: before each later step mask an unmasked token again with this probability", metavar="P"
    )

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "must not be negative; 0 is greedy")
        require(self.top_k >= 0, "top_k", self.top_k, "must not be negative; 0 keeps all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "is a probability above 0 and at most 1")
        require(0 <= self.seed < 2**64, "seed", self.seed, "lies in [0, 2**64)")
        for name in ("steps", "block_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(self.order in ORDERS, "order", self.order, f"is not one of {', '.join(ORDERS)}")
        require(0 <= self.remask < 1, "remask", self.remask, "is a probability below 1")
        for name, default in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(self, name)
            reason = "has no effect on greedy decoding (--temperature 0); give a temperature, or leave it out"
            require(value == default or self.temperature > 0, name, value, reason)
        if self.remask and self.block_length:
            raise ConfigurationError(
                f"{typed('remask', self.remask)} {typed('block_length', self.block_length)}: a block is finished "
                "before the next one starts; leave one of them out"
            )

    @property
    def is_random(self) -> bool:
        """Whether the result depends on random draws."""
        return bool(self.temperature or self.order == "random" or self.remask)

    def masked_only(self) -> list[str]:
        """Return the fields of masked diffusion that differ from their defaults."""
        return [name for name in MASKED if getattr(self, name) != getattr(Sampling(), name)]


def draw_keys(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Return the key of each prompt's draws: a hash of its ids, and the number of equal prompts before it.

    A text therefore depends on the seed and its own prompt only, and equal prompts get different texts.
    """
    counts = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(np.array(prompt, np.int64).tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        keys.append((key, counts[key]))
        counts[key] += 1
    return keys


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Return a token for each row of `logits` [R, V], int64 [R]; `uniforms` [R] in [0, 1) are the draws.

    Raises: ConfigurationError where logits are not finite.
    """
    if not torch.isfinite(logits.amax(-1)).all():  # single tokens may be excluded by -inf
        raise ConfigurationError("the logits of this model are not finite; take another checkpoint, or --dtype float32")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = probabilities(logits, sampling).cumsum(-1)  # [R, V]
    total = cumulative[:, -1:]
    # stay below the total despite rounding, so that a token of probability 0 is never drawn
    thresholds = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the sampling distribution, fp64 [R, V], of `logits` [R, V]: temperature, then top-k, then top-p.

    Tokens as probable as the k-th are kept with it. fp64, since rounding in fp32 acts as a lower temperature on tokens
    of low probability (2409.02908).
    """
    logits = logits.double() / sampling.temperature
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        sorted_probs, indices = probs.sort(descending=True, stable=True)
        removed = sorted_probs.cumsum(-1) - sorted_probs >= sampling.top_p  # more probable tokens reach top_p already
        probs = probs.masked_fill(torch.zeros_like(removed).scatter(-1, indices, removed), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
