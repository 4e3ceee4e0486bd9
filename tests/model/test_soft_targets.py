"""The divergence from teachers in the fused head against the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model import linear_cross_entropy as fused
from megatron.model.distillation import SoftTargets, TeacherStates
from megatron.model.linear_cross_entropy import PLAIN, Terms, linear_cross_entropy
from tests.model.test_linear_cross_entropy import PADDED, SIZE, problem

WIDTHS = (24, 40)  # of the teachers; the student's is 24


def teacher_states(scored, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return tuple(
        TeacherStates(
            torch.randn(scored, width, generator=generator).to(dtype),
            (torch.randn(PADDED, width, generator=generator) / 3).to(dtype),
        )
        for width in WIDTHS[:count]
    )


def reference(hidden, head, targets, weights, soft, terms=PLAIN):
    """Return the sum of weight * ((1 - W) * loss + W T^2 KL(mean of the teachers || student)) from full logits."""
    scored = weights.nonzero().flatten()
    logits = hidden[scored].float() @ head[:SIZE].float().T
    temperature, weight = soft.temperature, soft.weight
    teachers = [((states @ rows[:SIZE].T).float() / temperature).softmax(1) for states, rows in soft.teachers]
    mean = torch.stack(teachers).mean(0)
    divergence = (mean * (mean.log() - (logits / temperature).log_softmax(1))).sum(1)
    hard = F.cross_entropy(logits, targets[scored], reduction="none", label_smoothing=terms.label_smoothing)
    hard = hard + terms.z_loss * logits.logsumexp(1).square()
    return (weights[scored] * ((1 - weight) * hard + weight * temperature**2 * divergence)).sum()[None]


def loss_and_gradients(function):
    inputs = problem(45)
    loss = function(*inputs)
    return loss, *torch.autograd.grad(loss * 0.37, inputs[:2])


@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 3.0), (0.3, 0.5)])
@pytest.mark.parametrize("terms", [PLAIN, Terms(label_smoothing=0.3, z_loss=0.1)])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, chunk, teachers, weight, temperature, terms):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", chunk)
    monkeypatch.setitem(fused.TEACHER_ROWS, "cpu", 4 if chunk == 8 else 256)
    monkeypatch.setattr(fused, "CACHED_NUMBERS", 800_000 if chunk == 8 else 3 * PADDED)
    soft = SoftTargets(teacher_states(45, teachers), weight, temperature)

    def fused_loss(hidden, head, targets, weights, positions):
        options = {"weights": weights, "vocab_size": SIZE, "terms": terms, "soft_targets": soft}
        return linear_cross_entropy(hidden, head, targets, positions, **options)

    def plain_loss(hidden, head, targets, weights, _):
        return reference(hidden, head, targets, weights, soft, terms)

    for actual, expected in zip(loss_and_gradients(fused_loss), loss_and_gradients(plain_loss), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
