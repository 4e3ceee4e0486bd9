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
from megatron.objectives.mask_times import Bell, Uniform, Window
from megatron.objectives.registry import build_objective

VOCABULARY, SEQ_LENGTH, EPS = Vocabulary(5), 4, 0.05
WINDOW = {"mask_time_distribution": "window", "mask_time_low": 0.2, "mask_time_high": 0.6}
BELL = {"mask_time_distribution": "bell", "mask_time_center": 0.4, "mask_time_std": 0.15}
DISTRIBUTIONS = {"uniform": {}, "window": WINDOW, "bell": BELL}
UNWEIGHTED = {"mask_time_weighting": "none"}


def objective(name="mdm", vocabulary=VOCABULARY, time_block=8, **options):
    return build_objective(ObjectiveConfig(objective=name, mask_eps=EPS, **options), vocabulary, time_block)


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
            assert time == pytest.approx(reference.ppf(probability), rel=1e-9, abs=1e-12)


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
    """Return the expected training loss by quadrature over the uniform number that a time is made of."""
    sampling = tested.time_sampling

    def loss(probability: float) -> float:
        time = sampling.density.quantile(probability)
        mask_prob = np.array([[(1 - EPS) * time + EPS]])

        class AtTime(type(tested)):
            def _full_noise_time(self, sample_index, seed):
                return time

        at_time = AtTime(**vars(tested))
        return float(at_time._weights(mask_prob, np.array([0]), 1)[0, 0]) * loss_at(float(mask_prob[0, 0])) / SEQ_LENGTH

    jumps = [sampling.density.cumulative(time) for time in (0.2, 0.6)]
    return integrate.quad(loss, 0, 1, points=jumps, limit=200, epsabs=1e-9)[0]


@pytest.mark.parametrize("loss", ["bound", "simple"])
@pytest.mark.parametrize("name", ["window", "bell"])
def test_importance_weights_keep_the_expectation_of_uniform_times(loss_at, name, loss):
    expected = expected_loss(objective(mdm_loss=loss), loss_at)
    weighted = expected_loss(objective(mdm_loss=loss, **DISTRIBUTIONS[name]), loss_at)
    unweighted = expected_loss(objective(mdm_loss=loss, **DISTRIBUTIONS[name], **UNWEIGHTED), loss_at)
    assert weighted == pytest.approx(expected, rel=1e-6)
    assert abs(unweighted / expected - 1) > 1e-4  # another objective
