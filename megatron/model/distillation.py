"""Distillation: the probabilities of frozen teachers as soft targets of the training loss.

    loss of a scored position = (1 - W) * loss with the target + W * T^2 * KL(p || q)

q = softmax(logits / T) is the student's distribution over the vocabulary, p the mean of the teachers' softmax(logits /
T). As in Hinton, Vinyals and Dean 2015 (1503.02531, section 2), T^2 makes the size of the gradient independent of the
temperature T; the mean of probabilities is the ensemble of `tools/ensemble.py`. The head computes the divergence over
the whole vocabulary for a slice of positions at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.batch import Batch
from megatron.model.head_shard import WholeHead


class TeacherStates(NamedTuple):
    """What the loss of a student needs of a teacher, in the compute dtype."""

    hidden: Tensor  # [R, H], the head's input at the scored positions, in their order
    head: Tensor  # [V, H], the vocabulary rows of this rank


class Divergence(NamedTuple):
    """A weighted divergence, loss + share * log Z, with the gradient share * softmax(logits) - subtracted.

    Z is the normaliser of the softmax that the loss with the target computes in any case.
    """

    loss: Tensor  # fp32 [R]
    share: Tensor  # fp32 [R], 0 unless T = 1
    subtracted: Tensor  # fp32 [R, I], of the I vocabulary rows that are ids of the tokenizer


class SoftTargets(NamedTuple):
    """The teachers' distributions at R positions, as hidden states and heads, and how they enter the loss."""

    teachers: tuple[TeacherStates, ...]
    weight: float  # W
    temperature: float  # T

    def chunk(self, start: int, size: int) -> "SoftTargets":
        """Return the soft targets of `size` positions from `start` on, those beyond the last padded with zeros."""
        chunks = []
        for hidden, head in self.teachers:
            rows = hidden[start : start + size]
            chunks.append(TeacherStates(F.pad(rows, (0, 0, 0, size - len(rows))), head))
        return self._replace(teachers=tuple(chunks))

    def logits(self, rows: slice) -> list[Tensor]:
        """Return the logits [rows, V] of every teacher, for the vocabulary rows of this rank."""
        return [hidden[rows] @ head.T for hidden, head in self.teachers]

    def divergence(
        self, logits: Tensor, teacher_logits: Sequence[Tensor], weights: Tensor, *, vocab_size: int, shard: WholeHead
    ) -> Divergence:
        """Return weights * W T^2 KL(p || q) at R positions, in parts.

        logits [R, V] are the student's, teacher_logits [R, V] those of each teacher; weights fp32 [R].
        """
        num_ids = min(logits.shape[1], max(0, vocab_size - shard.start))
        softmax = {"temperature": self.temperature, "num_ids": num_ids, "shard": shard}
        log_mean, mean = _softmax(teacher_logits[0], **softmax)
        for other in teacher_logits[1:]:
            mean += _softmax(other, **softmax)[1]
        if len(teacher_logits) > 1:
            mean /= len(teacher_logits)
            torch.log(mean.clamp_min(torch.finfo(mean.dtype).tiny), out=log_mean)  # 0 * log 0 = 0
        scale = self.weight * self.temperature * weights
        share = scale
        if self.temperature == 1:  # q is the softmax of the target's loss, and log q = logits - log Z
            log_student = logits[:, :num_ids].float()
            subtracted = mean
        else:
            log_student, probabilities = _softmax(logits, **softmax)
            subtracted = probabilities.neg_().add_(mean)
            share = torch.zeros_like(scale)
        divergence = shard.total(log_mean.sub_(log_student).mul_(mean).sum(1))
        return Divergence(self.temperature * scale * divergence, share, subtracted.mul_(scale[:, None]))


@dataclass(frozen=True)
class Distillation:
    """The teachers of a model; each returns its states for a batch."""

    teachers: tuple[Callable[[Batch], TeacherStates], ...]
    weight: float
    temperature: float

    @torch.no_grad()
    def soft_targets(self, batch: Batch) -> SoftTargets:
        """Return the soft targets at the scored positions of a batch, whose corruption teachers and student share."""
        batch = replace(batch, residual_scales=None)  # stochastic depth of the student
        return SoftTargets(tuple(teacher(batch) for teacher in self.teachers), self.weight, self.temperature)


def _softmax(logits: Tensor, *, temperature: float, num_ids: int, shard: WholeHead) -> tuple[Tensor, Tensor]:
    """Return log softmax and softmax of logits / temperature, fp32 [R, num_ids], of the first `num_ids` rows."""
    log_probabilities = logits[:, :num_ids].to(torch.float32, copy=True)
    if temperature != 1:
        log_probabilities /= temperature
    lowest = logits.new_full((len(logits), 1), float("-inf"), dtype=torch.float32)  # of a shard without ids
    log_probabilities -= shard.highest(log_probabilities.amax(1, keepdim=True) if num_ids else lowest)
    exps = log_probabilities.exp()
    sum_exp = shard.total(exps.sum(1, keepdim=True))
    return log_probabilities.sub_(sum_exp.log()), exps.div_(sum_exp)
