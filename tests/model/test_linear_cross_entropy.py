"""The fused head against a plain twin that makes all logits."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from megatron.model import linear_cross_entropy as fused
from megatron.model.linear_cross_entropy import PLAIN, Terms, linear_cross_entropy, linear_nll

POSITIONS, WIDTH, SIZE, PADDED = 60, 24, 101, 128


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, params=["at once", "3 rows", "a row", "kernels"])
def way(request, monkeypatch):
    """Work on all rows at once, on three (20 of the head) at a time, and on one; and as on CUDA."""
    if request.param == "kernels":
        if not INTERPRETED:
            pytest.skip("the kernels run in a process of their own, see test_softmax_kernels.py")
        from megatron.model import softmax_kernels

        monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 64)  # every row is interpreted
        monkeypatch.setattr(fused, "_kernels", lambda device: softmax_kernels)
        monkeypatch.setattr(softmax_kernels, "COLUMNS", 64)  # so that a row is several pieces
    else:
        pieces = {"at once": fused.CACHED_NUMBERS, "3 rows": 500, "a row": 1}
        monkeypatch.setattr(fused, "CACHED_NUMBERS", pieces[request.param])
    return request.param


TERMS = [PLAIN, Terms(label_smoothing=0.1), Terms(z_loss=0.01), Terms(label_smoothing=0.3, z_loss=0.1)]


def reference_linear_cross_entropy(hidden, head, targets, weights, size, terms=PLAIN):
    """Full logits and PyTorch's own loss, in fp32."""
    logits = hidden.float() @ head[:size].float().T
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
    return ((loss + terms.z_loss * logits.logsumexp(1).square()) * weights).sum()[None]


def problem(scored, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(PADDED, WIDTH, generator=generator) / 3).to(dtype).requires_grad_()
    targets = torch.randint(SIZE, (POSITIONS,), generator=generator)
    weights = torch.zeros(POSITIONS)
    chosen = torch.randperm(POSITIONS, generator=generator)[:scored]
    weights[chosen] = torch.rand(scored, generator=generator) + 0.5
    return hidden, head, targets, weights, weights.nonzero().flatten()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss * 0.37, inputs)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("scored", [1, 8, 19, POSITIONS])
def test_loss_and_gradients_equal_the_plain_twin(monkeypatch, chunk, scored, terms):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", chunk)
    hidden, head, targets, weights, rows = problem(scored)
    loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE, terms=terms)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms)
    assert loss.shape == (1,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-6)


def test_the_last_chunk_may_be_filled_up_to_less(monkeypatch):
    shapes, product = [], torch.mm
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 32)
    monkeypatch.setitem(fused.FILLED_TO, "cpu", 8)
    monkeypatch.setattr(torch, "mm", lambda *two, out: shapes.append(out.shape) or product(*two, out=out))
    hidden, head, targets, weights, rows = problem(45)
    loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE)
    assert [shape[0] for shape in shapes if shape[1] == PADDED] == [32, 16]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_rows_outside_the_tokenizer_get_exactly_no_gradient(terms):
    hidden, head, targets, weights, rows = problem(30)
    head.data[SIZE:] = 50.0  # would dominate the softmax
    loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE, terms=terms)
    torch.testing.assert_close(loss, reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms))
    assert gradients(loss, head)[0][SIZE:].abs().max() == 0


def test_no_scored_row_gives_zero_and_a_graph():
    hidden, head, targets, weights, rows = problem(0)
    loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0 and head.grad.abs().max() == 0


@pytest.mark.parametrize("terms", TERMS)
def test_bfloat16_gradients_point_the_same_way(terms):
    hidden, head, targets, weights, rows = problem(POSITIONS, torch.bfloat16)
    loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE, terms=terms)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms)
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for mine, theirs in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert mine.dtype == torch.bfloat16
        assert F.cosine_similarity(mine.float().flatten(), theirs.float().flatten(), dim=0) > 0.999


