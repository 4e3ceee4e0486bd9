"""Validation: the stated tokens, the same every time, with honest errors."""

import bisect
import inspect
from functools import cache

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron.config.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives import build_input_noise, build_objective
from megatron.objectives.base import EvaluationNoise
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
    """Lines of the standard library, a document each, a byte a token: shorter and longer than a window."""
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for line in inspect.getsource(bisect).splitlines()[:20]:
            writer.add_document([*line.encode(), 256])
    return prefix


@pytest.fixture(scope="module")
def processes():
    with joined() as processes:
        yield processes


def validation_set(prefix: str, limit: int | None = None) -> ValidationSet:
    dataset = IndexedDataset(prefix, VOCABULARY.size)
    token_bytes = np.array([1] * 256 + [0])
    return ValidationSet("text", ValidationWindows(dataset, SEQ_LENGTH, limit), len(dataset), token_bytes)


@cache
def plain_model() -> Transformer:
    model = Transformer(CONFIG, VOCABULARY)
    initialise(model, CONFIG, seed=3)
    return model.eval()


def sharded_model(processes) -> Engine:
    return build_engine(CONFIG, VOCABULARY, 3, processes, ParallelConfig(), bf16=False, compile=False)


def objective(name: str):
    return build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)


def run(model, name, data, *, seed=1, replicates=4, batch_size=4, alignment="common") -> Evaluation:
    settings = {"seed": seed, "replicates": replicates, "batch_size": batch_size, "alignment": alignment}
    (evaluation,) = evaluate(model, objective(name), data, **settings)
    return evaluation


def check_equal(one: Evaluation, other: Evaluation) -> None:
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.bytes, other.bytes)
    np.testing.assert_allclose(other.nats, one.nats, rtol=1e-6)
    for figure, value in one.summary().items():
        assert other.summary()[figure] == (value if value is None else pytest.approx(value, rel=1e-6))


# the figures of a summary


def simulated(documents=7, replicates=5, seed=0) -> Evaluation:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 50, documents).astype(float)
    tokens[2] = 0  # a document that no window saw
    nats = tokens * draw.gamma(4, 1, (replicates, documents))
    return Evaluation(nats, tokens, 3 * tokens)


