"""The contract of every objective in the registry."""

import numpy as np
import pytest
import torch

from megatron.batch import without_padding
from megatron.config.capabilities import Refused
from megatron.config.sections import ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.registry import OBJECTIVES, build_objective, capabilities
from megatron.objectives.token_dropout import TokenDropout

VOCABULARY, SEQ_LENGTH = Vocabulary(50), 32
USES = ("generation", "scoring", "export", "infilling")
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def objective(name):
    return build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)


def ids(count=8, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY.size, (count, SEQ_LENGTH + 1))


def training_batches(name, text=None):
    """Return (ids, sample indices, batch) of each kind of micro-batch that the objective has."""
    text = ids() if text is None else text
    kinds = [slice(0, 4), slice(4, 8)] if capabilities(name).mixes_kinds else [slice(0, 8)]
    indices = np.arange(96, 104)
    return [(text[rows], indices[rows], objective(name).prepare(text[rows], indices[rows], seed=1)) for rows in kinds]


def evaluation_batches(name, text, noise, alignment):
    """Yield (likelihood, batch) of an evaluation of the windows 0, 1, ..."""
    for likelihood in objective(name).likelihoods:
        yield likelihood, likelihood.evaluation(text, noise, np.arange(len(text)), alignment)


def all_batches(name):
    noise = EvaluationNoise(1, "validation", 0)
    batches = [batch for *_, batch in training_batches(name)]
    for alignment in ("common", "published"):
        batches += [batch for _, batch in evaluation_batches(name, ids(), noise, alignment)]
    return batches


def check_tensors(batch):
    """Check that `scored_positions` are those with a weight, and dtype, shape and layout of the tensors."""
    assert torch.equal(batch.scored_positions, batch.weights.flatten().nonzero().flatten())
    for tensor, dtype in ((batch.tokens, torch.int64), (batch.targets, torch.int64), (batch.weights, torch.float32)):
        assert tensor.dtype == dtype and tensor.shape == batch.weights.shape and tensor.is_contiguous()


@every_objective
def test_batches_have_the_declared_shape_masks_and_inputs(name):
    declared = capabilities(name)
    batches = all_batches(name)
    for batch in batches:
        check_tensors(batch)
        assert batch.tokens.shape[1] == SEQ_LENGTH * declared.positions_per_token
        assert batch.counts.shape == (len(batch.tokens),) and (batch.counts > 0).all()
        assert bool((batch.weights >= 0).all()) and len(batch.scored_positions)
        assert int(batch.targets.max()) < VOCABULARY.size  # [MASK] is never predicted
        assert int(batch.tokens.max()) <= VOCABULARY.mask_id
    trained = [batch for *_, batch in training_batches(name)]
    assert all((batch.blocked is not None) == declared.needs_attention_mask for batch in trained)
    has_mask = [bool((batch.tokens == VOCABULARY.mask_id).any()) for batch in batches]
    assert any(has_mask) == declared.needs_mask


