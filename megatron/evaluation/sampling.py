"""From logits to tokens: greedy, or drawn from the probabilities that temperature, top-k and top-p leave.

Every draw is a uniform number that belongs to a text, so that a text does not depend on what is generated beside it.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.config.flags import flag, require, typed
from megatron.errors import ConfigurationError

ORDERS = ("confidence", "margin", "entropy", "random")
MASKED = ("steps", "block_length", "order", "remask")  # the fields of masked diffusion alone


@dataclass(frozen=True)
class Sampling:
    """Sampling: how many tokens, and how each is chosen.

    Without --temperature the most probable token is taken. The last four act in masked diffusion only.
    """

    max_new_tokens: int = flag(128, "most tokens of an answer; masked diffusion makes room for exactly as many")
    temperature: float = flag(0.0, "draw tokens from softmax(logits / T); 0: take the most probable one", metavar="T")
    top_k: int = flag(0, "draw from the K most probable tokens only; 0: from all", metavar="K")
    top_p: float = flag(
        1.0, "draw from the fewest most probable tokens that hold this probability together; 1: from all", metavar="P"
    )
    seed: int = flag(0, "seed of all that is drawn")
    steps: int | None = flag(
        None, "masked diffusion: fill the answer in N reads, evenly (by default a token a read)", metavar="N"
    )
    block_length: int | None = flag(
        None,
        "masked diffusion: fill blocks of N tokens from left to right (by default all at once)",
        metavar="N",
    )
    order: str = flag(
        "confidence",
        "masked diffusion: which places are filled first: confidence, those whose likeliest token is most probable; "
        "margin, where it is furthest above the second; entropy, of least entropy; random, any",
        choices=ORDERS,
    )
    remask: float = flag(
        0.0, "masked diffusion: before each later read hide a filled token again with this probability", metavar="P"
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
        for name, none in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(self, name)
            rule = "acts on what is drawn, and nothing is at --temperature 0; give a temperature, or leave it out"
            require(value == none or self.temperature > 0, name, value, rule)
        if self.remask and self.block_length:
            raise ConfigurationError(
                f"{typed('remask', self.remask)} {typed('block_length', self.block_length)}: a block is finished "
                "before the next one begins; leave one of them out"
            )

    @property
    def draws(self) -> bool:
        """Whether anything is left to chance."""
        return bool(self.temperature or self.order == "random" or self.remask)

    def masked_only(self) -> list[str]:
        """Return which fields are set that act in masked diffusion only."""
        return [name for name in MASKED if getattr(self, name) != getattr(Sampling(), name)]


def keys(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Return what the draws for each prompt are keyed by: a hash of its ids, and how many equal ones came before it.

    So a text depends on the seed and its own prompt, not on the others, and equal prompts get different texts.
    """
    seen, found = Counter(), []
    for prompt in prompts:
        digest = hashlib.blake2b(np.array(prompt, np.int64).tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        found.append((key, seen[key]))
        seen[key] += 1
    return found


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Return a token for each row of `logits` [R, V], int64 [R]; `uniforms` [R] in [0, 1) decide what is drawn.

    Raises ConfigurationError where logits are not finite.
    """
    if not torch.isfinite(logits.amax(-1)).all():  # a token that is never to come out has -inf
        raise ConfigurationError("the logits of this model are not finite; take another checkpoint, or --dtype float32")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    heights = probabilities(logits, sampling).cumsum(-1)
    total = heights[:, -1:]
    # below the total even where rounding would reach it, so that a token of probability 0 never comes out
    aims = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(heights, aims, right=True)[:, 0]


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what is drawn from, fp64 [R, V], of `logits` [R, V]: temperature, then top-k, then top-p.

    Tokens as probable as the k-th are kept with it. In fp64, since rounding in fp32 acts as a lower temperature on
    tokens of little probability (2409.02908).
    """
    logits = logits.double() / sampling.temperature
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], float("-inf"))
    found = logits.softmax(-1)
    if sampling.top_p < 1:
        ranked, places = found.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p  # what is more probable holds enough already
        found = found.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), 0)
        found = found / found.sum(-1, keepdim=True)
    return found
