"""Log-likelihoods by next-token prediction, with a KV cache for contexts that several requests share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer
from megatron.scoring.batched_forward import Limits, Prediction, batches, pad, predict, select, split
from megatron.scoring.requests import Score


@dataclass(frozen=True)
class Pair:
    """Token ids of a context and of its continuation, at least one token each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


Pairs = Sequence[Pair]
Finished = Callable[[int, Score], None]


@torch.no_grad()
def score_causal(model: Transformer, pairs: Pairs, limits: Limits, finished: Finished) -> None:
    """Call `finished(index, score)` with the exact score of every pair.

    Pairs with the same context are scored from one forward pass over the context.
    """
    groups: dict[tuple, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.context, []).append(index)
    single = [indices[0] for indices in groups.values() if len(indices) == 1]
    shared = [indices for indices in groups.values() if len(indices) > 1]
    _score_single(model, pairs, single, limits, finished)
    _score_shared(model, pairs, shared, limits, finished)


def _score_single(model: Transformer, pairs: Pairs, indices: list[int], limits: Limits, finished: Finished) -> None:
    """Score the pairs at `indices`, whose contexts differ: one forward pass over context and continuation each."""
    sequences = [(*pairs[index].context, *pairs[index].continuation[:-1]) for index in indices]
    for rows in batches([len(sequence) for sequence in sequences], limits):
        tokens = _tensor(model, pad([sequences[row] for row in rows]))
        # padding comes after all tokens of a row, which do not attend to it
        hidden = model.hidden_states(Batch.unscored(tokens, causal=True))
        batch_pairs = [pairs[indices[row]] for row in rows]
        positions = [len(pair.context) - 1 + np.arange(len(pair.continuation)) for pair in batch_pairs]
        predictions = _predictions(model, hidden, positions, batch_pairs, slice(None))
        for row, pair, prediction in zip(rows, batch_pairs, predictions, strict=True):
            finished(indices[row], _score(pair, [prediction], len(sequences[row])))


def _score_shared(
    model: Transformer, pairs: Pairs, groups: list[list[int]], limits: Limits, finished: Finished
) -> None:
    """Score groups of pairs that share a context, which is processed once per group.

    1. The contexts of a batch go through the model and into a KV cache.
    2. Their last hidden states predict the first token of every continuation.
    3. The longer continuations go through the model with their context's part of the cache.
    """
    contexts = [pairs[indices[0]].context for indices in groups]
    for batch_groups in batches([len(context) for context in contexts], limits):
        tokens = pad([contexts[group] for group in batch_groups])  # [B, T]
        lengths = np.array([len(contexts[group]) for group in batch_groups])
        cache = KVCache()
        hidden = model.read(_tensor(model, tokens), cache)
        # the padding is in the cache: mask it for all later tokens
        cache.present = _tensor(model, np.arange(tokens.shape[1]) < lengths[:, None])
        owners = [(row, index) for row, group in enumerate(batch_groups) for index in groups[group]]
        rows = [row for row, _ in owners]
        batch_pairs = [pairs[index] for _, index in owners]
        last_positions = [lengths[row, None] - 1 for row in rows]
        firsts = _predictions(model, hidden[rows], last_positions, batch_pairs, slice(1))
        later = _predict_later_tokens(model, cache, tokens.shape[1], owners, pairs, limits)
        for number, ((row, index), first) in enumerate(zip(owners, firsts, strict=True)):
            predictions = [first, later[number]] if number in later else [first]
            forward_tokens = lengths[row] / len(groups[batch_groups[row]]) + len(pairs[index].continuation) - 1
            finished(index, _score(pairs[index], predictions, round(forward_tokens)))


def _predict_later_tokens(
    model: Transformer, cache: KVCache, width: int, owners: list[tuple[int, int]], pairs: Pairs, limits: Limits
) -> dict[int, Prediction]:
    """Return the predictions of all but the first token of the longer continuations, by index into `owners`.

    `owners` are (row of the cache, index of the pair); `width` is the length of the cache.
    """
    predictions = {}
    longer = [number for number, (_, index) in enumerate(owners) if len(pairs[index].continuation) > 1]
    inputs = [pairs[owners[number][1]].continuation[:-1] for number in longer]
    for rows in batches([width + len(tokens) for tokens in inputs], limits):
        tokens = pad([inputs[row] for row in rows])
        present = np.arange(tokens.shape[1]) < np.array([[len(inputs[row])] for row in rows])
        row_cache = cache.select(_tensor(model, np.array([owners[longer[row]][0] for row in rows])))
        hidden = model.read(_tensor(model, tokens), row_cache, _tensor(model, present))
        batch_pairs = [pairs[owners[longer[row]][1]] for row in rows]
        positions = [np.arange(len(inputs[row])) for row in rows]
        later = _predictions(model, hidden, positions, batch_pairs, slice(1, None))
        predictions |= {longer[row]: prediction for row, prediction in zip(rows, later, strict=True)}
    return predictions


def _predictions(
    model: Transformer, hidden: Tensor, positions: list[np.ndarray], pairs: list[Pair], tokens: slice
) -> list[Prediction]:
    """Return the predictions of some `tokens` of each continuation, at `positions` of its row of `hidden` [B, T, H]."""
    targets = np.array([token for pair in pairs for token in pair.continuation[tokens]], np.int64)
    prediction = predict(model, select(hidden, positions), targets)
    return split(prediction, [len(row_positions) for row_positions in positions])


def _score(pair: Pair, predictions: list[Prediction], forward_tokens: int) -> Score:
    nats = sum(float(prediction.nll.sum()) for prediction in predictions)
    best = np.concatenate([prediction.best for prediction in predictions])
    is_greedy = bool((best == np.array(pair.continuation)).all())
    return Score(-nats, is_greedy, samples=1, forward_tokens=forward_tokens)


def _tensor(model: Transformer, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(model.embed_tokens.weight.device)
