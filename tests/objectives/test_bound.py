"""The masked-diffusion bound against enumeration over all orders of a tiny model."""

from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.masked_diffusion import MaskedDiffusion

VOCABULARY, SEQ_LENGTH = Vocabulary(5), 5


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, init_method_std=0.6)
    made = Transformer(config, VOCABULARY)
    initialise(made, config, seed=3)
    return made.eval()


@pytest.fixture(scope="module")
def text():
    return np.array([[2, 0, 4, 1, 3, 0]])


@torch.no_grad()
def masked_nll(model, ids, hidden):
    """Return the nll of each hidden token of ids [S], all of them masked at once, by plain log-softmax."""
    tokens = torch.tensor(ids).clone()
    tokens[list(hidden)] = VOCABULARY.mask_id
    logits = model.logits(tokens[None], causal=False)[0].double()
    return -torch.log_softmax(logits, -1)[range(SEQ_LENGTH), ids]


@pytest.mark.parametrize("alignment, first", [("common", 1), ("published", 0)])
def test_bound_is_the_mean_negative_log_over_orders(model, text, alignment, first):
    ids, maskable = text[0, :-1], list(range(first, SEQ_LENGTH))
    nll = {s: masked_nll(model, ids, s) for k in range(1, len(maskable) + 1) for s in combinations(maskable, k)}
    orders = []
    for order in permutations(maskable):  # order[0] is revealed first
        orders.append(sum(float(nll[tuple(sorted(order[i:]))][order[i]]) for i in range(len(order))))
    orders = np.array(orders)
    assert len(orders) == factorial(len(maskable))
    exact, bound = -np.log(np.mean(np.exp(-orders))), orders.mean()
    assert bound > exact + 1e-4

    # the estimator's own expectation: k uniform, then a uniform subset of size k, weight n / k
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
