"""Distillation: the probabilities of frozen teachers as soft targets of the training loss.

    loss of a scored position = (1 - W) * loss with the target + W * T^2 * KL(p || q)

q = softmax(logits / T) is the student's distribution over the vocabulary, p the mean of the teachers' softmax(logits /
T). As in Hinton, Vinyals and Dean 2015 (1503.02531, section 2), T^2 makes the size of the gradient independent of the
temperature T; the mean of probabilities is the ensemble of `tools/ensemble.py`. The head computes the divergence over
the whole vocabulary for a chunk of positions at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.batch import Batch
from megatron.model.head_shard import WholeHead

SLICE_ROWS = {"cpu": 256, "cuda": 1024}  # positions whose teacher logits exist at a time, by device type
CACHED_NUMBERS = 50_000  # elements of logits whose probabilities a CPU computes at a time, in fp32


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
        scales = self.weight * self.temperature * weights
        total = torch.zeros((), device=logits.device)
        gradient = torch.zeros_like(logits)
        size = SLICE_ROWS[logits.device.type]
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            teacher_logits = [hidden[rows] @ head.T for hidden, head in self.teachers]
            matrices = (logits[rows], gradient[rows], scales[rows], *teacher_logits)
            for student, slice_gradient, scale, *teachers in _cached_slices(*matrices, split=shard.whole):
                softmax = {"temperature": self.temperature, "num_ids": num_ids, "shard": shard}
                log_student, probabilities = _softmax(student, **softmax)
                mean = torch.stack([_softmax(teacher, **softmax)[1] for teacher in teachers]).mean(0)
                divergence = shard.total((torch.xlogy(mean, mean) - mean * log_student).sum(1))
                total += self.temperature * (scale * divergence).sum()
                slice_gradient[:, :num_ids] = probabilities.sub_(mean).mul_(scale[:, None])
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


def _cached_slices(matrix: Tensor, *tensors: Tensor, split: bool) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching slices along dim 0: one, or with `split` on a CPU as many as fit its cache."""
    split = split and matrix.device.type == "cpu"
    size = max(1, CACHED_NUMBERS // matrix.shape[1]) if split else len(matrix)
    return zip(*(tensor.split(size) for tensor in (matrix, *tensors)), strict=True)


def _softmax(logits: Tensor, *, temperature: float, num_ids: int, shard: WholeHead) -> tuple[Tensor, Tensor]:
    """Return log softmax and softmax of logits / temperature, fp32 [R, num_ids], of the first `num_ids` rows."""
    log_probabilities = logits[:, :num_ids].float() / temperature
    lowest = logits.new_full((len(logits), 1), float("-inf"), dtype=torch.float32)  # of a shard without ids
    log_probabilities -= shard.highest(log_probabilities.amax(1, keepdim=True) if num_ids else lowest)
    exps = log_probabilities.exp()
    sum_exp = shard.total(exps.sum(1, keepdim=True))
    return log_probabilities.sub_(sum_exp.log()), exps.div_(sum_exp)
