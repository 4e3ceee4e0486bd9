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
        logits = _logits(hidden[padded], head, size)
        nll[chunk] = (logits.logsumexp(-1) - _at(logits, target))[: len(chunk)]
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, rows, size):
        loss = torch.zeros(1, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        for chunk, padded, target in _chunks(targets, rows):
            inputs = hidden[padded]  # [C, H]
            weight = _pad(weights[chunk], len(padded))
            logits = _logits(inputs, head, size)  # [C, padded vocabulary]
            log_normaliser = logits.logsumexp(-1)
            loss += ((log_normaliser - _at(logits, target)) * weight).sum()
            # d nll / d logits = softmax - onehot(target), written over the logits
            gradient = logits.sub_(log_normaliser[:, None]).exp_()
            gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
            gradient = gradient.mul_(weight[:, None]).to(head.dtype)
            grad_hidden[chunk] = (gradient @ head)[: len(chunk)]
            grad_head += gradient.T @ inputs
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # the product is taken in fp32: a bf16 copy of the scale would bias every gradient alike
        grad_hidden, grad_head = ctx.saved_tensors
        scaled_hidden = (grad_hidden * grad_output).to(ctx.dtype)
        return scaled_hidden, (grad_head * grad_output).to(ctx.dtype), None, None, None, None


def _chunks(targets: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows of each chunk [<= C], the same filled up with row 0 to [C], and their targets [C]."""
    for chunk in rows.split(CHUNK_ROWS[rows.device.type]):
        if len(chunk):
            # a filling row gets target 0: the target of row 0 itself need not be an id of the tokenizer
            size = CHUNK_ROWS[rows.device.type]
            yield chunk, _pad(chunk, size), _pad(targets[chunk], size)


def _pad(vector: Tensor, size: int) -> Tensor:
    return F.pad(vector, (0, size - len(vector)))


def _logits(inputs: Tensor, head: Tensor, size: int) -> Tensor:
    """Return fp32 logits, minus infinity at the rows of the head that are no ids of the tokenizer."""
    logits = (inputs @ head.T).float()
    logits[:, size:] = float("-inf")
    return logits


def _at(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1)
