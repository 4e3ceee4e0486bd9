"""The output head fused with its loss, at the scored positions only.

Rows go through the head in chunks of one fixed size, the last one filled up with rows of zero weight. No
[B, S, V] tensor is made, and because every matrix product has the same shape whatever the number of rows,
equal inputs give equal bits in every process. The forward pass already computes the gradients, so no logits
are kept for the backward pass.

Only the first `size` rows of the head are ids of the tokenizer. The others take part in the product, whose
width is then a multiple of 128, but their logits are set to minus infinity: they have no probability and
their gradient is exactly zero.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = {"cpu": 256, "cuda": 8192}
CACHED_NUMBERS = 800_000  # that a CPU works on at a time: fp32 copies of more leave its cache, and fresh memory is slow


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, rows: Tensor, size: int
) -> Tensor:
    """Return sum over `rows` of weights * nll, fp32 [1], differentiable in `hidden` and `head`.

    hidden [N, H] and head [padded vocabulary, H] in the compute dtype; targets int64 [N]; weights fp32 [N];
    rows int64 [R], distinct indices into N, R may be 0. Matrix products run in the compute dtype, softmax
    and sums in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, head, targets, weights, rows, size)


@torch.no_grad()
def linear_nll(hidden: Tensor, head: Tensor, targets: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return the nll of every row named in `rows`, fp32 [N], 0 elsewhere; without a graph."""
    nll = torch.zeros(len(hidden), device=hidden.device)
    for chunk, padded, target in _chunks(targets, rows):
        found = [_nll(logits, at, size) for logits, at in _pieces(hidden[padded] @ head.T, target)]
        nll[chunk] = torch.cat(found)[: len(chunk)]
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, rows, size):
        loss = torch.zeros(1, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        # reused by all chunks: a CPU pays dearly for fresh memory
        logits = hidden.new_empty(CHUNK_ROWS[hidden.device.type], len(head))
        chunk_grad_head = torch.empty_like(head)
        for chunk, padded, target in _chunks(targets, rows):
            inputs = hidden[padded]  # [C, H]
            weight = _pad(weights[chunk], len(padded))
            torch.mm(inputs, head.T, out=logits)  # [C, padded vocabulary]
            loss += (_to_gradient_(logits, target, weight, size) * weight).sum()
            grad_hidden[chunk] = (logits @ head)[: len(chunk)]
            torch.mm(logits.T, inputs, out=chunk_grad_head)
            for total, part in _pieces(grad_head, chunk_grad_head):
                total += part
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # the product is taken in fp32: a bf16 copy of the scale would bias every gradient alike
        grad_hidden, grad_head = ctx.saved_tensors
        scaled_head = torch.empty_like(grad_head, dtype=ctx.dtype)
        for scaled, part in _pieces(scaled_head, grad_head):
            scaled.copy_(part * grad_output)
        return (grad_hidden * grad_output).to(ctx.dtype), scaled_head, None, None, None, None


def _chunks(targets: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows of each chunk [<= C], the same filled up with row 0 to [C], and their targets [C]."""
    for chunk in rows.split(CHUNK_ROWS[rows.device.type]):
        if len(chunk):
            # a filling row gets target 0: the target of row 0 itself need not be an id of the tokenizer
            size = CHUNK_ROWS[rows.device.type]
            yield chunk, _pad(chunk, size), _pad(targets[chunk], size)


def _pad(vector: Tensor, size: int) -> Tensor:
    return F.pad(vector, (0, size - len(vector)))


def _pieces(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching rows of `matrix` and of others as long: all at once, or on a CPU as many as its cache holds."""
    rows = max(1, CACHED_NUMBERS // matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)
    return zip(*(tensor.split(rows) for tensor in (matrix, *others)), strict=True)


def _to_gradient_(logits: Tensor, targets: Tensor, weights: Tensor, size: int) -> Tensor:
    """Overwrite logits [C, padded vocabulary] by weights * d nll / d logits; return the nll, fp32 [C]."""
    found = []
    for part, target, weight in _pieces(logits, targets, weights):
        wide = _widen(part, size)
        highest = wide.amax(-1, keepdim=True)
        scored = _at(wide, target)
        powers = wide.sub_(highest).exp_()
        total = powers.sum(-1, keepdim=True)
        found.append((highest + total.log()).squeeze(1) - scored)
        # weight * (softmax - onehot(target))
        gradient = powers.mul_(weight[:, None] / total).scatter_add_(1, target[:, None], -weight[:, None])
        part.copy_(gradient)
    return torch.cat(found)


def _nll(logits: Tensor, target: Tensor, size: int) -> Tensor:
    wide = _widen(logits, size)
    return wide.logsumexp(-1) - _at(wide, target)


def _widen(logits: Tensor, size: int) -> Tensor:
    """Return fp32 logits, minus infinity at the rows of the head that are no ids of the tokenizer."""
    wide = logits.float()
    wide[:, size:] = float("-inf")
    return wide


def _at(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1)
