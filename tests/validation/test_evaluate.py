"""Validation: which tokens are scored, reproducibility, and standard errors."""

import bisect
import inspect
from functools import cache

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron.config.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective
from megatron.parallel.apply import build_engine
from megatron.parallel.engine import Engine
from megatron.randomness import stream
from megatron.training.microbatches import MicroBatches
from megatron.training.optimizer import build_optimizer
from megatron.training.step import reseed, train_step
from megatron.validation.evaluate import Evaluation, ValidationSet, evaluate
from tests.distributed import joined, spawn

VOCABULARY, SEQ_LENGTH = Vocabulary(257), 16
CONFIG = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, init_method_std=0.5, hidden_dropout=0.2)
OBJECTIVES, ALIGNMENTS = ("ar", "mdm"), ("common", "published")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Lines of the standard library, one document per line, one token per byte: shorter and longer than a window."""
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for line in inspect.getsource(bisect).splitlines()[:20]:
            writer.add_document([*line.encode(), 256])
    return prefix


@pytest.fixture(scope="module")
def ranks():
    with joined() as ranks:
        yield ranks


def validation_set(prefix: str, limit: int | None = None) -> ValidationSet:
    dataset = IndexedDataset(prefix, VOCABULARY.size)
    token_bytes = np.array([1] * 256 + [0])
    return ValidationSet("text", ValidationWindows(dataset, SEQ_LENGTH, limit), len(dataset), token_bytes)


@cache
def plain_model() -> Transformer:
    model = Transformer(CONFIG, VOCABULARY)
    initialise(model, CONFIG, seed=3)
    return model.eval()


def sharded_model(ranks) -> Engine:
    return build_engine(CONFIG, VOCABULARY, ranks, ParallelConfig(), seed=3, bf16=False, compile=False)


def objective(name: str):
    return build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)


def run(model, name, data, *, seed=1, replicates=4, batch_size=4, alignment="common") -> Evaluation:
    settings = {"seed": seed, "replicates": replicates, "batch_size": batch_size, "alignment": alignment}
    (evaluation,) = evaluate(model, objective(name), data, **settings)
    return evaluation


def check_equal(expected: Evaluation, actual: Evaluation) -> None:
    assert np.array_equal(expected.tokens, actual.tokens) and np.array_equal(expected.bytes, actual.bytes)
    np.testing.assert_allclose(actual.nats, expected.nats, rtol=1e-6)
    for figure, value in expected.summary().items():
        assert actual.summary()[figure] == (value if value is None else pytest.approx(value, rel=1e-6))


# the figures of a summary


def simulated(documents=7, replicates=5, seed=0) -> Evaluation:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 50, documents).astype(float)
    tokens[2] = 0  # a document in no window
    nats = tokens * draw.gamma(4, 1, (replicates, documents))
    return Evaluation(nats, tokens, 3 * tokens)


def test_summary_against_brute_force():
    evaluation = simulated()
    replicates, documents = evaluation.nats.shape
    total = sum(evaluation.tokens)
    losses = [sum(evaluation.nats[r]) / total for r in range(replicates)]
    loss = sum(losses) / replicates
    spread = sum((replicate_loss - loss) ** 2 for replicate_loss in losses) / (replicates - 1)
    seen = [d for d in range(documents) if evaluation.tokens[d]]
    squares = [(sum(evaluation.nats[:, d]) / replicates - loss * evaluation.tokens[d]) ** 2 for d in seen]
    assert evaluation.summary() == pytest.approx(
        {
            "loss": loss,
            "mc_se": (spread / replicates) ** 0.5,
            "data_se": (len(seen) / (len(seen) - 1) * sum(squares)) ** 0.5 / total,
            "bits_per_byte": loss * total / np.log(2) / sum(evaluation.bytes),
        },
        rel=1e-12,
    )


def test_a_figure_that_cannot_be_known_is_null():
    whole = simulated()
    alone = Evaluation(whole.nats[:1, :1], whole.tokens[:1], None).summary()
    assert alone["loss"] > 0 and [alone[key] for key in ("mc_se", "data_se", "bits_per_byte")] == [None] * 3
    assert Evaluation(whole.nats, whole.tokens, 0 * whole.tokens).summary()["bits_per_byte"] is None


def check_coverage(standard_error) -> None:
    """Check that loss +- 1.96 standard errors contains the population's loss in about 95% of simulated sets.

    Documents differ in difficulty, and long ones are easier, so the loss is not a plain mean; every replicate adds
    independent noise to every document.
    """
    draw, hits, sets, documents, replicates = np.random.default_rng(0), 0, 2000, 80, 4

    def sample(count):
        difficulty = draw.normal(size=count)
        tokens = np.ceil(np.exp(5 - 0.3 * difficulty + 0.5 * draw.normal(size=count)))
        return tokens * (3 + 0.4 * difficulty), tokens

    nats, tokens = sample(2_000_000)
    truth = nats.sum() / tokens.sum()
    for _ in range(sets):
        nats, tokens = sample(documents)
        noise = 0.6 * tokens * draw.normal(size=(replicates, documents))
        evaluation = Evaluation(nats + noise, tokens, None)
        hits += abs(evaluation.summary()["loss"] - truth) < 1.96 * standard_error(evaluation)
    assert hits / sets == pytest.approx(0.95, abs=0.02)


def test_data_se_covers_the_population():
    check_coverage(lambda evaluation: evaluation.summary()["data_se"])


def test_an_error_that_treats_tokens_as_independent_is_found():
    with pytest.raises(AssertionError):
        check_coverage(lambda evaluation: 1 / np.sqrt(evaluation.tokens.sum()))


# what is scored


@torch.no_grad()
def plain_nll(tokens: np.ndarray, targets: np.ndarray, causal: bool) -> np.ndarray:
    """Return the nll [B, S] of `targets` at every position of `tokens`, by log-softmax."""
    logits = plain_model().logits(torch.from_numpy(tokens), causal).double()
    return -torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets)[..., None])[..., 0].numpy()


@pytest.mark.parametrize("alignment, last", [("common", SEQ_LENGTH - 1), ("published", SEQ_LENGTH)])
def test_ar_is_the_cross_entropy_of_the_scored_tokens_by_document(ranks, prefix, alignment, last):
    data = validation_set(prefix)
    nats, tokens, text = (np.zeros(data.documents) for _ in range(3))
    for window in range(len(data.windows)):
        ids, owners = data.windows[window]
        nll = plain_nll(ids[None, :-1], ids[None, 1:], causal=True)[0]
        for position in range(1, last + 1):  # of the target in the window
            nats[owners[position]] += nll[position - 1]
            tokens[owners[position]] += 1
            text[owners[position]] += ids[position] < 256
    evaluation = run(sharded_model(ranks), "ar", data, alignment=alignment)
    assert np.array_equal(evaluation.tokens, tokens) and np.array_equal(evaluation.bytes, text)
    np.testing.assert_allclose(evaluation.nats, nats[None], rtol=1e-5)
    assert evaluation.summary()["loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-6)


@pytest.mark.parametrize("alignment, first", [("common", 1), ("published", 0)])
def test_mdm_attributes_masked_tokens_to_their_documents(ranks, prefix, alignment, first):
    data = validation_set(prefix)
    windows = np.arange(len(data.windows))
    ids, owners = (np.stack(part) for part in zip(*(data.windows[int(window)] for window in windows)))
    nats = np.zeros((2, data.documents))
    for replicate in range(2):
        batch = objective("mdm").evaluation(ids, EvaluationNoise(1, "text", replicate), windows, alignment)
        nll = plain_nll(batch.tokens.numpy(), ids[:, :-1], causal=False)
        for window in windows:
            masked = np.flatnonzero(batch.tokens[window] == VOCABULARY.mask_id)
            assert masked.min() >= first
            for position in masked:
                nats[replicate, owners[window, position]] += nll[window, position] * (SEQ_LENGTH - first) / len(masked)
    evaluation = run(sharded_model(ranks), "mdm", data, replicates=2, alignment=alignment)
    assert np.array_equal(evaluation.tokens, np.bincount(owners[:, first:-1].ravel(), minlength=data.documents))
    np.testing.assert_allclose(evaluation.nats, nats, rtol=1e-5)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_uniform_model_scores_log_v(ranks, prefix, name, alignment):
    model = sharded_model(ranks)
    torch.nn.init.zeros_(model.models[0].lm_weight().to_local())
    summary = run(model, name, validation_set(prefix), alignment=alignment, batch_size=5).summary()
    assert summary["loss"] == pytest.approx(np.log(VOCABULARY.size), rel=1e-6)
    assert (summary["mc_se"] or 0) < 1e-6


# the same every time


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_size_changes_nothing_and_repetition_less(ranks, prefix, name):
    data, model = validation_set(prefix), sharded_model(ranks)
    windows = len(data.windows)
    expected = run(model, name, data)
    again = run(model, name, data)
    assert np.array_equal(expected.nats, again.nats) and np.array_equal(expected.tokens, again.tokens)
    for batch_size in (1, 3, windows, windows + 5):
        check_equal(expected, run(model, name, data, batch_size=batch_size))


def evaluations(ranks, prefix: str) -> dict[tuple, Evaluation]:
    data, model = validation_set(prefix), sharded_model(ranks)
    return {
        (name, alignment, batch_size): run(model, name, data, alignment=alignment, batch_size=batch_size)
        for name in OBJECTIVES
        for alignment in ALIGNMENTS
        for batch_size in (3, 64)  # 64: rank 0 gets all windows, and rank 1 only padding
    }


def test_two_processes_score_as_one(ranks, prefix):
    expected = evaluations(ranks, prefix)
    for evaluated in spawn(evaluations, 2, prefix):
        for key, evaluation in expected.items():
            check_equal(evaluation, evaluated[key])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_does_not_touch_training(ranks, prefix, name):
    data = validation_set(prefix)

    def losses(evaluated: bool) -> list[float]:
        model = sharded_model(ranks)
        optimizer = build_optimizer(model, OptimizerConfig())
        samples = TrainSamples(IndexedDataset(prefix), SEQ_LENGTH, seed=1)
        noise = build_input_noise(ObjectiveConfig(), VOCABULARY, 1)
        sizes = {"micro_batch_size": 4, "global_batch_size": 4, "rank": 0, "size": 1}
        feed = MicroBatches(samples, objective(name), noise, seed=1, first_sample=0, train_samples=20, **sizes)
        step_losses = []
        for step in range(feed.steps):
            reseed(1, step, ranks)
            if evaluated:
                before = torch.get_rng_state(), np.random.get_state()[1]
                run(model, name, data)
                assert torch.equal(before[0], torch.get_rng_state())
                assert np.array_equal(before[1], np.random.get_state()[1])
                assert model.models[0].training
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            result = train_step(model, optimizer, feed[step], learning_rate=0.01, weight_decay=0.1, clip_grad=1.0)
            step_losses.append(float(result.loss))
        return step_losses

    assert losses(evaluated=True) == losses(evaluated=False)


# the Monte-Carlo error


def reseeded(ranks, prefix: str, windows: int = 6) -> list[dict]:
    """Return the summaries of 200 evaluations of a few windows that differ in their seed."""
    data, model = validation_set(prefix, windows), sharded_model(ranks)
    return [run(model, "mdm", data, seed=seed, batch_size=windows).summary() for seed in range(200)]


def check_mc_se(summaries: list[dict]) -> None:
    """Check that the root mean square of mc_se is the spread of the losses, within 20%."""
    reported = np.sqrt(np.mean([summary["mc_se"] ** 2 for summary in summaries]))
    assert reported == pytest.approx(np.std([summary["loss"] for summary in summaries], ddof=1), rel=0.2)


def mean_over_orders(prefix: str, windows: int, orders: int) -> tuple[float, float]:
    """Return another estimate of the bound per token and its standard error, by the chain rule in random orders."""
    data, draw = validation_set(prefix, windows).windows, np.random.default_rng(0)
    totals = np.zeros((windows, orders))
    for window in range(windows):
        ids = data[window][0][:-1]
        for order in range(orders):
            positions = 1 + draw.permutation(SEQ_LENGTH - 1)  # token 0 is not masked
            tokens = np.repeat(ids[None], len(positions), axis=0)
            for step in range(len(positions)):
                tokens[step, positions[step:]] = VOCABULARY.mask_id
            nll = plain_nll(tokens, np.repeat(ids[None], len(positions), axis=0), causal=False)
            totals[window, order] = nll[np.arange(len(positions)), positions].mean()
    return totals.mean(), np.sqrt(totals.var(axis=1, ddof=1).mean() / totals.size)


def test_mc_se_is_the_spread_of_reseeded_evaluations_around_the_bound(ranks, prefix):
    summaries = reseeded(ranks, prefix)
    check_mc_se(summaries)
    losses = np.array([summary["loss"] for summary in summaries])
    bound, error = mean_over_orders(prefix, windows=6, orders=40)
    assert abs(losses.mean() - bound) < 4 * np.hypot(error, losses.std(ddof=1) / np.sqrt(len(losses)))
    assert losses.std() < 0.1 * bound  # otherwise the comparison would be weak


def test_replicates_that_share_their_masks_are_found(ranks, prefix, monkeypatch):
    """Their spread does not include the noise that they share."""

    def keyed(seed, purpose, *key):
        return stream(seed, purpose, *(key[1:] if "mask" in purpose else key))  # the replicate is left out

    monkeypatch.setattr("megatron.objectives.masked_diffusion.stream", keyed)
    with pytest.raises(AssertionError):
        check_mc_se(reseeded(ranks, prefix, windows=2))