def test_summary_against_brute_force():
    evaluation = simulated()
    replicates, documents = evaluation.nats.shape
    total = sum(evaluation.tokens)
    losses = [sum(evaluation.nats[r]) / total for r in range(replicates)]
    loss = sum(losses) / replicates
    spread = sum((found - loss) ** 2 for found in losses) / (replicates - 1)
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
    """Check that loss +- 1.96 standard errors holds the population's loss in about 95% of simulated sets.

    Documents have a difficulty of their own, and long ones are easier, so the loss is no plain mean; every
    replicate adds noise of its own to every document.
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


def test_an_error_that_takes_tokens_for_independent_is_found():
    with pytest.raises(AssertionError):
        check_coverage(lambda evaluation: 1 / np.sqrt(evaluation.tokens.sum()))


# what is scored


@torch.no_grad()
def plain_nll(tokens: np.ndarray, targets: np.ndarray, causal: bool) -> np.ndarray:
    """Return the nll [B, S] of `targets` at every position of `tokens`, by log-softmax."""
    logits = plain_model().logits(torch.from_numpy(tokens), causal).double()
    return -torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets)[..., None])[..., 0].numpy()


@pytest.mark.parametrize("alignment, last", [("common", SEQ_LENGTH - 1), ("published", SEQ_LENGTH)])
def test_ar_is_the_cross_entropy_of_the_scored_tokens_by_document(processes, prefix, alignment, last):
    data = validation_set(prefix)
    nats, tokens, text = (np.zeros(data.documents) for _ in range(3))
    for window in range(len(data.windows)):
        ids, owners = data.windows[window]
        nll = plain_nll(ids[None, :-1], ids[None, 1:], causal=True)[0]
        for place in range(1, last + 1):  # of the target in the window
            nats[owners[place]] += nll[place - 1]
            tokens[owners[place]] += 1
            text[owners[place]] += ids[place] < 256
    found = run(sharded_model(processes), "ar", data, alignment=alignment)
    assert np.array_equal(found.tokens, tokens) and np.array_equal(found.bytes, text)
    np.testing.assert_allclose(found.nats, nats[None], rtol=1e-5)
    assert found.summary()["loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-6)


@pytest.mark.parametrize("alignment, first", [("common", 1), ("published", 0)])
def test_mdm_gives_each_document_its_own_hidden_tokens(processes, prefix, alignment, first):
    data = validation_set(prefix)
    windows = np.arange(len(data.windows))
    ids, owners = (np.stack(part) for part in zip(*(data.windows[int(window)] for window in windows)))
    nats = np.zeros((2, data.documents))
    for replicate in range(2):
        batch = objective("mdm").evaluation(ids, EvaluationNoise(1, "text", replicate), windows, alignment)
        nll = plain_nll(batch.tokens.numpy(), ids[:, :-1], causal=False)
        for window in windows:
            hidden = np.flatnonzero(batch.tokens[window] == VOCABULARY.mask_id)
            assert hidden.min() >= first
            for place in hidden:
                nats[replicate, owners[window, place]] += nll[window, place] * (SEQ_LENGTH - first) / len(hidden)
    found = run(sharded_model(processes), "mdm", data, replicates=2, alignment=alignment)
    assert np.array_equal(found.tokens, np.bincount(owners[:, first:-1].ravel(), minlength=data.documents))
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_uniform_model_scores_log_v(processes, prefix, name, alignment):
    model = sharded_model(processes)
    torch.nn.init.zeros_(model.models[0].lm_weight().to_local())
    summary = run(model, name, validation_set(prefix), alignment=alignment, batch_size=5).summary()
    assert summary["loss"] == pytest.approx(np.log(VOCABULARY.size), rel=1e-6)
    assert (summary["mc_se"] or 0) < 1e-6


# the same every time


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_size_changes_nothing_and_repetition_less(processes, prefix, name):
    data, model = validation_set(prefix), sharded_model(processes)
    windows = len(data.windows)
    expected = run(model, name, data)
    again = run(model, name, data)
    assert np.array_equal(expected.nats, again.nats) and np.array_equal(expected.tokens, again.tokens)
    for batch_size in (1, 3, windows, windows + 5):
        check_equal(expected, run(model, name, data, batch_size=batch_size))


def evaluations(processes, prefix: str) -> dict[tuple, Evaluation]:
    data, model = validation_set(prefix), sharded_model(processes)
    return {
        (name, alignment, batch_size): run(model, name, data, alignment=alignment, batch_size=batch_size)
        for name in OBJECTIVES
        for alignment in ALIGNMENTS
        for batch_size in (3, 64)  # 64: all windows are the first process's, and the second one has padding only
    }


def test_two_processes_score_as_one(processes, prefix):
    expected = evaluations(processes, prefix)
    for found in spawn(evaluations, 2, prefix):
        for key, evaluation in expected.items():
            check_equal(evaluation, found[key])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_does_not_touch_training(processes, prefix, name):
    data = validation_set(prefix)

    def losses(evaluated: bool) -> list[float]:
        model = sharded_model(processes)
        optimizer = build_optimizer(model, OptimizerConfig())
        samples = TrainSamples(IndexedDataset(prefix), SEQ_LENGTH, seed=1)
        noise = build_input_noise(ObjectiveConfig(), VOCABULARY, 1)
        feed = MicroBatches(samples, objective(name), noise, 1, 0, 20, 4, 4, 0, 1)
        found = []
        for step in range(feed.steps):
            reseed(1, step, processes)
            if evaluated:
                before = torch.get_rng_state(), np.random.get_state()[1]
                run(model, name, data)
                assert torch.equal(before[0], torch.get_rng_state())
                assert np.array_equal(before[1], np.random.get_state()[1])
                assert model.models[0].training
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            result = train_step(model, optimizer, feed[step], learning_rate=0.01, weight_decay=0.1, clip_grad=1.0)
            found.append(float(result.loss))
        return found

    assert losses(evaluated=True) == losses(evaluated=False)


# the Monte-Carlo error


def reseeded(processes, prefix: str, windows: int = 6) -> list[dict]:
    """Return the summaries of 200 evaluations of a few windows that differ in their seed."""
    data, model = validation_set(prefix, windows), sharded_model(processes)
    return [run(model, "mdm", data, seed=seed, batch_size=windows).summary() for seed in range(200)]


def check_mc_se(summaries: list[dict]) -> None:
    """Check that the root mean square of mc_se is the spread of the losses, within 20%."""
    reported = np.sqrt(np.mean([summary["mc_se"] ** 2 for summary in summaries]))
    assert reported == pytest.approx(np.std([summary["loss"] for summary in summaries], ddof=1), rel=0.2)


def mean_over_orders(prefix: str, windows: int, orders: int) -> tuple[float, float]:
    """Return another estimate of the bound per token and its standard error: chain rules along random orders."""
    data, draw = validation_set(prefix, windows).windows, np.random.default_rng(0)
    totals = np.zeros((windows, orders))
    for window in range(windows):
        ids = data[window][0][:-1]
        for order in range(orders):
            places = 1 + draw.permutation(SEQ_LENGTH - 1)  # token 0 is given
            tokens = np.repeat(ids[None], len(places), axis=0)
            for step in range(len(places)):
                tokens[step, places[step:]] = VOCABULARY.mask_id
            nll = plain_nll(tokens, np.repeat(ids[None], len(places), axis=0), causal=False)
            totals[window, order] = nll[np.arange(len(places)), places].mean()
    return totals.mean(), np.sqrt(totals.var(axis=1, ddof=1).mean() / totals.size)


def test_mc_se_is_the_spread_of_reseeded_evaluations_around_the_bound(processes, prefix):
    summaries = reseeded(processes, prefix)
    check_mc_se(summaries)
    losses = np.array([summary["loss"] for summary in summaries])
    bound, error = mean_over_orders(prefix, windows=6, orders=40)
    assert abs(losses.mean() - bound) < 4 * np.hypot(error, losses.std(ddof=1) / np.sqrt(len(losses)))
    assert losses.std() < 0.1 * bound  # or the comparison would say little


def test_replicates_that_share_their_masks_are_found(processes, prefix, monkeypatch):
    """Their spread knows nothing of the noise they have in common."""

    def keyed(seed, purpose, *key):
        return stream(seed, purpose, *(key[1:] if "mask" in purpose else key))  # the replicate is left out

    monkeypatch.setattr("megatron.objectives.masked_diffusion.stream", keyed)
    with pytest.raises(AssertionError):
        check_mc_se(reseeded(processes, prefix, windows=2))
