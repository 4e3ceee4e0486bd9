"""The output head fused with its loss, at the scored positions only.

Rows go through the head in chunks of one fixed size, the last one filled up with rows of zero weight; on CUDA, where
chunks are large, to a multiple of a smaller size. No [B, S, V] tensor is made, and because the shapes of matrix
products follow from the number of rows alone, and on a CPU not even from that, equal inputs give equal bits in every
process. The forward pass already computes the gradients, so no logits are kept for the backward pass.

Only the first `size` rows of the head are ids of the tokenizer. The others take part in the product, whose
width is then a multiple of 128, but their logits are set to minus infinity: they have no probability and
their gradient is exactly zero.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK_ROWS = {"cpu": 256, "cuda": 8192}
FILLED_TO = {"cuda": 1024}  # of this the last chunk has a multiple of rows; elsewhere it is as large as the others
CACHED_NUMBERS = 800_000  # that a CPU works on at a time: fp32 copies of more leave its cache, and fresh memory is slow


class WholeHead:
    """A head of which every row is here. One that is split over processes overrides what follows from that."""

    whole = True
    start = 0  # the id of the first row that is here

    def local(self, weight: Tensor) -> Tensor:
        """Return the rows that are here."""
        return weight

    def highest(self, values: Tensor) -> Tensor:
        """Return the maxima over all parts; `values`, the maxima of this part, may be overwritten."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the sums over all parts; `values`, the sums of this part, may be overwritten."""
        return values


WHOLE = WholeHead()


