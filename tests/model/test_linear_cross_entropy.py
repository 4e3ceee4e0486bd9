"""The fused head against a reference that computes all logits."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from megatron.model import linear_cross_entropy as fused
from megatron.model.linear_cross_entropy import PLAIN, Terms, linear_cross_entropy, linear_nll

POSITIONS, WIDTH, SIZE, PADDED = 60, 24, 101, 128
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, params=["at once", "3 positions", "a row", "kernels"])
def variant(request, monkeypatch):
    """Process slices of all positions, of three (20 of the head) and of one; and the kernels used on CUDA."""
    if request.param == "kernels":
        if not INTERPRETED:
            pytest.skip("the kernels run in a separate process, see test_softmax_kernels.py")
        from megatron.model import softmax_kernels

        monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 64)  # small: every row is interpreted
        monkeypatch.setattr(fused, "_kernels", lambda device: softmax_kernels)
        monkeypatch.setattr(softmax_kernels, "COLUMNS", 64)  # so that a row takes several iterations
    else:
        elements = {"at once": fused.CACHED_NUMBERS, "3 positions": 500, "a row": 1}
        monkeypatch.setattr(fused, "CACHED_NUMBERS", elements[request.param])
    return request.param


TERMS = [PLAIN, Terms(label_smoothing=0.1), Terms(z_loss=0.01), Terms(label_smoothing=0.3, z_loss=0.1)]


def reference_linear_cross_entropy(hidden, head, targets, weights, size, terms=PLAIN):
    """Return the loss from full logits with PyTorch's cross-entropy, in fp32."""
    logits = hidden.float() @ head[:size].float().T
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
    return ((loss + terms.z_loss * logits.logsumexp(1).square()) * weights).sum()[None]


def problem(scored, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(PADDED, WIDTH, generator=generator) / 3).to(dtype).requires_grad_()
    targets = torch.randint(SIZE, (POSITIONS,), generator=generator)
    weights = torch.zeros(POSITIONS)
    positions = torch.randperm(POSITIONS, generator=generator)[:scored]
    weights[positions] = torch.rand(scored, generator=generator) + 0.5
    return hidden, head, targets, weights, weights.nonzero().flatten()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss * 0.37, inputs)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("scored", [1, 8, 19, POSITIONS])
def test_loss_and_gradients_equal_the_plain_twin(monkeypatch, chunk, scored, terms):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", chunk)
    hidden, head, targets, weights, positions = problem(scored)
    loss = linear_cross_entropy(hidden, head, targets, positions, weights=weights, vocab_size=SIZE, terms=terms)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms)
    assert loss.shape == (1,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for actual, desired in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(actual, desired, rtol=1e-6, atol=2e-6)


def test_the_last_chunk_is_padded_to_a_smaller_multiple(monkeypatch):
    shapes, product = [], torch.mm
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 32)
    monkeypatch.setitem(fused.LAST_CHUNK_MULTIPLE, "cpu", 8)
    monkeypatch.setattr(torch, "mm", lambda *factors, out: shapes.append(out.shape) or product(*factors, out=out))
    hidden, head, targets, weights, positions = problem(45)
    loss = linear_cross_entropy(hidden, head, targets, positions, weights=weights, vocab_size=SIZE)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE)
    assert [shape[0] for shape in shapes if shape[1] == PADDED] == [32, 16]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for actual, desired in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(actual, desired, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_rows_outside_the_tokenizer_get_exactly_no_gradient(terms):
    hidden, head, targets, weights, positions = problem(30)
    head.data[SIZE:] = 50.0  # would dominate the softmax
    loss = linear_cross_entropy(hidden, head, targets, positions, weights=weights, vocab_size=SIZE, terms=terms)
    torch.testing.assert_close(loss, reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms))
    assert gradients(loss, head)[0][SIZE:].abs().max() == 0


def test_no_scored_row_gives_zero_and_a_graph():
    hidden, head, targets, weights, positions = problem(0)
    loss = linear_cross_entropy(hidden, head, targets, positions, weights=weights, vocab_size=SIZE)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0 and head.grad.abs().max() == 0


@pytest.mark.parametrize("terms", TERMS)
def test_bfloat16_gradients_point_the_same_way(terms):
    hidden, head, targets, weights, positions = problem(POSITIONS, torch.bfloat16)
    loss = linear_cross_entropy(hidden, head, targets, positions, weights=weights, vocab_size=SIZE, terms=terms)
    expected = reference_linear_cross_entropy(hidden, head, targets, weights, SIZE, terms)
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for actual, desired in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert actual.dtype == torch.bfloat16
        assert F.cosine_similarity(actual.float().flatten(), desired.float().flatten(), dim=0) > 0.999


