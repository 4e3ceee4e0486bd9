"""Densities of diffusion times against scipy, and the loss under each against enumeration and the plain formula."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from megatron.config.sections import ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.mask_times import Bell, Uniform, Window
from megatron.objectives.registry import build_objective

VOCABULARY, SEQ_LENGTH, EPS = Vocabulary(5), 4, 0.05
WINDOW = {"mask_time_distribution": "window", "mask_time_low": 0.2, "mask_time_high": 0.6}
BELL = {"mask_time_distribution": "bell", "mask_time_center": 0.4, "mask_time_std": 0.15}
DISTRIBUTIONS = {"uniform": {}, "window": WINDOW, "bell": BELL}
UNWEIGHTED = {"mask_time_weighting": "none"}


def objective(name="mdm", time_block=8, **options):
    eps = {} if name in ("ar", "any-order") else {"mask_eps": EPS}
    return build_objective(ObjectiveConfig(objective=name, **eps, **options), VOCABULARY, time_block)


def normal(center: float, std: float):
    return stats.truncnorm(-center / std, (1 - center) / std, loc=center, scale=std)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(
    "density, reference",
    [
        (lambda share: Window(0.2, 0.6, share), stats.uniform(0.2, 0.4)),
        (lambda share: Window(0.0, 1.0, share), stats.uniform()),
        (lambda share: Bell(0.5, 0.2, share), normal(0.5, 0.2)),
        (lambda share: Bell(0.0, 0.05, share), normal(0.0, 0.05)),
        (lambda share: Bell(0.9, 3.0, share), normal(0.9, 3.0)),
    ],
)
def test_densities_and_quantiles_are_those_of_scipy(density, reference, share):
    tested = density(share)
    for time in np.linspace(0.01, 0.99, 23):
        assert tested.density(time) == pytest.approx(share + (1 - share) * reference.pdf(time), rel=1e-9)
        assert tested.cumulative(time) == pytest.approx(share * time + (1 - share) * reference.cdf(time), rel=1e-9)
    assert tested.mean == pytest.approx(share / 2 + (1 - share) * reference.mean(), rel=1e-9)
    for probability in (0.0, 1e-6, 0.03, 0.5, 0.97, 1 - 1e-9):
        time = tested.quantile(probability)
        assert 0 <= time <= 1 and tested.cumulative(time) == pytest.approx(probability, abs=1e-12)
        if share == 0:
            assert time == pytest.approx(reference.ppf(probability), abs=1e-8)


def test_uniform_times_are_the_probabilities_themselves():
    for probability in (0.0, 0.1, 1 / 3, 1 - 2**-53):
        assert Uniform().quantile(probability) == probability == Uniform().cumulative(probability)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, init_method_std=0.6)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def loss_at(model):
    """Return the function of a mask probability that sums over all masks: probability of the mask times its nll."""
    ids = torch.tensor([2, 0, 4, 1])
    masks = torch.tensor(list(product((False, True), repeat=SEQ_LENGTH)))
    with torch.no_grad():
        logits = model.logits(torch.where(masks, VOCABULARY.mask_id, ids), causal=False).double()
    nll = -torch.log_softmax(logits, -1)[:, range(SEQ_LENGTH), ids]
    sums, counts = (nll * masks).sum(1).numpy(), masks.sum(1).numpy()
    return lambda p: float((p**counts * (1 - p) ** (SEQ_LENGTH - counts) * sums).sum())


def expected_loss(tested, loss_at) -> float:
    """Return the expected training loss of one token, by quadrature over the quantiles of times."""
    density = tested.time_sampling.density

    def loss(probability: float) -> float:
        time = density.quantile(probability)
        (weight,) = tested._weights([time])
        return float(weight) * loss_at((1 - EPS) * time + EPS) / SEQ_LENGTH

    jumps = [density.cumulative(time) for time in (0.2, 0.6)]
    return integrate.quad(loss, 0, 1, points=jumps, limit=200, epsabs=1e-9)[0]


# one block of the whole sequence is masked diffusion, and takes the times themselves
@pytest.mark.parametrize("loss", ["bound", "simple"])
@pytest.mark.parametrize("name", ["window", "bell"])
def test_importance_weights_keep_the_expectation_of_uniform_times(loss_at, name, loss):
    uniform, weighted, unweighted = (
        expected_loss(objective("block-diffusion", mdm_loss=loss, **options), loss_at)
        for options in ({}, DISTRIBUTIONS[name], DISTRIBUTIONS[name] | UNWEIGHTED)
    )
    assert weighted == pytest.approx(uniform, rel=1e-6)
    assert abs(unweighted / uniform - 1) > 1e-4  # another objective


@pytest.mark.parametrize("options", [{}, {"low_noise_samples": 10**6, "low_noise_ratio": 0.6}], ids=["", "low-noise"])
@pytest.mark.parametrize("times", ["stratified", "iid"])
@pytest.mark.parametrize("name", ["window", "bell"])
def test_the_mean_loss_of_training_batches_is_that_of_uniform_times(loss_at, model, name, times, options):
    ids, count = np.array([[2, 0, 4, 1, 3]]), 1024
    options = options | {"mask_times": times, "time_block": 1024}

    def losses(**distribution) -> np.ndarray:
        batch = objective(**options, **distribution).prepare(ids.repeat(count, 0), np.arange(count), seed=1)
        with torch.no_grad():
            return (model(batch, per_position=True) * batch.weights).sum(1).double().numpy() / SEQ_LENGTH

    scale = options.get("low_noise_ratio", 1.0)
    exact = integrate.quad(lambda t: loss_at((1 - EPS) * scale * t + EPS) / ((1 - EPS) * scale * t + EPS), 0, 1)[0]
    for distribution in ({}, DISTRIBUTIONS[name]):
        values = losses(**distribution)
        assert abs(values.mean() - exact / SEQ_LENGTH) < 4 * values.std() / count**0.5


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_consecutive_samples_have_times_in_every_part_of_the_density(name):
    """Each of 32 parts of equal probability has two of the 64 times of a block."""
    tested = objective(time_block=64, **DISTRIBUTIONS[name])
    edges = [tested.time_sampling.density.quantile(part / 32) for part in range(1, 32)]
    for start in (0, 64, 640):
        times = [tested.time(index, 3) for index in range(start, start + 64)]
        assert np.bincount(np.searchsorted(edges, times), minlength=32).tolist() == [2] * 32
    iid = objective(time_block=64, mask_times="iid", **DISTRIBUTIONS[name])
    drawn = [iid.time(index, 3) for index in range(2000)]
    assert stats.kstest(drawn, np.vectorize(iid.time_sampling.density.cumulative)).pvalue > 0.01


@pytest.mark.parametrize("distribution", [{}, WINDOW, BELL | UNWEIGHTED], ids=["uniform", "window", "bell-unweighted"])
def test_the_simple_loss_is_a_multiple_of_the_unweighted_cross_entropy(model, distribution):
    ids, count = np.random.default_rng(0).integers(0, VOCABULARY.size, (64, SEQ_LENGTH + 1)), 64
    tested = objective(mdm_loss="simple", time_block=64, **distribution)
    batch = tested.prepare(ids, np.arange(count), seed=1)
    masked = batch.tokens == VOCABULARY.mask_id
    assert torch.equal(batch.tokens, objective(time_block=64, **distribution).prepare(ids, np.arange(count), 1).tokens)
    with torch.no_grad():
        logits = model.logits(batch.tokens, causal=False).double()
        loss = float((model(batch, per_position=True) * batch.weights).sum()) / batch.count
    nll = torch.nn.functional.cross_entropy(logits.mT, batch.targets, reduction="none") * masked
    density = tested.time_sampling.density
    importance = np.ones(count)
    if tested.time_sampling.importance:
        importance = np.array([1 / density.density(tested.time(index, 1)) for index in range(count)])
    mean = integrate.quad(lambda t: t * density.density(t), 0, 1, points=(0.2, 0.6))[0]
    mean_mask_prob = (1 - EPS) * (0.5 if tested.time_sampling.importance else mean) + EPS
    expected = float((nll.sum(1).numpy() * importance).sum()) / mean_mask_prob / (count * SEQ_LENGTH)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"mdm_loss": "simple"}, WINDOW, BELL, WINDOW | UNWEIGHTED], ids=str)
@pytest.mark.parametrize("name", ["mdm", "dual", "block-diffusion"])
def test_the_summed_weights_are_the_count_on_average(name, options):
    text = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, SEQ_LENGTH + 1))
    settings = {"diffusion_block_size": 2} if name == "block-diffusion" else {}
    tested = objective(name, **settings, **options)
    batches = [tested.prepare(text, np.arange(start, start + 4), seed=3) for start in range(4, 4000, 8)]
    shares = torch.cat([batch.weights.sum(1) / torch.from_numpy(batch.counts) for batch in batches])
    assert abs(shares.mean() - 1) < 4 * shares.std() / len(shares) ** 0.5 < 0.3


@pytest.mark.parametrize("name", ["mdm", "dual", "block-diffusion"])
def test_times_and_weights_do_not_act_in_evaluation(name):
    text = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, SEQ_LENGTH + 1))
    batches = [
        likelihood.evaluation(text, EvaluationNoise(1, "v", 0), np.arange(4), "common")
        for options in ({}, WINDOW | {"mdm_loss": "simple"})
        for likelihood in objective(name, **options).likelihoods
    ]
    half = len(batches) // 2
    for plain, batch in zip(batches[:half], batches[half:], strict=True):
        assert torch.equal(plain.tokens, batch.tokens) and torch.equal(plain.weights, batch.weights)


def test_a_pure_window_is_the_published_one():
    tested = objective(**WINDOW, **UNWEIGHTED)
    assert tested.time_sampling.density == Window(0.2, 0.6, 0.0)
    assert all(0.2 <= tested.time(index, 1) <= 0.6 for index in range(200))
    assert objective(**WINDOW).time_sampling.density.uniform_share == 0.1


@pytest.mark.parametrize("name", ["ar", "any-order"])
def test_an_objective_without_masks_refuses_times(name):
    with pytest.raises(ConfigurationError, match="--mdm-loss simple: acts in masked diffusion only"):
        objective(name, mdm_loss="simple")