@every_objective
def test_the_summed_weights_are_the_count_on_average(name):
    """A model of uniform probabilities has the loss log V: exactly in evaluation, on average in training."""
    text, noise = ids(), EvaluationNoise(1, "validation", 0)
    for _, batch in evaluation_batches(name, text, noise, "common"):
        assert np.allclose(batch.weights.sum(dim=1), batch.counts, rtol=1e-5)
    text = ids(4000)
    kinds = [(np.arange(4000) // 4 * 8 + 4 * kind + np.arange(4000) % 4) for kind in (0, 1)]
    for indices in kinds if capabilities(name).mixes_kinds else [np.arange(4000)]:
        parts = [objective(name).prepare(text[i : i + 4], indices[i : i + 4], seed=3) for i in range(0, 4000, 4)]
        share = sum(float(part.weights.sum()) for part in parts) / sum(part.count for part in parts)
        assert share == pytest.approx(1, abs=0.03)


@every_objective
def test_scored_positions_follow_the_weights_through_every_change(name):
    drop = TokenDropout(VOCABULARY.mask_id, maximum=0.9)
    for batch in all_batches(name):
        rows = len(batch.tokens)
        changes = (batch,) if capabilities(name).needs_mask else (batch, drop(batch, np.arange(rows), seed=1))
        for changed in changes:
            for real in (rows, rows - 1, 1, 0):
                short = without_padding(changed, torch.arange(rows) < real)
                assert short.count == batch.counts[:real].sum() and not short.weights[real:].any()
                assert torch.equal(short.weights[:real], changed.weights[:real])
                for copy in (short, short.to(torch.device("cpu")), short.map_tensors(torch.clone)):
                    check_tensors(copy)


@every_objective
def test_inputs_stay_as_they_are_and_share_no_memory(name):
    text = ids()
    before = text.copy()
    text.flags.writeable = False
    batches = [batch for *_, batch in training_batches(name, text)]
    batches += [batch for _, batch in evaluation_batches(name, text, EvaluationNoise(1, "v", 0), "common")]
    for batch in batches:
        tensors = (batch.tokens, batch.targets)
        assert not any(np.shares_memory(text, tensor.numpy()) for tensor in tensors)
        assert not np.shares_memory(batch.tokens.numpy(), batch.targets.numpy())
    assert np.array_equal(text, before)


@every_objective
def test_a_batch_depends_on_sample_indices_and_not_on_how_they_are_grouped(name):
    for text, indices, batch in training_batches(name):
        for row in (3, 0, 2):
            alone = objective(name).prepare(text[[row]], indices[[row]], seed=1)
            assert torch.equal(alone.tokens[0], batch.tokens[row])
            assert torch.equal(alone.weights[0], batch.weights[row])


@every_objective
@pytest.mark.parametrize("alignment", ["common", "published"])
def test_an_evaluation_scores_the_stated_tokens(name, alignment):
    text = ids(6)
    for likelihood, batch in evaluation_batches(name, text, EvaluationNoise(1, "v", 0), alignment):
        stated = likelihood.scored_tokens(SEQ_LENGTH, alignment)
        if alignment == "common":
            assert stated == slice(1, SEQ_LENGTH)  # for all objectives, so that losses can be compared
        assert np.allclose(batch.counts, stated.stop - stated.start)
        scored = batch.weights.numpy() > 0
        half = slice(0, SEQ_LENGTH)  # of block diffusion's 2S positions the first S are scored
        assert not scored[:, SEQ_LENGTH:].any()
        positions = likelihood.target_token_positions(batch)
        rows, columns = scored[:, half].nonzero()
        tokens = positions[rows, columns]
        assert tokens.min() >= stated.start and tokens.max() < stated.stop
        assert np.array_equal(batch.targets.numpy()[rows, columns], text[rows, tokens])


@every_objective
def test_evaluation_noise_is_keyed_by_seed_set_and_replicate(name):
    text = np.repeat(ids(1), 6, axis=0)
    keys = [EvaluationNoise(1, "a", 0), EvaluationNoise(2, "a", 0), EvaluationNoise(1, "b", 0)]
    keys.append(EvaluationNoise(1, "a", 1))
    for likelihood in objective(name).likelihoods:
        first, *others = [likelihood.evaluation(text, key, np.arange(6), "common") for key in keys]
        again = likelihood.evaluation(text[:1], keys[0], np.array([4]), "common")
        assert torch.equal(again.tokens[0], first.tokens[4])
        for other in others:
            assert torch.equal(other.tokens, first.tokens) == likelihood.exact


@every_objective
def test_a_refused_use_has_a_reason_and_another_objective(name):
    for use in USES:
        value = getattr(capabilities(name), use)
        if isinstance(value, Refused):
            assert value.reason and not value.reason.endswith(".")
        else:
            forms = value if use == "scoring" else (value,)
            assert forms and not set(forms) - {"causal", "masked", "blocks", "permuted"}
            assert capabilities(name).needs_mask or not set(forms) & {"masked", "blocks"}


@every_objective
def test_inputs_of_scoring_are_declared_as_they_are_evaluated(name):
    declared, noise = capabilities(name), EvaluationNoise(1, "v", 0)
    exact = [likelihood.exact for likelihood in objective(name).likelihoods]
    assert ("causal" in declared.scoring) == any(exact)
    for likelihood, batch in evaluation_batches(name, ids(), noise, "common"):
        assert (batch.target_positions is not None) == declared.target_positions
        if "masked" in declared.scoring and not likelihood.exact:
            assert likelihood.target_offset == declared.masked_offset
