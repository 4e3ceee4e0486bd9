"""What every objective must keep, whatever it does to its inputs."""

import numpy as np
import pytest
import torch

from megatron.config.sections import ObjectiveConfig, Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives import build_objective, build_token_dropout
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.noise import EvaluationNoise
from megatron.objectives.token_dropout import TokenDropout
from megatron.training.feed import without_padding

VOCABULARY, SEQ_LENGTH = Vocabulary(50), 32
OBJECTIVES = ("ar", "mdm")


def objective(name, **settings):
    return build_objective(name, ObjectiveConfig(**settings), VOCABULARY, time_block=8)


def ids(count=8, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY.size, (count, SEQ_LENGTH + 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_are_the_text_and_weights_stand_only_where_something_is_asked(name):
    made, text = objective(name), ids()
    batch = made.prepare(text, np.arange(8), seed=1)
    offset = made.target_offset
    assert np.array_equal(batch.targets.numpy(), text[:, offset : offset + SEQ_LENGTH])
    masked = batch.tokens == VOCABULARY.mask_id
    if name == "mdm":
        assert torch.equal(batch.weights > 0, masked)
        assert np.array_equal(batch.tokens[~masked].numpy(), text[:, :-1][~masked.numpy()])
    else:
        assert not masked.any() and bool((batch.weights == 1).all())
    assert batch.count == 8 * SEQ_LENGTH
    assert torch.equal(batch.rows, batch.weights.flatten().nonzero().flatten())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_depends_on_run_positions_and_not_on_how_they_are_grouped(name):
    made, text, positions = objective(name), ids(), np.arange(100, 108)
    whole = made.prepare(text, positions, seed=1)
    for row in (5, 0, 3):
        alone = made.prepare(text[[row]], positions[[row]], seed=1)
        assert torch.equal(alone.tokens[0], whole.tokens[row]) and torch.equal(alone.weights[0], whole.weights[row])


def test_a_sequence_gets_new_masks_at_every_run_position():
    text = np.repeat(ids(1), 4, axis=0)
    batch = objective("mdm").prepare(text, np.array([0, 8, 16, 24]), seed=1)
    masks = {tuple(row.tolist()) for row in batch.tokens == VOCABULARY.mask_id}
    assert len(masks) == 4


class _Fixed(MaskedDiffusion):
    """Masked diffusion at a chosen time."""

    def time(self, position, seed):
        return {0: 0.0}.get(position, 0.5)


def test_no_masked_token_is_harmless():
    made = _Fixed(VOCABULARY.mask_id, time_block=8, eps=1e-9)
    batch = made.prepare(ids(2), np.array([0, 1]), seed=1)
    assert batch.weights[0].sum() == 0 and batch.weights[1].sum() > 0
    assert torch.equal(batch.tokens[0], batch.targets[0])
    assert torch.isfinite(batch.weights).all()


def test_masks_and_weights_have_the_published_distribution():
    made, count = objective("mdm", mask_times="iid"), 4000
    batch = made.prepare(ids(count), np.arange(count), seed=3)
    shares = 1 / batch.weights.max(dim=1).values[batch.weights.any(dim=1)]
    assert 1e-3 <= shares.min() and shares.max() < 1
    assert abs(float((batch.weights > 0).float().mean()) - 0.5005) < 0.015
    assert abs(float(batch.weights.mean()) - 1) < 0.03  # E[mask / p] = 1


def test_times_are_uniform_and_any_stretch_is_stratified():
    made = MaskedDiffusion(50, time_block=32)
    for start in (0, 32, 40):
        times = np.sort([made.time(position, 7) for position in range(start, start + 8)])
        if start % 32 == 0:
            assert np.all(np.diff(times) > 0.124) and np.all(np.diff(times) < 0.126)
    first = [made.time(block * 32, 7) for block in range(2000)]
    assert abs(np.mean(first) - 0.5) < 0.03 and abs(np.var(first) - 1 / 12) < 0.01


@pytest.mark.parametrize("alignment", ("common", "published"))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_scores_the_stated_tokens(name, alignment):
    made, text, windows = objective(name), ids(6), np.arange(6)
    batch = made.evaluation(text, EvaluationNoise(1, "validation", 0), windows, alignment)
    scored = made.scored_tokens(SEQ_LENGTH, alignment)
    tokens = np.arange(SEQ_LENGTH) + made.target_offset
    inside = (tokens >= scored.start) & (tokens < scored.stop)
    assert not batch.weights[:, ~inside].any()
    if name == "mdm":
        # exactly k hidden with weight n / k: a uniform model scores log V whatever the draw
        assert np.allclose(batch.weights.sum(dim=1), inside.sum(), rtol=1e-5)
        if alignment == "common":
            assert torch.equal(batch.tokens[:, 0], batch.targets[:, 0])
    else:
        assert bool((batch.weights[:, inside] == 1).all())


def test_both_objectives_score_the_same_tokens_in_the_common_alignment():
    assert objective("ar").scored_tokens(32, "common") == objective("mdm").scored_tokens(32, "common") == slice(1, 32)


def test_evaluation_noise_is_keyed_by_set_window_and_replicate():
    made, text = objective("mdm"), np.repeat(ids(1), 6, axis=0)

    def tokens(noise, windows):
        return made.evaluation(text[: len(windows)], noise, np.array(windows), "common").tokens

    base = tokens(EvaluationNoise(1, "a", 0), [0, 1, 2, 3])
    assert torch.equal(tokens(EvaluationNoise(1, "a", 0), [2])[0], base[2])
    for other in (EvaluationNoise(2, "a", 0), EvaluationNoise(1, "b", 0), EvaluationNoise(1, "a", 1)):
        assert not torch.equal(tokens(other, [0, 1, 2, 3]), base)


def test_token_dropout_changes_inputs_only():
    batch = objective("ar").prepare(ids(400), np.arange(400), seed=1)
    fixed = TokenDropout(VOCABULARY.mask_id, ratio=0.3)(batch, np.arange(400), seed=1)
    dropped = fixed.tokens == VOCABULARY.mask_id
    assert abs(float(dropped.float().mean()) - 0.3) < 0.02
    assert torch.equal(fixed.tokens[~dropped], batch.tokens[~dropped])
    assert torch.equal(fixed.targets, batch.targets) and torch.equal(fixed.weights, batch.weights)
    drawn = TokenDropout(VOCABULARY.mask_id, maximum=0.6)(batch, np.arange(400), seed=1).tokens == VOCABULARY.mask_id
    assert abs(float(drawn.float().mean()) - 0.3) < 0.02
    assert float(drawn.float().mean(dim=1).std()) > 0.15  # a share for every sequence
    assert TokenDropout(VOCABULARY.mask_id)(batch, np.arange(400), seed=1) is batch


def test_token_dropout_is_refused_for_masked_diffusion():
    with pytest.raises(ConfigurationError, match="--token-dropout 0.1"):
        build_token_dropout("mdm", ObjectiveConfig(token_dropout=0.1), VOCABULARY)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_carries_neither_weight_nor_count(name):
    batch = objective(name).prepare(ids(4), np.arange(4), seed=1)
    real = torch.tensor([True, True, False, False])
    short = without_padding(batch, real)
    assert short.count == 2 * SEQ_LENGTH and not short.weights[2:].any()
    assert torch.equal(short.weights[:2], batch.weights[:2]) and int(short.rows.max()) < 2 * SEQ_LENGTH
