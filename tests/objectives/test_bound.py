"""The masked-diffusion bound of a tiny model against enumeration over all orders."""

from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.masked_diffusion import MaskedDiffusion

VOCABULARY, SEQ_LENGTH = Vocabulary(5), 5


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, init_method_std=0.6)
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def text():
    return np.array([[2, 0, 4, 1, 3, 0]])


@torch.no_grad()
def masked_nll(model, ids, masked):
    """Return the nll of each token of ids [S] where the positions `masked` are masked, by log-softmax."""
    tokens = torch.tensor(ids).clone()
    tokens[list(masked)] = VOCABULARY.mask_id
    logits = model.logits(tokens[None], causal=False)[0].double()
    return -torch.log_softmax(logits, -1)[range(SEQ_LENGTH), ids]


@pytest.mark.parametrize("alignment, first", [("common", 1), ("published", 0)])
def test_bound_is_the_mean_negative_log_over_orders(model, text, alignment, first):
    ids, maskable = text[0, :-1], list(range(first, SEQ_LENGTH))
    nll = {s: masked_nll(model, ids, s) for k in range(1, len(maskable) + 1) for s in combinations(maskable, k)}
    order_nll = []
    for order in permutations(maskable):  # order[0] is unmasked first
        order_nll.append(sum(float(nll[tuple(sorted(order[i:]))][order[i]]) for i in range(len(order))))
    order_nll = np.array(order_nll)
    assert len(order_nll) == factorial(len(maskable))
    exact = -np.log(np.mean(np.exp(-order_nll)))
    bound = order_nll.mean()
    assert bound > exact + 1e-4

    # expectation of the estimator: k uniform, then a uniform subset of size k, weight n / k
    n = len(maskable)
    expectation = np.mean(
        [
            np.mean([n / k * sum(float(nll[s][i]) for i in s) for s in combinations(maskable, k)])
            for k in range(1, n + 1)
        ]
    )
    assert abs(expectation - bound) < 1e-6

    objective = MaskedDiffusion(VOCABULARY.mask_id, time_block=4)
    draws = []
    for replicate in range(60):
        windows = np.arange(16)
        batch = objective.evaluation(text.repeat(16, axis=0), EvaluationNoise(0, "v", replicate), windows, alignment)
        with torch.no_grad():
            draws.append(float((model(batch, per_position=True) * batch.weights).sum()) / 16)
    assert abs(np.mean(draws) - bound) < 4 * np.std(draws) / np.sqrt(len(draws))


def test_a_uniform_model_scores_log_v(text):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = Transformer(config, VOCABULARY)
    torch.nn.init.zeros_(model.lm_weight())
    objective = MaskedDiffusion(VOCABULARY.mask_id, time_block=4)
    batch: Batch = objective.evaluation(text, EvaluationNoise(0, "v", 0), np.arange(1), "common")
    loss = float((model(batch, per_position=True) * batch.weights).sum()) / (SEQ_LENGTH - 1)
    assert abs(loss - np.log(VOCABULARY.size)) < 1e-5
