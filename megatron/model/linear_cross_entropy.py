"""The output head fused with the cross-entropy loss, at the scored positions only.

Scored positions go through the head in chunks of one fixed size, so no [B, S, V] tensor is allocated. The last chunk is
padded with positions of weight 0; on CUDA, where chunks are large, only to a multiple of a smaller size. The shapes of
matrix products depend on the number of scored positions alone, and on a CPU not even on that, so equal inputs give
bit-identical results on every rank. The forward pass already computes the gradients, so no logits are stored for the
backward pass.

The head has one row per id of the padded vocabulary, a multiple of 128. Only the first `vocab_size` rows are ids of
the tokenizer. The logits of the other rows are set to minus infinity: their probability and gradient are exactly zero.
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

from megatron.model.distillation import Divergence, SoftTargets
from megatron.model.head_shard import WHOLE, WholeHead

logger = logging.getLogger(__name__)

# masked diffusion scores half of 16,384 positions on average, and a chunk more for a few positions costs time
CHUNK_ROWS = {"cpu": 256, "cuda": 9216}  # positions of a chunk, by device type
LAST_CHUNK_MULTIPLE = {"cuda": 1024}  # the last chunk is padded to a multiple of this; on others to a whole chunk
TEACHER_ROWS = {"cpu": 256, "cuda": 1024}  # positions whose teacher logits exist at a time, by device type
CACHED_NUMBERS = 800_000  # elements a CPU processes at a time: fp32 copies of more exceed its cache and are slow


class Terms(NamedTuple):
    """Regularisers that training adds to the nll of a position; a term is off at 0.

    loss = (1 - label_smoothing) * nll + label_smoothing * mean over the vocabulary of -log p + z_loss * log(Z)^2
    with label smoothing of Szegedy et al. 2016 (1512.00567, section 7) and the z-loss of PaLM (2204.02311, section 5);
    Z is the softmax's normaliser, the sum of exp(logit).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = Terms()


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    positions: Tensor,
    *,
    weights: Tensor,
    vocab_size: int,
    shard: WholeHead = WHOLE,
    terms: Terms = PLAIN,
    soft_targets: SoftTargets | None = None,
) -> Tensor:
    """Return the sum over `positions` of weight * loss, fp32 [1], differentiable in `hidden` and `head`.

    hidden [N, H] and head [padded vocabulary, H] in the compute dtype; targets int64 [N]; weights fp32 [N];
    positions int64 [R], distinct indices into N, R may be 0. The loss of a position is its nll, plus `terms`, mixed
    with the divergence from `soft_targets` as `distillation` describes. Matrix products run in the compute dtype,
    softmax and sums in fp32. With a vocabulary-parallel head every rank returns the same loss, and the gradient of
    `hidden` is partial: the sum over the ranks is the gradient.
    """
    options = {"vocab_size": vocab_size, "shard": shard, "terms": terms}
    return _LinearCrossEntropy.apply(hidden, head, targets, weights, positions, options, soft_targets)


@torch.no_grad()
def linear_nll(
    hidden: Tensor, head: Tensor, targets: Tensor, positions: Tensor, *, vocab_size: int, shard: WholeHead = WHOLE
) -> Tensor:
    """Return the nll at `positions`, fp32 [N], 0 elsewhere; without an autograd graph."""
    nll = torch.zeros(len(hidden), device=hidden.device)
    for chunk, padded, chunk_targets in _chunks(targets, positions):
        slices = _slices(hidden[padded] @ head.T, chunk_targets, split=shard.whole)
        chunk_nll = [_softmax_(logits, target, vocab_size=vocab_size, shard=shard).nll for logits, target in slices]
        nll[chunk] = torch.cat(chunk_nll)[: len(chunk)]
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, positions, options, soft_targets):
        loss = torch.zeros(1, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)  # [N, H]
        grad_head = torch.zeros_like(head, dtype=torch.float32)  # [V, H]
        # buffers for all chunks: allocation is expensive on a CPU
        logits = hidden.new_empty(CHUNK_ROWS[hidden.device.type], len(head))  # [C, V]
        chunk_grad_head = torch.empty_like(head)
        num_done = 0
        for chunk, padded, chunk_targets in _chunks(targets, positions):
            inputs = hidden[padded]  # [C, H]
            chunk_weights = _pad(weights[chunk], len(padded))  # [C]
            chunk_logits = torch.mm(inputs, head.T, out=logits[: len(padded)])  # [C, V]
            soft = soft_targets and soft_targets.chunk(num_done, len(padded))
            loss += _weighted_loss_(chunk_logits, chunk_targets, chunk_weights, soft=soft, **options)
            num_done += len(chunk)
            grad_hidden[chunk] = (chunk_logits @ head)[: len(chunk)]
            torch.mm(chunk_logits.T, inputs, out=chunk_grad_head)
            for total, addend in _slices(grad_head, chunk_grad_head):
                total += addend
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # multiply in fp32: rounding the scale to bf16 would bias all gradients alike
        grad_hidden, grad_head = ctx.saved_tensors
        scaled_head = torch.empty_like(grad_head, dtype=ctx.dtype)
        for scaled, gradient in _slices(scaled_head, grad_head):
            torch.mul(gradient, grad_output, out=scaled)
        return (grad_hidden * grad_output).to(ctx.dtype), scaled_head, None, None, None, None, None


