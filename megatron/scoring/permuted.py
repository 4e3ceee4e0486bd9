"""Continuations scored by a model that predicts tokens in any order and is given the position of each target.

One causal pass over the context and the continuation in an order gives the exact likelihood in that order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.model.transformer import Transformer
from megatron.scoring.batched_forward import Limits, Prediction, batches, pad, predict, select, split
from megatron.scoring.causal import Finished, Pair
from megatron.scoring.chains import chain_order, has_all_orders, mixture, random_orders
from megatron.scoring.requests import Score, Scoring


@dataclass(frozen=True)
class _Sequence:
    """A context, and the continuation in an order; without the last token, which is no input."""

    tokens: np.ndarray  # [T] ids
    position_ids: np.ndarray  # [T + 1], in the order of prediction
    targets: np.ndarray  # [n] ids, in the order of prediction


def score_permuted(
    model: Transformer,
    pairs: Sequence[Pair],
    keys: Sequence[str],
    limits: Limits,
    *,
    scoring: Scoring,
    finished: Finished,
) -> None:
    """Call `finished(index, score)` with the score of every pair; `keys` are those of their random orders.

    chain: exact in one order, and greedy where each token is the most probable one. iwae and bound: of the mean
    probability and of the mean NLL over random orders, whose number is `num_orders` or `num_mc`, or over all orders
    where there are no more; greedy is from left to right.
    """
    sequences: list[_Sequence] = []
    counts: list[int] = []  # of each pair
    for pair, key in zip(pairs, keys, strict=True):
        orders = _orders(scoring, len(pair.continuation), key)
        sequences += [_sequence(pair, order) for order in orders]
        counts.append(len(orders))
    predictions = iter(_predict(model, sequences, limits))
    for index, (pair, number) in enumerate(zip(pairs, counts, strict=True)):
        finished(index, _score(scoring, len(pair.continuation), [next(predictions) for _ in range(number)]))


def _num_orders(scoring: Scoring) -> int:
    return scoring.num_mc if scoring.likelihood == "bound" else scoring.num_orders


def _orders(scoring: Scoring, size: int, key: str) -> list[np.ndarray]:
    """Return the orders of a continuation: that of the chain, or random ones, the order that decides greedy first."""
    first = chain_order(scoring, size, key)  # from left to right unless --chain-order is given
    if scoring.likelihood == "chain":
        return [first]
    orders = random_orders(size, _num_orders(scoring), key, scoring.eval_seed)
    return orders if scoring.only_mc_nll else [first, *orders]


def _score(scoring: Scoring, size: int, predictions: list[tuple[Prediction, bool]]) -> Score:
    """Return the score of a continuation of `size` tokens from its (prediction, is greedy) in each of `_orders`."""
    forward_tokens = round(sum(prediction.forward_tokens for prediction, _ in predictions))
    greedy = None if scoring.only_mc_nll else predictions[0][1]
    nats = [float(prediction.nll.sum()) for prediction, _ in predictions]
    if scoring.likelihood == "chain":
        return Score(-nats[0], greedy, samples=1, forward_tokens=forward_tokens)
    nats = nats if scoring.only_mc_nll else nats[1:]
    all_orders = has_all_orders(size, _num_orders(scoring))
    value, error = mixture(nats, all_orders)
    if scoring.likelihood == "bound":
        value, error = np.mean(nats), 0.0 if all_orders else np.std(nats, ddof=1) / np.sqrt(len(nats))
    return Score(
        -float(value),
        greedy,
        standard_error=float(error),
        samples=len(nats),
        forward_tokens=forward_tokens,
        upper_bound=size > 1 and not (scoring.likelihood == "iwae" and all_orders),
    )


def _sequence(pair: Pair, order: np.ndarray) -> _Sequence:
    """Return a context from left to right, then the continuation in `order` [n]."""
    text = np.array([*pair.context, *pair.continuation], np.int64)
    position_ids = np.concatenate([np.arange(len(pair.context)), len(pair.context) + order])
    return _Sequence(text[position_ids[:-1]], position_ids, text[position_ids[len(pair.context) :]])


@torch.no_grad()
def _predict(model: Transformer, sequences: Sequence[_Sequence], limits: Limits) -> list[tuple[Prediction, bool]]:
    """Return the predictions of the targets of each sequence, and whether they are the most probable tokens."""
    device = model.embed_tokens.weight.device
    predictions: dict[int, tuple[Prediction, bool]] = {}
    for indices in batches([len(sequence.tokens) for sequence in sequences], limits):
        members = [sequences[index] for index in indices]
        inputs = ([member.tokens for member in members], [member.position_ids[:-1] for member in members])
        tokens, position_ids, target_positions = (
            torch.from_numpy(pad(arrays)).to(device)
            for arrays in (*inputs, [member.position_ids[1:] for member in members])
        )
        # padding comes after all tokens of a row, which do not attend to it
        batch = replace(Batch.unscored(tokens, True, position_ids), target_positions=target_positions)
        ends = [len(member.tokens) for member in members]
        positions = [np.arange(end - len(member.targets), end) for end, member in zip(ends, members)]
        targets = np.concatenate([member.targets for member in members])
        prediction = predict(model, select(model.hidden_states(batch), positions), targets)
        chunks = split(prediction, [len(member.targets) for member in members])
        for index, member, chunk in zip(indices, members, chunks, strict=True):
            counted = replace(chunk, forward_tokens=len(member.tokens))
            predictions[index] = (counted, bool((chunk.best == member.targets).all()))
    return [predictions[index] for index in range(len(sequences))]
