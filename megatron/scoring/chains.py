"""Continuations unmasked step by step: the exact likelihood of a policy, and the bound of several random orders.

A policy chooses the next tokens from the unmasked ones alone, so the probabilities of the tokens of a continuation,
each given those unmasked before it, multiply to a distribution over continuations of a length (DUEL, 2603.01367). It is
that of `tools/generate.py` at temperature 1 with the same order, tokens per step and blocks.

Orders that do not depend on predictions are known in advance, so that all their steps share batches. Other orders take
one forward pass a step, of all requests together.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice, permutations

import numpy as np
import torch

from megatron.config.policies import CERTAINTIES
from megatron.generation.policies import candidates, select_highest, step_sizes
from megatron.randomness import stream
from megatron.scoring.batched_forward import Prediction
from megatron.scoring.inputs import Inputs
from megatron.scoring.pending import PendingRequest
from megatron.scoring.requests import Scoring

CHAIN_SEQUENCES = 4096  # sequences that exist at one time


class ChainScorer:
    """Scores pending requests under the policy of `scoring`, or under `num_orders` random orders."""

    def __init__(self, inputs: Inputs, scoring: Scoring):
        self.inputs = inputs
        self.scoring = scoring

    def score_chains(self, requests: Sequence[PendingRequest]) -> None:
        """Set `exact` of each request, and `greedy`: whether each token is the most probable one in its step."""
        if self.scoring.chain_order in CERTAINTIES:
            nats, greedy = self._follow_predictions(requests)
        else:
            orders = [[chain_order(self.scoring, request.size, request.key)] for request in requests]
            order_nats, greedy = self._follow_orders(requests, orders)
            nats = [values[0] for values in order_nats]
        for request, request_nats, request_greedy in zip(requests, nats, greedy, strict=True):
            request.exact = request_nats
            request.greedy = None if self.scoring.only_mc_nll else request_greedy

    def score_mixtures(self, requests: Sequence[PendingRequest]) -> None:
        """Set `exact` of each request to -log of the mean probability over random orders, and `error` to its error."""
        number, seed = self.scoring.num_orders, self.scoring.eval_seed
        orders = [random_orders(request.size, number, request.key, seed) for request in requests]
        nats, _ = self._follow_orders(requests, orders)
        for request, order_nats in zip(requests, nats, strict=True):
            request.exact, request.error = mixture(order_nats, has_all_orders(request.size, number))

    def _follow_orders(
        self, requests: Sequence[PendingRequest], orders: list[list[np.ndarray]]
    ) -> tuple[list[list[float]], list[bool]]:
        """Return the nats of each request in each of its orders, and which requests are greedy in all of them."""
        nats = [[0.0] * len(request_orders) for request_orders in orders]
        greedy = [True] * len(requests)
        steps = self._steps(requests, orders)
        while chunk := list(islice(steps, CHAIN_SEQUENCES)):
            predictions = self.inputs.predict([sequence for *_, sequence in chunk])
            for (number, index, sequence), prediction in zip(chunk, predictions, strict=True):
                nats[number][index] += float(prediction.nll.sum())
                greedy[number] &= bool((prediction.best == sequence.targets).all())
                count(requests[number], prediction)
        return nats, greedy

    def _steps(self, requests: Sequence[PendingRequest], orders: list[list[np.ndarray]]) -> Iterator[tuple]:
        """Yield (index of the request, of the order, sequence) for each step."""
        for number, (request, request_orders) in enumerate(zip(requests, orders, strict=True)):
            sizes = self._step_sizes(request)
            for index, order in enumerate(request_orders):
                turns = np.argsort(order)  # [n], when each token is predicted
                for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes):
                    targets = order[start : start + size]
                    yield number, index, self.inputs.sequence(request, turns >= start, targets)

    def _follow_predictions(self, requests: Sequence[PendingRequest]) -> tuple[list[float], list[bool]]:
        """Return the nats of each request in the order of its predictions, and which requests are greedy."""
        masks = [np.ones(request.size, bool) for request in requests]
        sizes = [self._step_sizes(request) for request in requests]
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        for step in range(max(map(len, sizes), default=0)):
            active = [number for number in range(len(requests)) if step < len(sizes[number])]
            choices = [self._candidates(masks[number], sizes[number][step]) for number in active]
            sequences = [
                self.inputs.sequence(requests[number], masks[number], reached.nonzero()[0])
                for number, (reached, _) in zip(active, choices, strict=True)
            ]
            predictions = self.inputs.predict(sequences, self.scoring.chain_order)
            for number, (reached, finished), sequence, prediction in zip(
                active, choices, sequences, predictions, strict=True
            ):
                scores = np.where(finished, np.inf, -np.inf)
                scores[reached & ~finished] = prediction.confidence[~finished[reached]]
                selected = select_highest(torch.from_numpy(scores)[None], torch.tensor([sizes[number][step]]))[
                    0
                ].numpy()
                predicted = selected[reached]  # of the predictions
                nats[number] += float(prediction.nll[predicted].sum())
                greedy[number] &= bool((prediction.best == sequence.targets)[predicted].all())
                masks[number] &= ~selected
                count(requests[number], prediction)
        return nats, greedy

    def _step_sizes(self, request: PendingRequest) -> list[int]:
        return step_sizes(request.size, self.scoring.tokens_per_step, self.inputs.schedule_length(request))

    def _candidates(self, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which tokens a step may unmask, and which it does in any case; both [n]."""
        blocks = torch.from_numpy(_blocks(self.scoring, len(mask)))
        reached, finished = candidates(torch.from_numpy(mask)[None], torch.tensor([size]), blocks)
        return reached[0].numpy(), finished[0].numpy()


