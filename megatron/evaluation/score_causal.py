"""Likelihoods of continuations under next-token prediction: a context is read once for all of its answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron.batch import Batch
from megatron.evaluation.batched_forward import Limits, Prediction, answers, batches, fill_up, select, split
from megatron.evaluation.requests import Score
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of what follows it, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@torch.no_grad()
def score_causal(
    model: Transformer, pairs: Sequence[Pair], limits: Limits, finished: Callable[[int, Score], None]
) -> None:
    """Tell `finished` the exact score of each pair, by its index; those of one context one after another."""
    groups: dict[tuple, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.context, []).append(index)
    alone = [indices[0] for indices in groups.values() if len(indices) == 1]
    shared = [indices for indices in groups.values() if len(indices) > 1]
    _score_alone(model, pairs, alone, limits, finished)
    _score_shared(model, pairs, shared, limits, finished)


def _score_alone(model, pairs, indices, limits, finished) -> None:
    """Score answers that share their context with no other: one read each."""
    texts = [(*pairs[index].context, *pairs[index].continuation[:-1]) for index in indices]
    for chosen in batches([len(text) for text in texts], limits):
        tokens = _tensor(model, fill_up([texts[row] for row in chosen]))
        # what fills a row up stands behind all its tokens, which do not see it
        hidden = model.hidden_states(Batch.unscored(tokens, causal=True))
        asked = [pairs[indices[row]] for row in chosen]
        places = [len(pair.context) - 1 + np.arange(len(pair.continuation)) for pair in asked]
        for row, pair, said in zip(chosen, asked, _said(model, hidden, places, asked, slice(None)), strict=True):
            finished(indices[row], _result(pair, [said], len(texts[row])))


def _score_shared(model, pairs, groups, limits, finished) -> None:
    contexts = [pairs[indices[0]].context for indices in groups]
    for chosen in batches([len(context) for context in contexts], limits):
        tokens = fill_up([contexts[row] for row in chosen])
        lengths = np.array([len(contexts[row]) for row in chosen])
        past = KVCache()
        hidden = model.read(_tensor(model, tokens), past)
        # what fills a row up was read behind all its tokens; what is read from here on must not see it
        past.present = _tensor(model, np.arange(tokens.shape[1]) < lengths[:, None])
        owners = [(row, index) for row, group in enumerate(chosen) for index in groups[group]]
        asked = [pairs[index] for _, index in owners]
        at_end = [lengths[row, None] - 1 for row, _ in owners]
        firsts = _said(model, hidden[[row for row, _ in owners]], at_end, asked, slice(1))
        later = _read_answers(model, past, tokens.shape[1], owners, pairs, limits)
        for place, ((row, index), first) in enumerate(zip(owners, firsts, strict=True)):
            said = [first, later[place]] if place in later else [first]
            read = lengths[row] / len(groups[chosen[row]]) + len(pairs[index].continuation) - 1
            finished(index, _result(pairs[index], said, round(read)))


def _read_answers(model, past, width, owners, pairs, limits) -> dict[int, Prediction]:
    """Return what is said of all but the first tokens of the longer answers, by their place in `owners`."""
    found, long = {}, [place for place, (_, index) in enumerate(owners) if len(pairs[index].continuation) > 1]
    texts = [pairs[owners[place][1]].continuation[:-1] for place in long]
    for chosen in batches([width + len(text) for text in texts], limits):
        tokens = fill_up([texts[row] for row in chosen])
        present = np.arange(tokens.shape[1]) < np.array([[len(texts[row])] for row in chosen])
        own = past.select(_tensor(model, np.array([owners[long[row]][0] for row in chosen])))
        hidden = model.read(_tensor(model, tokens), own, _tensor(model, present))
        asked = [pairs[owners[long[row]][1]] for row in chosen]
        places = [np.arange(len(texts[row])) for row in chosen]
        for row, said in zip(chosen, _said(model, hidden, places, asked, slice(1, None)), strict=True):
            found[long[row]] = said
    return found


def _said(model, hidden, places, asked: list[Pair], part: slice) -> list[Prediction]:
    """Return what is said of a part of each continuation, at the `places` of its row of `hidden`."""
    targets = np.array([token for pair in asked for token in pair.continuation[part]], np.int64)
    return split(answers(model, select(hidden, places), targets), [len(each) for each in places])


def _result(pair: Pair, said: list[Prediction], tokens: int) -> Score:
    nats = sum(float(each.nll.sum()) for each in said)
    best = np.concatenate([each.best for each in said])
    return Score(-nats, bool((best == np.array(pair.continuation)).all()), samples=1, forward_tokens=tokens)


def _tensor(model: Transformer, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(model.embed_tokens.weight.device)
