"""Likelihoods of validation windows under unmasking policies, in the form that `validation.evaluate` reads."""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.generation.sampling import Sampling
from megatron.likelihoods.forced import policy_nll
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class WholeWindows(Likelihood):
    """Masked diffusion on windows with all scored tokens masked; the engine decides in which order they are unmasked.

    Batches contain the true tokens, and have a weight of 1 at the position that predicts each masked token.
    """

    masked: MaskedDiffusion

    name = "mdm"
    exact = True

    @property
    def target_offset(self) -> int:
        """The output at position j predicts token j + target_offset."""
        return self.masked.target_offset

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of masked diffusion."""
        return self.masked.prepare(ids, sample_indices, seed)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the batch of `ids` [B, S+1]; there is no noise."""
        length, offset = ids.shape[1] - 1, self.target_offset
        predicting = np.zeros((len(ids), length), np.float32)
        tokens = self.scored_tokens(length, alignment)
        predicting[:, tokens.start - offset : tokens.stop - offset] = 1
        return Batch(
            tokens=torch.from_numpy(ids[:, :-1].copy()),
            targets=torch.from_numpy(ids[:, offset : offset + length].copy()),
            weights=torch.from_numpy(predicting),
            counts=np.full(len(ids), tokens.stop - tokens.start),
            causal=False,
        )

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return self.masked.scored_tokens(seq_length, alignment)


@dataclass(frozen=True)
class PolicyEngine:
    """Evaluates windows exactly under one unmasking policy: an `EvaluationEngine` of one model on this rank."""

    model: Transformer
    ranks: ParallelContext
    sampling: Sampling
    offset: int = 0

    def nll(self, batch: Batch) -> Tensor:
        """Return the NLL of the tokens of `WholeWindows`, fp32 [B, S], at the positions that predict them."""
        return self.order_nll(batch, 0)

    def order_nll(self, batch: Batch, index: int) -> Tensor:
        """Return what `nll` does; with a random order, in the `index`-th order of each window."""
        predicting = batch.weights > 0  # [B, S]
        real = predicting.any(1)
        nll = torch.zeros(predicting.shape, device=self.ranks.device)
        if real.any():
            keys = [(_key(text), index) for text in batch.tokens[real].numpy()]
            masked = predicting[real].roll(self.offset, 1)
            policy = {"keys": keys, "sampling": self.sampling, "offset": self.offset}
            tokens = policy_nll(self.model, batch.tokens[real], masked, **policy)
            nll[real.to(nll.device)] = tokens.roll(-self.offset, 1)
        return nll

    def train(self) -> None:
        """Do nothing: the model is not trained."""

    def eval(self) -> None:
        """Set evaluation mode."""
        self.model.eval()

    def reshard(self) -> None:
        """Do nothing: the model is whole on every rank."""


@dataclass(frozen=True)
class MixtureEngine(PolicyEngine):
    """Bounds of log p(x), p(x) the mean of p(x | order) over all orders of the tokens, from K random orders.

    With l_k the NLL of a window in its k-th order and m = mean over k of exp(-l_k), in nats per window:

    1. The mean of l_k is at least -log p(x), by Jensen's inequality: the bound of masked diffusion.
    2. -log m is, in expectation, at least -log p(x), and falls with K (importance weighted bounds, 1509.00519); here it
       is evaluated with the K orders, and with each half of them.
    3. 1 - log psi - m / psi is, in expectation, at most -log p(x) for any psi that does not depend on the orders of m,
       since log p <= log psi + p / psi - 1: the tangent bound (2605.24292). Here psi is the m of one half, and m that
       of the other; both ways are averaged.

    Each window's value is divided evenly among its tokens, but for the parts that belong to single tokens.
    """

    orders: int = 8  # K, even

    estimates = ("mean over orders", "K/2 orders", "K orders", "lower bound")

    def nll(self, batch: Batch) -> Tensor:
        """Return the four `estimates` of `WholeWindows`, fp32 [4, B, S], at the positions that predict tokens."""
        orders = torch.stack([self.order_nll(batch, index) for index in range(self.orders)]).double()  # [K, B, S]
        scored = (batch.weights > 0).to(orders)  # [B, S]
        shares = scored / scored.sum(1, keepdim=True).clamp(min=1)
        first, second = orders.chunk(2)
        halves = (_mixture(first, shares) + _mixture(second, shares)) / 2
        lower = shares * (_tangent(first, second) + _tangent(second, first))[:, None] / 2
        return torch.stack([orders.mean(0), halves, _mixture(orders, shares), lower]).float()


def _mixture(nll: Tensor, shares: Tensor) -> Tensor:
    """Return the NLL of the mean of the probabilities of K orders, [B, S], from those of their tokens [K, B, S].

    With w_k = p_k / sum p, -log mean p is the sum of w_k l_k, and of log K minus the entropy of w, which is divided
    among the tokens by `shares` [B, S].
    """
    weights = (-nll.sum(2)).softmax(0)  # [K, B]
    rest = math.log(len(nll)) - torch.special.entr(weights).sum(0)  # [B]
    return (weights[..., None] * nll).sum(0) + shares * rest[:, None]


def _tangent(surrogate: Tensor, nll: Tensor) -> Tensor:
    """Return the tangent bound 1 - log psi - m / psi, [B], from the NLL [K, B, S] of the orders of psi and of m."""
    log_psi, log_mean = (torch.logsumexp(-orders.sum(2), 0) - math.log(len(orders)) for orders in (surrogate, nll))
    return 1 - log_psi - (log_mean - log_psi).exp()


def _key(text: np.ndarray) -> int:
    """Return a key of the random orders of a window: a hash of its tokens."""
    return int.from_bytes(hashlib.blake2b(text.astype(np.int64).tobytes(), digest_size=8).digest(), "little")


def with_steps(sampling: Sampling, tokens_per_step: int, num_tokens: int) -> Sampling:
    """Return the policy with as many steps as unmask `tokens_per_step` tokens each, of a window of `num_tokens`."""
    return replace(sampling, steps=-(-num_tokens // tokens_per_step))