def _chunks(targets: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the positions of each chunk [<= C], the same padded with position 0 to [C], and their targets [C]."""
    device_type = positions.device.type
    chunk_size = CHUNK_ROWS[device_type]
    multiple = LAST_CHUNK_MULTIPLE.get(device_type, chunk_size)
    for chunk in positions.split(chunk_size):
        if len(chunk):
            # padding gets target 0: the target of position 0 need not be an id of the tokenizer
            padded_size = -(-len(chunk) // multiple) * multiple
            yield chunk, _pad(chunk, padded_size), _pad(targets[chunk], padded_size)


def _pad(vector: Tensor, size: int) -> Tensor:
    return vector if len(vector) == size else F.pad(vector, (0, size - len(vector)))


def _slices(matrix: Tensor, *tensors: Tensor, split: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching slices of `matrix` and `tensors` along dim 0: one slice, or on a CPU as many as fit its cache."""
    split = split and matrix.device.type == "cpu"
    slice_size = max(1, CACHED_NUMBERS // matrix.shape[1]) if split else max(1, len(matrix))
    return zip(*(tensor.split(slice_size) for tensor in (matrix, *tensors)), strict=True)


def _weighted_loss_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    soft: SoftTargets | None,
    vocab_size: int,
    shard: WholeHead,
    terms: Terms,
) -> Tensor:
    """Overwrite logits [C, V] with the gradient of the sum of weights * loss; return that sum, fp32 []."""
    losses = []
    ids = {"vocab_size": vocab_size, "shard": shard}
    size = TEACHER_ROWS[logits.device.type] if soft else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        teacher_logits = soft.logits(rows) if soft else []
        matrices = (logits[rows], targets[rows], weights[rows], *teacher_logits)
        # each slice is a collective over shards, which may differ in their number of rows: they take one slice
        for slice_logits, target, weight, *teachers in _slices(*matrices, split=shard.whole):
            divergence = None
            if soft:  # before the logits are overwritten
                divergence = soft.divergence(slice_logits, teachers, weight, **ids)
                weight = (1 - soft.weight) * weight
            losses.append(_to_gradient_(slice_logits, target, weight, divergence=divergence, terms=terms, **ids))
    return torch.cat(losses).sum()


def _to_gradient_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence | None = None,
    vocab_size: int,
    shard: WholeHead,
    terms: Terms,
) -> Tensor:
    """Overwrite logits [R, V] with the gradient of weights * loss + divergence; return that, fp32 [R]."""
    smoothing, z_loss = terms
    softmax = _softmax_(logits, targets, vocab_size=vocab_size, shard=shard, with_mean=bool(smoothing))
    loss, scale = softmax.nll, weights
    if softmax.mean_logit is not None:  # label smoothing
        loss = loss + smoothing * (softmax.target_logit - softmax.mean_logit).squeeze(1)
    log_z = (softmax.max_logit + softmax.sum_exp.log()).squeeze(1)
    if z_loss:
        loss = loss + z_loss * log_z.square()
        scale = weights * (1 + 2 * z_loss * log_z)
    weighted = loss * weights
    subtracted = None
    if divergence:
        weighted = weighted + divergence.loss + divergence.share * log_z
        scale, subtracted = scale + divergence.share, divergence.subtracted
    # weight * ((1 + 2 z log Z) softmax - (1 - e) onehot(target) - e / vocab_size)
    at_target = (smoothing - 1) * weights[:, None] * softmax.is_local
    everywhere = -weights[:, None] * (smoothing / vocab_size)
    softmax.write_(logits, scale[:, None] / softmax.sum_exp, at_target, everywhere, subtracted=subtracted)
    return weighted