class Terms(NamedTuple):
    """What training adds to a row's nll; every term is 0 where it is off.

    The row's loss is (1 - label_smoothing) * nll + label_smoothing * mean of -log p over the ids + z_loss * log(Z)^2:
    label smoothing (Szegedy et al. 2016, 1512.00567, section 7) and PaLM's z-loss (2204.02311, section 5), where Z is
    the softmax's normaliser, the sum of exp(logit).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = Terms()


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor,
    size: int,
    part: WholeHead = WHOLE,
    terms: Terms = PLAIN,
) -> Tensor:
    """Return sum over `rows` of weights * loss, fp32 [1], differentiable in `hidden` and `head`.

    hidden [N, H] and head [padded vocabulary, H] in the compute dtype; targets int64 [N]; weights fp32 [N];
    rows int64 [R], distinct indices into N, R may be 0. A row's loss is its nll unless `terms` add to it. Matrix
    products run in the compute dtype, softmax and sums in fp32. Where `head` holds one part of the rows, every part
    gives the same loss, and the gradient of `hidden` is this part's share of a sum.
    """
    return _LinearCrossEntropy.apply(hidden, head, targets, weights, rows, size, part, terms)


@torch.no_grad()
def linear_nll(
    hidden: Tensor, head: Tensor, targets: Tensor, rows: Tensor, size: int, part: WholeHead = WHOLE
) -> Tensor:
    """Return the nll of every row named in `rows`, fp32 [N], 0 elsewhere; without a graph."""
    nll = torch.zeros(len(hidden), device=hidden.device)
    for chunk, padded, target in _chunks(targets, rows):
        pieces = _pieces(hidden[padded] @ head.T, target, cut=part.whole)
        nll[chunk] = torch.cat([_softmax_(logits, at, size, part).nll for logits, at in pieces])[: len(chunk)]
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, rows, size, part, terms):
        loss = torch.zeros(1, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        # reused by all chunks: a CPU pays dearly for fresh memory
        logits = hidden.new_empty(CHUNK_ROWS[hidden.device.type], len(head))
        chunk_grad_head = torch.empty_like(head)
        for chunk, padded, target in _chunks(targets, rows):
            inputs = hidden[padded]  # [C, H]
            weight = _pad(weights[chunk], len(padded))
            chunk_logits = torch.mm(inputs, head.T, out=logits[: len(padded)])  # [C, padded vocabulary]
            loss += (_to_gradient_(chunk_logits, target, weight, size, part, terms) * weight).sum()
            grad_hidden[chunk] = (chunk_logits @ head)[: len(chunk)]
            torch.mm(chunk_logits.T, inputs, out=chunk_grad_head)
            for total, piece in _pieces(grad_head, chunk_grad_head):
                total += piece
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # the product is taken in fp32: a bf16 copy of the scale would bias every gradient alike
        grad_hidden, grad_head = ctx.saved_tensors
        scaled_head = torch.empty_like(grad_head, dtype=ctx.dtype)
        for scaled, piece in _pieces(scaled_head, grad_head):
            torch.mul(piece, grad_output, out=scaled)
        return (grad_hidden * grad_output).to(ctx.dtype), scaled_head, None, None, None, None, None, None


def _chunks(targets: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows of each chunk [<= C], the same filled up with row 0 to [C], and their targets [C]."""
    kind = rows.device.type
    most = CHUNK_ROWS[kind]
    unit = FILLED_TO.get(kind, most)
    for chunk in rows.split(most):
        if len(chunk):
            # a filling row gets target 0: the target of row 0 itself need not be an id of the tokenizer
            size = -(-len(chunk) // unit) * unit
            yield chunk, _pad(chunk, size), _pad(targets[chunk], size)


def _pad(vector: Tensor, size: int) -> Tensor:
    return F.pad(vector, (0, size - len(vector)))


def _pieces(matrix: Tensor, *others: Tensor, cut: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching rows of `matrix` and of others as long: all at once, or on a CPU as many as its cache holds."""
    cut = cut and matrix.device.type == "cpu"
    rows = max(1, CACHED_NUMBERS // matrix.shape[1]) if cut else max(1, len(matrix))
    return zip(*(tensor.split(rows) for tensor in (matrix, *others)), strict=True)


def _to_gradient_(logits: Tensor, targets: Tensor, weights: Tensor, size: int, part: WholeHead, terms: Terms) -> Tensor:
    """Overwrite logits [C, rows of the head] by weights * d loss / d logits; return the loss, fp32 [C]."""
    smoothing, z_loss = terms
    found = []
    # parts wait for one another at every piece, and need not hold as many rows: they take one piece
    for piece, target, weight in _pieces(logits, targets, weights, cut=part.whole):
        softmax = _softmax_(piece, target, size, part, averaged=bool(smoothing))
        loss, scale = softmax.nll, weight
        if smoothing:
            loss = loss + smoothing * (softmax.scored - softmax.average).squeeze(1)
        if z_loss:
            log_z = (softmax.highest + softmax.total.log()).squeeze(1)
            loss, scale = loss + z_loss * log_z.square(), weight * (1 + 2 * z_loss * log_z)
        # weight * ((1 + 2 z log Z) softmax - (1 - e) onehot(target) - e / size)
        at_target = (smoothing - 1) * weight[:, None] * softmax.here
        softmax.write_(piece, scale[:, None] / softmax.total, at_target, -weight[:, None] * (smoothing / size))
        found.append(loss)
    return torch.cat(found)


@dataclass(frozen=True)
class _Softmax:
    nll: Tensor  # [C]
    powers: Tensor | None  # [C, rows of the head]: exp(logit - highest), 0 where a row is no id; kernels keep none
    highest: Tensor  # [C, 1]: the highest logit
    total: Tensor  # [C, 1]: sum of powers over the vocabulary
    scored: Tensor  # [C, 1]: the target's logit - highest
    average: Tensor | None  # [C, 1]: mean of logit - highest over the vocabulary, where it is asked for
    index: Tensor  # [C, 1]: the target's row of this part, or 0
    here: Tensor  # [C, 1]: 1.0 where the target is one of this part, else 0.0
    ids: int  # rows of the head that are ids of the tokenizer

    def write_(self, logits: Tensor, scale: Tensor, at_target: Tensor, everywhere: Tensor) -> None:
        """Overwrite logits by scale * powers + everywhere, and + at_target at the targets; 0 where a row is no id."""
        if self.powers is None:
            write_ = _kernels(logits.device.type).write_gradient_
            write_(logits, self.index, self.highest, scale, at_target, everywhere, self.ids)
            return
        gradient = self.powers.mul_(scale)
        gradient.scatter_add_(1, self.index, at_target)
        if self.average is not None:
            gradient[:, : self.ids].add_(everywhere)
        logits.copy_(gradient)


def _softmax_(logits: Tensor, targets: Tensor, size: int, part: WholeHead, averaged: bool = False) -> _Softmax:
    """Return the softmax of logits [C, rows of the head] in fp32; they may be overwritten."""
    ids = min(logits.shape[1], max(0, size - part.start))
    index = (targets - part.start)[:, None]
    here = (index >= 0) & (index < logits.shape[1])
    index = index.where(here, 0)
    kernels = _kernels(logits.device.type)
    if kernels:
        powers = None
        top, total, scored, added = kernels.statistics(logits, index, ids)
        highest = part.highest(top.clone())
        total, scored, average = total * (top - highest).exp(), scored - highest, (added - ids * highest) / size
    else:
        powers = logits.float()
        powers[:, ids:] = float("-inf")
        highest = part.highest(powers.amax(-1, keepdim=True))
        scored = powers.sub_(highest).gather(1, index)
        average = powers[:, :ids].sum(-1, keepdim=True) / size if averaged else None
        total = powers.exp_().sum(-1, keepdim=True)
    sums = [total, scored.where(here, 0.0)] + [average] * averaged
    total, scored, average = (*part.total(torch.cat(sums, dim=1)).split(1, dim=1), None)[:3]
    nll = (total.log() - scored).squeeze(1)
    return _Softmax(nll, powers, highest, total, scored, average, index, here.float(), ids)


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """Return the kernels for a kind of device; None on a CPU, and where Triton or what it compiles with is missing."""
    if device != "cuda":
        return None
    try:
        module = import_module("megatron.model.softmax_kernels")
        module.statistics(torch.zeros(1, 16, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device), 16)
    except Exception as error:  # a compiler that is missing may raise anything
        reason = str(error).partition("\n")[0]
        logger.warning(
            "the head's loss runs without its kernels, which need Triton, a C compiler and Python's headers: %s", reason
        )
        return None
    return module