@torch.no_grad()
def test_terms_that_are_off_change_no_bit(variant):
    """Loss and gradients equal the plain formula, evaluated in the order of the fused head."""
    if variant == "kernels":
        pytest.skip("kernels sum in another order")
    hidden, head, targets, weights, positions = problem(POSITIONS)
    padding = (0, fused.CHUNK_ROWS["cpu"] - len(positions))
    inputs = hidden[F.pad(positions, padding)]
    target = F.pad(targets[positions], padding)
    weight = F.pad(weights[positions], padding)[:, None]
    logits = inputs @ head.T
    logits[:, SIZE:] = float("-inf")
    logits -= logits.amax(1, keepdim=True)
    exps = logits.exp()
    total = exps.sum(1, keepdim=True)
    nll = total.log() - logits.gather(1, target[:, None])
    gradient = (exps * (weight / total)).scatter_add(1, target[:, None], -weight)
    with torch.enable_grad():
        loss = linear_cross_entropy(
            hidden, head, targets, positions, weights=weights, vocab_size=SIZE, terms=Terms(0.0, 0.0)
        )
        grad_hidden, grad_head = torch.autograd.grad(loss, (hidden, head))
    assert torch.equal(loss, (nll * weight).sum()[None])
    assert torch.equal(grad_hidden[positions], (gradient @ head)[: len(positions)])
    assert torch.equal(grad_head, gradient.T @ inputs)


def test_nll_per_position_is_unweighted_and_leaves_no_graph(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 8)
    hidden, head, targets, weights, positions = problem(19)
    nll = linear_nll(hidden, head, targets, positions, vocab_size=SIZE)
    expected = F.cross_entropy(hidden @ head[:SIZE].T, targets, reduction="none")
    torch.testing.assert_close(nll, torch.where(weights > 0, expected, 0.0).detach(), rtol=1e-6, atol=1e-6)
    assert not nll.requires_grad


def test_bits_of_a_row_do_not_depend_on_the_other_rows(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_ROWS, "cpu", 8)
    hidden, head, targets, _, _ = problem(0)
    few = linear_nll(hidden, head, targets, torch.arange(3), vocab_size=SIZE)
    linear_nll(hidden, head, targets, torch.arange(17), vocab_size=SIZE)
    many = linear_nll(hidden, head, targets, torch.arange(POSITIONS), vocab_size=SIZE)
    assert torch.equal(few[:3], many[:3])


def test_an_unscored_target_need_not_be_an_id_of_the_tokenizer():
    hidden, head, targets, weights, _ = problem(5)
    weights[0], targets[0] = 0.0, SIZE
    loss = linear_cross_entropy(hidden, head, targets, weights.nonzero().flatten(), weights=weights, vocab_size=SIZE)
    assert math.isfinite(loss.item())


class OneShardOfTwo(fused.WholeHead):
    """A vocabulary shard of a head, with the collectives' contribution of the other shard computed locally."""

    whole = False

    def __init__(self, start, other_logits, index, is_local):
        self.start = start
        self.other_logits = other_logits
        self.index = index[:, None]
        self.is_local = is_local[:, None]

    def highest(self, values):
        self.max_logit = torch.maximum(values, self.other_logits.amax(1, keepdim=True))
        return self.max_logit

    def total(self, values):
        other = self.other_logits - self.max_logit
        target_logit = other.gather(1, self.index).where(self.is_local, 0.0)
        sums = [other.exp().sum(1, keepdim=True), target_logit, other.sum(1, keepdim=True) / SIZE]
        return values + torch.cat(sums, 1)[:, : values.shape[1]]


@pytest.mark.parametrize("terms", TERMS)
def test_shards_of_a_head_write_their_shards_of_the_gradient(terms):
    generator, cut = torch.Generator().manual_seed(3), 64
    logits = torch.randn(7, PADDED, generator=generator) * 3
    targets, weights = torch.tensor([0, 5, 63, 64, 65, 99, 100]), torch.rand(7, generator=generator)
    gradient = logits.clone()
    is_left = targets < cut
    loss = fused._to_gradient_(gradient, targets, weights, vocab_size=SIZE, shard=fused.WHOLE, terms=terms)
    left, right = logits[:, :cut].clone(), logits[:, cut:].clone()
    left_shard = OneShardOfTwo(0, logits[:, cut:SIZE], (targets - cut).where(~is_left, 0), ~is_left)
    right_shard = OneShardOfTwo(cut, logits[:, :cut], targets.where(is_left, 0), is_left)
    for shard_logits, shard in ((left, left_shard), (right, right_shard)):
        options = {"vocab_size": SIZE, "shard": shard, "terms": terms}
        torch.testing.assert_close(fused._to_gradient_(shard_logits, targets, weights, **options), loss)
    torch.testing.assert_close(torch.cat((left, right), 1), gradient, rtol=1e-5, atol=1e-6)


def test_a_full_memory_does_not_turn_the_kernels_off(monkeypatch):
    def full(name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "import_module", full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            fused._kernels.__wrapped__("cuda")