@torch.no_grad()
def test_terms_that_are_off_change_no_bit(way):
    """Loss and gradients are those of the plain formula, step by step as the fused head takes them."""
    if way == "kernels":
        pytest.skip("they add up in another order")
    hidden, head, targets, weights, rows = problem(POSITIONS)
    fill = (0, fused.CHUNK_ROWS["cpu"] - len(rows))
    inputs, target, weight = hidden[F.pad(rows, fill)], F.pad(targets[rows], fill), F.pad(weights[rows], fill)[:, None]
    logits = inputs @ head.T
    logits[:, SIZE:] = float("-inf")
    logits -= logits.amax(1, keepdim=True)
    powers = logits.exp()
    total = powers.sum(1, keepdim=True)
    nll = total.log() - logits.gather(1, target[:, None])
    gradient = (powers * (weight / total)).scatter_add(1, target[:, None], -weight)
    with torch.enable_grad():
        loss = linear_cross_entropy(hidden, head, targets, weights, rows, SIZE, terms=Terms(0.0, 0.0))
        of_hidden, of_head = torch.autograd.grad(loss, (hidden, head))
    assert torch.equal(loss, (nll * weight).sum()[None])
    assert torch.equal(of_hidden[rows], (gradient @ head)[: len(rows)]) and torch.equal(of_head, gradient.T @ inputs)


def test_nll_per_position_is_unweighted_and_leaves_no_graph(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 8)
    hidden, head, targets, weights, rows = problem(19)
    nll = linear_nll(hidden, head, targets, rows, SIZE)
    expected = F.cross_entropy(hidden @ head[:SIZE].T, targets, reduction="none")
    torch.testing.assert_close(nll, torch.where(weights > 0, expected, 0.0).detach(), rtol=1e-6, atol=1e-6)
    assert not nll.requires_grad


def test_bits_of_a_row_do_not_depend_on_the_other_rows(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 8)
    hidden, head, targets, _, _ = problem(0)
    few = linear_nll(hidden, head, targets, torch.arange(3), SIZE)
    linear_nll(hidden, head, targets, torch.arange(17), SIZE)
    many = linear_nll(hidden, head, targets, torch.arange(POSITIONS), SIZE)
    assert torch.equal(few[:3], many[:3])


def test_an_unscored_target_need_not_be_an_id_of_the_tokenizer():
    hidden, head, targets, weights, rows = problem(5)
    weights[0], targets[0] = 0.0, SIZE
    loss = linear_cross_entropy(hidden, head, targets, weights, weights.nonzero().flatten(), SIZE)
    assert math.isfinite(loss.item())


class OnePartOfTwo(fused.WholeHead):
    """A part of a head as tensor parallelism sees it, where what the other part would say is known."""

    whole = False

    def __init__(self, start, logits, index, here):
        self.start, self.logits, self.index, self.here = start, logits, index[:, None], here[:, None]

    def highest(self, values):
        self.top = torch.maximum(values, self.logits.amax(1, keepdim=True))
        return self.top

    def total(self, values):
        other = self.logits - self.top
        scored = other.gather(1, self.index).where(self.here, 0.0)
        said = [other.exp().sum(1, keepdim=True), scored, other.sum(1, keepdim=True) / SIZE]
        return values + torch.cat(said, 1)[:, : values.shape[1]]


@pytest.mark.parametrize("terms", TERMS)
def test_parts_of_a_head_write_their_parts_of_the_gradient(terms):
    generator, cut = torch.Generator().manual_seed(3), 64
    logits = torch.randn(7, PADDED, generator=generator) * 3
    targets, weights = torch.tensor([0, 5, 63, 64, 65, 99, 100]), torch.rand(7, generator=generator)
    whole, low = logits.clone(), targets < cut
    loss = fused._to_gradient_(whole, targets, weights, SIZE, fused.WHOLE, terms)
    left, right = logits[:, :cut].clone(), logits[:, cut:].clone()
    left_part = OnePartOfTwo(0, logits[:, cut:SIZE], (targets - cut).where(~low, 0), ~low)
    right_part = OnePartOfTwo(cut, logits[:, :cut], targets.where(low, 0), low)
    for piece, part in ((left, left_part), (right, right_part)):
        torch.testing.assert_close(fused._to_gradient_(piece, targets, weights, SIZE, part, terms), loss)
    torch.testing.assert_close(torch.cat((left, right), 1), whole, rtol=1e-5, atol=1e-6)
