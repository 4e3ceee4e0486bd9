"""Bounds of the likelihood of the mixture over all orders of the tokens, from K random orders."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.likelihoods.windows import PolicyEngine

MIN_PAIRS = 4  # with fewer, leaving one out makes another estimator of each half


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

    Block diffusion orders each block independently, given the blocks before it, so p(x) is the product of the mixtures
    over the orders of each block, and each bound is the sum of those of the blocks. That is below -log m of whole
    windows: a product of means is the mean over all ways to combine the orders of the blocks to orders of the window,
    and -log is convex. Each value of a window or block is divided evenly among its tokens, but for the parts that
    belong to single tokens.

    The standard error over random orders is that of the jackknife, which leaves out one of the K/2 pairs of orders, the
    k-th of each half: the estimates are symmetric functions of these pairs. It needs MIN_PAIRS of them. The lower bound
    has none: its tail makes the jackknife's error too large by more than a factor of two.
    """

    orders: int = 8  # K, even

    estimates = ("mean over orders", "K/2 orders", "K orders", "lower bound")
    num_variances = 3  # of the first estimates

    def nll(self, batch: Batch) -> Tensor:
        """Return the four `estimates` of the tokens of `WholeWindows` and three variances, fp32 [7, B, T].

        The variances, of the first estimates over random orders, are in squared nats and add up over windows; NaN with
        few orders.
        """
        orders = torch.stack([self.order_nll(batch, index) for index in range(self.orders)]).double()  # [K, B, T]
        scored = (batch.weights > 0).to(orders)[None]  # [1, B, T]
        length = scored.shape[2]
        size = self.chains.num_ordered(length)  # t, tokens of a group that is ordered independently
        orders, scored = (_groups(values, size) for values in (orders, scored))  # [K, G, t], [1, G, t]
        shares = scored[0] / scored[0].sum(1, keepdim=True).clamp(min=1)
        values = torch.cat([_estimates(orders, shares), _variances(orders)[..., None] * shares])  # [7, G, t]
        return values.reshape(len(values), len(batch.tokens), -1)[..., :length].float()


def _groups(values: Tensor, size: int) -> Tensor:
    """Return [K, B, T] as groups of `size` tokens, [K, G, size], the last one of a window padded with 0."""
    return torch.nn.functional.pad(values, [0, -values.shape[2] % size]).reshape(len(values), -1, size)


def _estimates(nll: Tensor, shares: Tensor) -> Tensor:
    """Return the `estimates` of `MixtureEngine`, [4, G, t], from the NLL of K orders [K, G, t] and `shares` [G, t]."""
    first, second = nll.chunk(2)
    halves = (_mixture(first, shares) + _mixture(second, shares)) / 2
    lower = shares * (_tangent(first, second) + _tangent(second, first))[:, None] / 2
    return torch.stack([nll.mean(0), halves, _mixture(nll, shares), lower])


def _variances(nll: Tensor) -> Tensor:
    """Return the jackknife's variances of the sums over tokens of the first `_estimates`, [3, G], from K orders."""
    totals = nll.sum(2)  # [K, G]
    pairs = len(nll) // 2
    if pairs < MIN_PAIRS:
        return totals.new_full((MixtureEngine.num_variances, totals.shape[1]), math.nan)
    shares = torch.ones_like(totals[0])[:, None]  # [G, 1], a group as a single token
    left_out = torch.stack(
        [
            _estimates(totals[torch.arange(len(nll)) % pairs != pair][..., None], shares)[..., 0]  # [4, G]
            for pair in range(pairs)
        ]
    )  # [K/2, 4, G]
    return (pairs - 1) * left_out[:, : MixtureEngine.num_variances].var(0, correction=0)


def _mixture(nll: Tensor, shares: Tensor) -> Tensor:
    """Return the NLL of the mean of the probabilities of K orders, [G, t], from those of their tokens [K, G, t].

    With w_k = p_k / sum p, -log mean p is the sum of w_k l_k, and of log K minus the entropy of w, which is divided
    among the tokens by `shares` [G, t].
    """
    weights = (-nll.sum(2)).softmax(0)  # [K, G]
    rest = math.log(len(nll)) - torch.special.entr(weights).sum(0)  # [G]
    return (weights[..., None] * nll).sum(0) + shares * rest[:, None]


def _tangent(surrogate: Tensor, nll: Tensor) -> Tensor:
    """Return the tangent bound 1 - log psi - m / psi, [G], from the NLL [K, G, t] of the orders of psi and of m."""
    log_psi, log_mean = (torch.logsumexp(-orders.sum(2), 0) - math.log(len(orders)) for orders in (surrogate, nll))
    return 1 - log_psi - (log_mean - log_psi).exp()
