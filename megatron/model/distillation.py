"""Distillation: the probabilities of frozen teachers as soft targets of the training loss.

    loss of a scored position = (1 - W) * loss with the target + W * T^2 * KL(p || q)

q = softmax(logits / T) is the student's distribution over the vocabulary, p the mean of the teachers' softmax(logits /
T). As in Hinton, Vinyals and Dean 2015 (1503.02531, section 2), T^2 makes the size of the gradient independent of the
temperature T; the mean of probabilities is the ensemble of `tools/ensemble.py`. The head computes the divergence over
the whole vocabulary for a chunk of positions at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.batch import Batch
from megatron.model.head_shard import WholeHead

SLICE_ROWS = {"cpu": 256, "cuda": 1024}  # positions whose probabilities, in fp32, exist at a time, by device type


class TeacherStates(NamedTuple):
    """What the loss of a student needs of a teacher, in the compute dtype."""

    hidden: Tensor  # [R, H], the head's input at the scored positions, in their order
    head: Tensor  # [V, H], the vocabulary rows of this rank


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

    def divergence(
        self, logits: Tensor, weights: Tensor, *, vocab_size: int, shard: WholeHead
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of weights * W T^2 KL(p || q), fp32 [], and its gradient with respect to the logits.

        logits [R, V] are the student's; weights fp32 [R]; the gradient has the shape and dtype of the logits.
        """
        num_ids = min(logits.shape[1], max(0, vocab_size - shard.start))
        softmax = {"temperature": self.temperature, "num_ids": num_ids, "shard": shard}
        scales = self.weight * self.temperature * weights
        total = torch.zeros((), device=logits.device)
        gradient = torch.zeros_like(logits)
        size = SLICE_ROWS[logits.device.type]
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            log_student = _log_softmax(logits[rows], **softmax)
            teacher = torch.zeros_like(log_student)
            for hidden, head in self.teachers:
                teacher += _log_softmax(hidden[rows] @ head.T, **softmax).exp_()
            teacher /= len(self.teachers)
            divergence = shard.total((torch.xlogy(teacher, teacher) - teacher * log_student).sum(1))
            total += self.temperature * (scales[rows] * divergence).sum()
            gradient[rows, :num_ids] = log_student.exp_().sub_(teacher).mul_(scales[rows, None])
        return total, gradient


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


def _log_softmax(logits: Tensor, *, temperature: float, num_ids: int, shard: WholeHead) -> Tensor:
    """Return log softmax(logits / temperature), fp32 [R, num_ids], of the first `num_ids` vocabulary rows."""
    scaled = logits[:, :num_ids].float() / temperature
    lowest = scaled.new_full((len(scaled), 1), float("-inf"))  # of a shard without ids
    scaled -= shard.highest(scaled.amax(1, keepdim=True) if num_ids else lowest)
    return scaled.sub_(shard.total(scaled.exp().sum(1, keepdim=True)).log())