@dataclass(frozen=True)
class _Softmax:
    nll: Tensor  # [C]
    exps: Tensor | None  # [C, V] exp(logit - max_logit), 0 beyond the tokenizer's ids; None with kernels
    max_logit: Tensor  # [C, 1]
    sum_exp: Tensor  # [C, 1] sum of exps over the vocabulary
    target_logit: Tensor  # [C, 1] the target's logit - max_logit
    mean_logit: Tensor | None  # [C, 1] mean of logit - max_logit over the vocabulary, for label smoothing
    local_target: Tensor  # [C, 1] the target's vocabulary row in this shard, or 0
    is_local: Tensor  # [C, 1] 1.0 where this shard holds the target's row, else 0.0
    num_ids: int  # vocabulary rows of this shard that are ids of the tokenizer

    def write_(
        self, logits: Tensor, scale: Tensor, at_target: Tensor, everywhere: Tensor, *, subtracted: Tensor | None
    ) -> None:
        """Overwrite logits with scale * exps + everywhere - subtracted, + at_target at the targets.

        Beyond the tokenizer's ids they become 0, and `subtracted` has no columns.
        """
        if self.exps is None:
            kernels = _kernels(logits.device.type)
            assert kernels is not None
            kernels.write_gradient_(
                logits,
                self.local_target,
                max_logit=self.max_logit,
                scale=scale,
                at_index=at_target,
                everywhere=everywhere,
                num_ids=self.num_ids,
            )
            if subtracted is not None:
                logits[:, : self.num_ids] -= subtracted
            return
        gradient = self.exps.mul_(scale)
        gradient.scatter_add_(1, self.local_target, at_target)
        if self.mean_logit is not None:
            gradient[:, : self.num_ids].add_(everywhere)
        if subtracted is not None:
            gradient[:, : self.num_ids].sub_(subtracted)
        logits.copy_(gradient)


def _softmax_(
    logits: Tensor, targets: Tensor, *, vocab_size: int, shard: WholeHead, with_mean: bool = False
) -> _Softmax:
    """Return the softmax of logits [C, V] in fp32; may overwrite `logits`."""
    num_ids = min(logits.shape[1], max(0, vocab_size - shard.start))
    local_target = (targets - shard.start)[:, None]
    is_local = (local_target >= 0) & (local_target < logits.shape[1])
    local_target = local_target.where(is_local, 0)
    kernels = _kernels(logits.device.type)
    if kernels:
        exps = None
        shard_max, shard_sum_exp, target_logit, sum_logits = kernels.statistics(logits, local_target, num_ids)
        max_logit = shard.highest(shard_max.clone())
        sum_exp = shard_sum_exp * (shard_max - max_logit).exp()
        target_logit = target_logit - max_logit
        mean_logit = (sum_logits - num_ids * max_logit) / vocab_size
    else:
        exps = logits.float()
        exps[:, num_ids:] = float("-inf")
        max_logit = shard.highest(exps.amax(-1, keepdim=True))
        target_logit = exps.sub_(max_logit).gather(1, local_target)
        mean_logit = exps[:, :num_ids].sum(-1, keepdim=True) / vocab_size if with_mean else None
        sum_exp = exps.exp_().sum(-1, keepdim=True)
    # one collective for all sums over the shards
    partial_sums = [sum_exp, target_logit.where(is_local, 0.0)]
    if with_mean:
        partial_sums.append(mean_logit)
    sum_exp, target_logit, *means = shard.total(torch.cat(partial_sums, dim=1)).split(1, dim=1)
    mean_logit = means[0] if with_mean else None
    nll = (sum_exp.log() - target_logit).squeeze(1)
    return _Softmax(
        nll=nll,
        exps=exps,
        max_logit=max_logit,
        sum_exp=sum_exp,
        target_logit=target_logit,
        mean_logit=mean_logit,
        local_target=local_target,
        is_local=is_local.float(),
        num_ids=num_ids,
    )


@functools.cache
def _kernels(device_type: str) -> ModuleType | None:
    """Return the Triton kernels for a device type; None on a CPU, and where Triton or its C compiler is missing."""
    if device_type != "cuda":
        return None
    try:
        module = import_module("megatron.model.softmax_kernels")
        logits = torch.zeros(1, 16, device=device_type)
        module.statistics(logits, torch.zeros(1, 1, dtype=torch.int64, device=device_type), 16)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels, and the result is cached
    except Exception as error:  # a missing compiler may raise anything
        reason = str(error).partition("\n")[0]
        logger.warning(
            "the head's loss runs without its kernels, which need Triton, a C compiler and Python's headers: %s", reason
        )
        return None
    return module