def count(request: PendingRequest, prediction: Prediction, samples: int = 1) -> None:
    """Add the cost of a prediction to a request, and `samples` sequences that were evaluated for its likelihood."""
    request.samples += samples
    request.forward_tokens += prediction.forward_tokens


def chain_order(scoring: Scoring, size: int, key: str) -> np.ndarray:
    """Return the order of the tokens of a continuation, [n], where it does not depend on predictions."""
    turns = np.arange(size)
    if scoring.chain_order == "random":
        turns = np.argsort(np.argsort(stream(scoring.eval_seed, f"order {key}").random(size)))
    elif scoring.chain_order == "right-to-left":
        turns = -turns
    return np.lexsort((turns, _blocks(scoring, size)))


def has_all_orders(size: int, number: int) -> bool:
    """Return whether `random_orders` are all orders of `size` tokens."""
    return math.factorial(min(size, 20)) <= number


def random_orders(size: int, number: int, key: str, seed: int) -> list[np.ndarray]:
    """Return a `number` of random orders of `size` tokens, or all orders where there are no more.

    They are the same for the choices of a document, which share the `key`, that have one length.
    """
    if has_all_orders(size, number):
        return [np.array(order) for order in permutations(range(size))]
    return [np.argsort(stream(seed, f"orders {key}", index).random(size)) for index in range(number)]


def mixture(nats: Sequence[float], exact: bool) -> tuple[float, float]:
    """Return -log of the mean of exp(-nats) over K orders, in nats, and its standard error by the delta method.

    In expectation it lies above -log of the mean over all orders, by about half of the squared error
    (importance weighted bounds, 1509.00519). It is `exact` where the K orders are all orders.
    """
    lowest = min(nats)
    probabilities = np.exp(lowest - np.array(nats))
    mean = probabilities.mean()
    error = 0.0 if exact else probabilities.std(ddof=1) / mean / np.sqrt(len(nats))
    return float(lowest - np.log(mean)), float(error)


def _blocks(scoring: Scoring, size: int) -> np.ndarray:
    return np.arange(size) // (scoring.block_length or size)
