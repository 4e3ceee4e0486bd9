"""The autoregressive and the masked-diffusion objective, and token dropout: batches, noise and evaluation."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron.batch import without_padding
from megatron.config.sections import ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.registry import build_objective
from megatron.objectives.token_dropout import TokenDropout

VOCABULARY, SEQ_LENGTH = Vocabulary(50), 32
OBJECTIVES = ("ar", "mdm")


def objective(name, **settings):
    return build_objective(ObjectiveConfig(objective=name, **settings), VOCABULARY, time_block=8)


def ids(count=8, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY.size, (count, SEQ_LENGTH + 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_are_the_text_and_only_scored_positions_have_weight(name):
    tested, text = objective(name), ids()
    batch = tested.prepare(text, np.arange(8), seed=1)
    offset = tested.target_offset
    assert np.array_equal(batch.targets.numpy(), text[:, offset : offset + SEQ_LENGTH])
    masked = batch.tokens == VOCABULARY.mask_id
    if name == "mdm":
        assert torch.equal(batch.weights > 0, masked)
        assert np.array_equal(batch.tokens[~masked].numpy(), text[:, :-1][~masked.numpy()])
    else:
        assert not masked.any() and bool((batch.weights == 1).all())
    assert batch.count == 8 * SEQ_LENGTH
    check_scored_positions(batch)


def check_scored_positions(batch):
    """Check that `scored_positions` are those with a weight, and dtype, shape and layout of the tensors."""
    assert torch.equal(batch.scored_positions, batch.weights.flatten().nonzero().flatten())
    for tensor, dtype in ((batch.tokens, torch.int64), (batch.targets, torch.int64), (batch.weights, torch.float32)):
        assert tensor.dtype == dtype and tensor.shape == batch.weights.shape and tensor.is_contiguous()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scored_positions_follow_the_weights_through_every_change(name):
    tested, text, indices = objective(name), ids(4), np.arange(4)
    drop = TokenDropout(VOCABULARY.mask_id, maximum=0.9)
    for batch in (
        tested.prepare(text, indices, seed=1),
        tested.evaluation(text, EvaluationNoise(1, "v", 0), indices, "common"),
        tested.evaluation(text, EvaluationNoise(1, "v", 0), indices, "published"),
    ):
        for real in (4, 3, 1, 0):
            for changed in (batch, drop(batch, indices, seed=1)):
                short = without_padding(changed, torch.arange(4) < real)
                assert short.count == batch.count // 4 * real and not short.weights[real:].any()
                check_scored_positions(short)
                check_scored_positions(short.to(torch.device("cpu")))
                check_scored_positions(short.map_tensors(torch.clone))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_inputs_of_an_objective_stay_as_they_are(name):
    tested, indices, noise = objective(name), np.arange(8), EvaluationNoise(1, "v", 0)
    text = ids()
    text.flags.writeable = indices.flags.writeable = False
    batches = [tested.prepare(text, indices, 1), tested.evaluation(text, noise, indices, "common")]
    copies = [batch.map_tensors(torch.clone) for batch in batches]
    for batch, copy in zip(batches, copies):
        assert not any(np.shares_memory(text, tensor.numpy()) for tensor in (batch.tokens, batch.targets))
        assert not np.shares_memory(batch.tokens.numpy(), batch.targets.numpy())
        TokenDropout(VOCABULARY.mask_id, ratio=0.5)(batch, indices, seed=1)
        without_padding(batch, torch.arange(8) < 3)
        for field in ("tokens", "targets", "weights", "scored_positions"):
            assert torch.equal(getattr(batch, field), getattr(copy, field))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_depends_on_sample_indices_and_not_on_how_they_are_grouped(name):
    tested, text, indices = objective(name), ids(), np.arange(100, 108)
    whole = tested.prepare(text, indices, seed=1)
    for row in (5, 0, 3):
        alone = tested.prepare(text[[row]], indices[[row]], seed=1)
        assert torch.equal(alone.tokens[0], whole.tokens[row]) and torch.equal(alone.weights[0], whole.weights[row])


def test_a_sequence_gets_new_masks_at_every_sample_index():
    text = np.repeat(ids(1), 4, axis=0)
    batch = objective("mdm").prepare(text, np.array([0, 8, 16, 24]), seed=1)
    masks = {tuple(row.tolist()) for row in batch.tokens == VOCABULARY.mask_id}
    assert len(masks) == 4


@dataclass(frozen=True)
class AtTimes(MaskedDiffusion):
    """Masked diffusion with given times, by sample index."""

    times: tuple[float, ...] = ()

    def time(self, sample_index: int, seed: int) -> float:
        return self.times[sample_index]


def at_times(*times: float, eps: float = 1e-9) -> AtTimes:
    return AtTimes(VOCABULARY.mask_id, 8, eps, times=times)


def loss_and_gradients(batch) -> tuple[float, torch.Tensor]:
    """Return the summed loss of a small model and all its gradients in one vector."""
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, init_method_std=0.2)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=2)
    loss = model(batch).sum()
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_no_masked_token_is_harmless():
    text = ids(2)
    batch = at_times(0.0, 0.5).prepare(text, np.arange(2), seed=1)
    assert batch.weights[0].sum() == 0 and batch.weights[1].sum() > 0
    assert torch.equal(batch.tokens[0], batch.targets[0])
    assert torch.isfinite(batch.weights).all() and batch.count == 2 * SEQ_LENGTH
    # it adds nothing to the sum over a batch
    alone = at_times(0.0, 0.5).prepare(text[1:], np.array([1]), seed=1)
    loss, gradients = loss_and_gradients(batch)
    expected_loss, expected_gradients = loss_and_gradients(alone)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert torch.allclose(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_masked_token_gives_zero():
    batch = at_times(0.0, 0.0).prepare(ids(2), np.arange(2), seed=1)
    assert len(batch.scored_positions) == 0 and not batch.weights.any()
    loss, gradients = loss_and_gradients(batch)
    assert loss == 0 and not gradients.any() and torch.isfinite(gradients).all()


@pytest.mark.parametrize("eps", [1e-3, 1e-9])
def test_extreme_times(eps):
    """A mask probability near eps masks almost nothing, with weight 1 / p; one near 1 masks almost everything."""
    count, last_time = 400, np.nextafter(1.0, 0.0)
    tested = at_times(*[0.0] * count, *[last_time] * count, eps=eps)
    batch = tested.prepare(ids(2 * count), np.arange(2 * count), seed=4)
    low, high = batch.weights[:count], batch.weights[count:]
    assert set(low.unique().tolist()) <= {0.0, np.float32(1 / eps).item()}
    assert float((low > 0).sum()) == pytest.approx(count * SEQ_LENGTH * eps, abs=4 * (count * SEQ_LENGTH * eps) ** 0.5)
    assert bool((high == 1).all()) and bool((batch.tokens[count:] == VOCABULARY.mask_id).all())
    loss, gradients = loss_and_gradients(batch)
    assert np.isfinite(loss) and torch.isfinite(gradients).all() and gradients.any()


def test_masks_and_weights_have_the_published_distribution():
    tested, count = objective("mdm", mask_times="iid"), 4000
    batch = tested.prepare(ids(count), np.arange(count), seed=3)
    mask_prob = 1 / batch.weights.max(dim=1).values[batch.weights.any(dim=1)]
    assert mask_prob.min() >= 1e-3 and mask_prob.max() < 1
    assert abs(float((batch.weights > 0).float().mean()) - 0.5005) < 0.015
    assert abs(float(batch.weights.mean()) - 1) < 0.03  # E[mask / p] = 1


def test_times_are_uniform_and_any_stretch_is_stratified():
    tested = MaskedDiffusion(50, time_block=32)
    for start in (0, 32, 40):
        times = np.sort([tested.time(index, 7) for index in range(start, start + 8)])
        if start % 32 == 0:
            assert np.all(np.diff(times) > 0.124) and np.all(np.diff(times) < 0.126)
    first_times = [tested.time(block * 32, 7) for block in range(2000)]
    assert abs(np.mean(first_times) - 0.5) < 0.03 and abs(np.var(first_times) - 1 / 12) < 0.01


@pytest.mark.parametrize("alignment", ("common", "published"))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_scores_the_stated_tokens(name, alignment):
    tested, text, windows = objective(name), ids(6), np.arange(6)
    batch = tested.evaluation(text, EvaluationNoise(1, "validation", 0), windows, alignment)
    scored = tested.scored_tokens(SEQ_LENGTH, alignment)
    tokens = np.arange(SEQ_LENGTH) + tested.target_offset
    inside = (tokens >= scored.start) & (tokens < scored.stop)
    assert not batch.weights[:, ~inside].any()
    assert batch.count == 6 * inside.sum()
    if name == "mdm":
        # exactly k masked with weight n / k: a uniform model scores log V for any draw
        assert np.allclose(batch.weights.sum(dim=1), inside.sum(), rtol=1e-5)
        if alignment == "common":
            assert torch.equal(batch.tokens[:, 0], batch.targets[:, 0])
    else:
        assert bool((batch.weights[:, inside] == 1).all())


def test_an_evaluation_masks_every_count_equally_often():
    tested, text = objective("mdm"), ids(SEQ_LENGTH)
    for replicate in range(4):
        noise, windows = EvaluationNoise(1, "validation", replicate), 64 + np.arange(SEQ_LENGTH)
        num_masked = (tested.evaluation(text, noise, windows, "published").weights > 0).sum(dim=1)
        assert sorted(num_masked.tolist()) == list(range(1, SEQ_LENGTH + 1))
    counts = []
    for replicate in range(400):
        batch = tested.evaluation(text[:1], EvaluationNoise(1, "validation", replicate), np.array([5]), "common")
        counts.append(int((batch.weights > 0).sum()))
    assert min(counts) == 1 and max(counts) == SEQ_LENGTH - 1
    assert np.mean(counts) == pytest.approx(SEQ_LENGTH / 2, abs=4 * SEQ_LENGTH / 12**0.5 / 20)


def test_both_objectives_score_the_same_tokens_in_the_common_alignment():
    assert objective("ar").scored_tokens(32, "common") == objective("mdm").scored_tokens(32, "common") == slice(1, 32)


def test_evaluation_noise_is_keyed_by_set_window_and_replicate():
    tested, text = objective("mdm"), np.repeat(ids(1), 6, axis=0)

    def tokens(noise, windows):
        return tested.evaluation(text[: len(windows)], noise, np.array(windows), "common").tokens

    base = tokens(EvaluationNoise(1, "a", 0), [0, 1, 2, 3])
    assert torch.equal(tokens(EvaluationNoise(1, "a", 0), [2])[0], base[2])
    for other_noise in (EvaluationNoise(2, "a", 0), EvaluationNoise(1, "b", 0), EvaluationNoise(1, "a", 1)):
        assert not torch.equal(tokens(other_noise, [0, 1, 2, 3]), base)


def test_token_dropout_changes_inputs_only():
    batch = objective("ar").prepare(ids(400), np.arange(400), seed=1)
    fixed = TokenDropout(VOCABULARY.mask_id, ratio=0.3)(batch, np.arange(400), seed=1)
    masked = fixed.tokens == VOCABULARY.mask_id
    assert abs(float(masked.float().mean()) - 0.3) < 0.02
    assert torch.equal(fixed.tokens[~masked], batch.tokens[~masked])
    assert torch.equal(fixed.targets, batch.targets) and torch.equal(fixed.weights, batch.weights)
    varied = TokenDropout(VOCABULARY.mask_id, maximum=0.6)(batch, np.arange(400), seed=1)
    masked_share = (varied.tokens == VOCABULARY.mask_id).float().mean(dim=1)
    assert abs(float(masked_share.mean()) - 0.3) < 0.02
    assert float(masked_share.std()) > 0.15  # drawn for every sequence
    assert TokenDropout(VOCABULARY.mask_id)(batch, np.arange(400), seed=1) is batch


@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"ratio": 0.5}, {"maximum": 1.0}])
def test_token_dropout_leaves_every_target_and_weight(settings):
    text, indices = ids(), np.arange(8)
    batch = objective("ar").prepare(text, indices, seed=1)
    dropped = TokenDropout(VOCABULARY.mask_id, **settings)(batch, indices, seed=1)
    assert np.array_equal(dropped.targets.numpy(), text[:, 1:])
    assert torch.equal(dropped.weights, batch.weights) and dropped.count == batch.count
    masked_share = (dropped.tokens == VOCABULARY.mask_id).float().mean(dim=1)
    assert bool((masked_share > 0).all()) if "ratio" in settings else len(masked_share.unique()) > 4
    assert bool((masked_share == 1).all()) == (settings == {"ratio": 1.0})


def test_token_dropout_is_keyed_by_the_sample_index():
    batch = objective("ar").prepare(np.repeat(ids(1), 8, axis=0), np.arange(8), seed=1)
    drop = TokenDropout(VOCABULARY.mask_id, maximum=0.8)
    whole = drop(batch, np.arange(8), seed=1).tokens
    assert len({tuple(row) for row in whole.tolist()}) == 8
    alone = objective("ar").prepare(ids(1), np.array([5]), seed=1)
    assert torch.equal(drop(alone, np.array([5]), seed=1).tokens[0], whole[5])


# frozen: a change here silently changes the noise of every published run
def test_the_times_of_masked_diffusion_are_frozen():
    stratified = MaskedDiffusion(50, time_block=8)
    assert np.allclose([stratified.time(index, 1234) for index in (0, 1, 2**40 + 3)], STRATIFIED_TIMES)
    iid = MaskedDiffusion(50, time_block=8, mask_times="iid")
    assert np.allclose([iid.time(index, 1234) for index in (0, 1, 2**40 + 3)], IID_TIMES)


def masked_positions(batch) -> list[int]:
    """Return the first three masked positions of the last sequence."""
    return (batch.tokens[-1] == VOCABULARY.mask_id).nonzero().flatten()[:3].tolist()


def test_the_masks_of_masked_diffusion_are_frozen():
    tested, indices = objective("mdm"), np.array([0, 9, 2**40])
    assert masked_positions(tested.prepare(ids(3), indices, seed=1234)) == TRAINING_MASK
    noise = EvaluationNoise(1, "validation", 2)
    assert masked_positions(tested.evaluation(ids(3), noise, np.arange(3), "common")) == EVALUATION_MASK


def test_the_draws_of_token_dropout_are_frozen():
    indices = np.array([0, 9, 2**40])
    batch = objective("ar").prepare(ids(3), indices, seed=1234)
    assert masked_positions(TokenDropout(VOCABULARY.mask_id, ratio=0.3)(batch, indices, seed=1234)) == FIXED_RATIO
    assert masked_positions(TokenDropout(VOCABULARY.mask_id, maximum=0.6)(batch, indices, seed=1234)) == DRAWN_RATIO


STRATIFIED_TIMES = [0.14989874435667505, 0.649898744356675, 0.3182815523876479]
IID_TIMES = [0.14989874435667505, 0.9801026683862094, 0.6678016843932968]
TRAINING_MASK, EVALUATION_MASK = [1, 2, 4], [17, 18, 30]
FIXED_RATIO, DRAWN_RATIO = [1, 3, 4], [0, 2, 3]


@pytest.mark.parametrize(
    "name, settings, flag",
    [
        ("mdm", {"token_dropout": 0.1}, "--token-dropout 0.1: .*pretrain_gpt.py"),
        ("mdm", {"token_dropout_max": 0.2}, "--token-dropout-max 0.2: .*pretrain_gpt.py"),
        ("ar", {"mask_times": "iid"}, "--mask-times iid: .*pretrain_mdm.py"),
        ("ar", {"mask_eps": 0.1}, "--mask-eps 0.1: .*pretrain_mdm.py"),
    ],
)
def test_an_option_of_another_objective_is_refused(name, settings, flag):
    with pytest.raises(ConfigurationError, match=flag):
        objective(name, **settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_carries_neither_weight_nor_count(name):
    batch = objective(name).prepare(ids(4), np.arange(4), seed=1)
    real = torch.tensor([True, True, False, False])
    short = without_padding(batch, real)
    assert short.count == 2 * SEQ_LENGTH and not short.weights[2:].any()
    assert torch.equal(short.weights[:2], batch.weights[:2]) and int(short.scored_positions.max()) < 2 * SEQ_LENGTH
