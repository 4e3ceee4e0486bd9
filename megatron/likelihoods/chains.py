"""The chain rule along an order, of every kind of model that has a choice of orders."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron.config.flags import require
from megatron.generation.diffusion import Advance
from megatron.generation.sampling import Sampling
from megatron.likelihoods.forced import ForcedAnyOrder, ForcedBlocks, ForcedFilling, Keys
from megatron.model.transformer import Transformer
from megatron.objectives.any_order import AnyOrder
from megatron.objectives.autoregressive import read_in_order
from megatron.objectives.base import Likelihood
from megatron.objectives.block_diffusion import BlockDiffusion
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.randomness import stream


@dataclass(frozen=True)
class Chains(ABC):
    """The exact likelihoods of a model, one for each unmasking policy: the order, steps and blocks of a `Sampling`."""

    model: Transformer

    def num_ordered(self, num_masked: int) -> int:
        """Return how many of the masked tokens of a text a policy orders: all, or those of a block."""
        return num_masked

    def passes(self, sampling: Sampling, num_masked: int) -> int:
        """Return the forward passes of a text with so many masked tokens."""
        return sampling.steps or self.num_ordered(num_masked)

    def nll(
        self,
        texts: Tensor,
        masked: Tensor,
        *,
        keys: Keys,
        sampling: Sampling,
        advance: Advance = lambda tokens: None,
    ) -> Tensor:
        """Return the NLL of each masked token of texts [B, T] given those unmasked before it, fp32 [B, T], else 0.

        `masked` [B, T] has equally many True in every row. The seed of `sampling` and the `keys` [B] of the texts
        decide a random order.
        """
        filling = self.filling(texts, masked, keys=keys, sampling=sampling)
        with torch.no_grad():
            filling.run(advance)
        return filling.token_nll()

    @abstractmethod
    def filling(self, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling) -> ForcedFilling:
        """Return the teacher-forced sampler of texts [B, T]."""


@dataclass(frozen=True)
class MaskedChains(Chains):
    """Masked diffusion: a forward pass for each step."""

    offset: int = 0  # the output at position j predicts token j + offset

    def filling(self, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling) -> ForcedFilling:
        """Return the teacher-forced sampler of texts [B, T]."""
        return ForcedFilling(self.model, texts, masked, keys=keys, sampling=sampling, offset=self.offset)


@dataclass(frozen=True)
class BlockChains(Chains):
    """Block diffusion: blocks from left to right, the policy within each; a forward pass for a step of all blocks."""

    block_size: int

    def num_ordered(self, num_masked: int) -> int:
        """Return the number of tokens of a block."""
        return min(self.block_size, num_masked)

    def filling(self, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling) -> ForcedFilling:
        """Return the teacher-forced sampler of texts [B, T]."""
        return ForcedBlocks(self.model, texts, masked, keys=keys, sampling=sampling, block_size=self.block_size)


@dataclass(frozen=True)
class AnyOrderChains(Chains):
    """Any-order model: one forward pass where predictions do not decide the order, otherwise one for each step."""

    def passes(self, sampling: Sampling, num_masked: int) -> int:
        """Return the forward passes of a text with so many masked tokens."""
        return 1 if _is_fixed(sampling, num_masked) else super().passes(sampling, num_masked)

    def nll(
        self,
        texts: Tensor,
        masked: Tensor,
        *,
        keys: Keys,
        sampling: Sampling,
        advance: Advance = lambda tokens: None,
    ) -> Tensor:
        """Return what `Chains.nll` does."""
        num_masked = int(masked[0].sum())
        if not _is_fixed(sampling, num_masked):
            return super().nll(texts, masked, keys=keys, sampling=sampling, advance=advance)
        orders = np.stack([_order(row, key, sampling) for row, key in zip(masked.numpy(), keys, strict=True)])  # [B, T]
        batch = read_in_order(texts.numpy(), orders, np.ones(len(texts), np.int64), with_target_positions=True)
        batch = batch.to(self.model.embed_tokens.weight.device)
        with torch.no_grad():
            nll = self.model(batch, per_position=True)  # [B, T - 1]
        advance(len(texts) * num_masked)
        assert batch.target_positions is not None
        tokens = torch.zeros(texts.shape, device=nll.device).scatter_(1, batch.target_positions, nll)
        return tokens.where(masked.to(nll.device), 0.0)

    def filling(self, texts: Tensor, masked: Tensor, *, keys: Keys, sampling: Sampling) -> ForcedFilling:
        """Return the teacher-forced sampler of texts [B, T]."""
        return ForcedAnyOrder(self.model, texts, masked, keys=keys, sampling=sampling)


def _is_fixed(sampling: Sampling, num_masked: int) -> bool:
    """Return whether a policy unmasks one token after another, in an order that predictions do not decide."""
    return sampling.order in FIXED_ORDERS and (sampling.steps or num_masked) == num_masked


def _order(masked: np.ndarray, key: tuple[int, int], sampling: Sampling) -> np.ndarray:
    """Return the positions of a text, [T], in the order of a policy that is fixed; those that are not masked first."""
    positions = np.flatnonzero(masked)
    turns = FIXED_ORDERS[sampling.order](len(positions), stream(sampling.seed, "unmasking order", *key))  # [L]
    blocks = np.arange(len(positions)) // (sampling.block_length or len(positions))
    return np.concatenate([np.flatnonzero(~masked), positions[np.lexsort((turns, blocks))]])


# when each of so many positions is unmasked, by the order of `Sampling`
FIXED_ORDERS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "left-to-right": lambda length, generator: np.arange(length),
    "right-to-left": lambda length, generator: -np.arange(length),
    "random": lambda length, generator: generator.permutation(length),
}


def chains_of(likelihood: Likelihood, model: Transformer) -> Chains | None:
    """Return the chains of a model with a likelihood; None where it has no choice of orders."""
    if isinstance(likelihood, MaskedDiffusion):
        return MaskedChains(model, likelihood.target_offset)
    if isinstance(likelihood, BlockDiffusion):
        return BlockChains(model, likelihood.block_size)
    return AnyOrderChains(model) if isinstance(likelihood, AnyOrder) else None


def with_steps(sampling: Sampling, tokens_per_step: int, num_ordered: int) -> Sampling:
    """Return the policy with as many steps as unmask `tokens_per_step` tokens each, of `num_ordered` tokens."""
    return replace(sampling, steps=-(-num_ordered // tokens_per_step))


def check_policy(chains: Chains, num_masked: int, tokens_per_step: int, block_length: int | None) -> None:
    """Check that steps and blocks fit the tokens that a policy orders, of windows with so many masked tokens.

    Blocks within those of block diffusion are all of one length; otherwise the last one may be shorter.

    Raises: ConfigurationError where they do not.
    """
    size = chains.num_ordered(num_masked)
    ordered = f"{size} scored tokens of a window" if size == num_masked else f"{size} tokens of a block"
    message = f"is more than the {ordered}; give less"
    require(tokens_per_step <= size, "tokens_per_step", tokens_per_step, message)
    if isinstance(chains, BlockChains):
        message = f"does not divide the {ordered}; give a divisor, or leave it out"
        require(block_length is None or size % block_length == 0, "block_length", block_length, message)
