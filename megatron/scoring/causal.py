"""Log-likelihoods by next-token prediction, with a KV cache for contexts that several requests share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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

    def in_blocks(self, block_size: int) -> list["Pair"]:
        """Return the pairs of each block of the continuation, on a grid that begins with the context."""
        text, start = (*self.context, *self.continuation), len(self.context)
        ends = [*range((start // block_size + 1) * block_size, len(text), block_size), len(text)]
        return [Pair(text[:before], text[before:end]) for before, end in zip([start, *ends], ends)]


Finished = Callable[[int, Score], None]


@torch.no_grad()
def score_causal(
    model: Transformer, pairs: Sequence[Pair], limits: Limits, finished: Finished, *, target_positions: bool = False
) -> None:
    """Call `finished(index, score)` with the exact score of every pair.

    Pairs with the same context are scored from one forward pass over the context. With `target_positions` the model is
    given the position of each target.
    """
    groups: dict[tuple, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.context, []).append(index)
    scorer = _CausalScorer(model, pairs, limits, finished, target_positions=target_positions)
    scorer.score_single([indices[0] for indices in groups.values() if len(indices) == 1])
    scorer.score_shared([indices for indices in groups.values() if len(indices) > 1])


class _CausalScorer:
    """Scores some of `pairs` at a time, given by index."""

    def __init__(
        self, model: Transformer, pairs: Sequence[Pair], limits: Limits, finished: Finished, *, target_positions: bool
    ):
        self.model = model
        self.pairs = pairs
        self.limits = limits
        self.finished = finished
        self.target_positions = target_positions

    def score_single(self, indices: list[int]) -> None:
        """Score pairs whose contexts differ: one forward pass over context and continuation each."""
        sequences = [(*self.pairs[index].context, *self.pairs[index].continuation[:-1]) for index in indices]
        for rows in batches([len(sequence) for sequence in sequences], self.limits):
            tokens = self._tensor(pad([sequences[row] for row in rows]))
            # padding comes after all tokens of a row, which do not attend to it
            batch = Batch.unscored(tokens, causal=True)
            if self.target_positions:
                positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
                batch = replace(batch, target_positions=positions.expand_as(tokens))
            hidden = self.model.hidden_states(batch)
            pairs = [self.pairs[indices[row]] for row in rows]
            positions = [len(pair.context) - 1 + np.arange(len(pair.continuation)) for pair in pairs]
            predictions = self._predictions(hidden, positions, pairs, slice(None))
            for row, pair, prediction in zip(rows, pairs, predictions, strict=True):
                self.finished(indices[row], _score(pair, [prediction], len(sequences[row])))

    def score_shared(self, groups: list[list[int]]) -> None:
        """Score groups of pairs that share a context, which is processed once per group.

        1. The contexts of a batch go through the model and into a KV cache.
        2. Their last hidden states predict the first token of every continuation.
        3. The longer continuations go through the model with their context's part of the cache.
        """
        contexts = [self.pairs[indices[0]].context for indices in groups]
        for batch_groups in batches([len(context) for context in contexts], self.limits):
            tokens = pad([contexts[group] for group in batch_groups])  # [B, T]
            lengths = np.array([len(contexts[group]) for group in batch_groups])
            cache = KVCache()
            hidden = self._read(tokens, cache)
            # the padding is in the cache: mask it for all later tokens
            cache.present = self._tensor(np.arange(tokens.shape[1]) < lengths[:, None])
            owners = [(row, index) for row, group in enumerate(batch_groups) for index in groups[group]]
            rows = [row for row, _ in owners]
            pairs = [self.pairs[index] for _, index in owners]
            last_positions = [lengths[row, None] - 1 for row in rows]
            firsts = self._predictions(hidden[rows], last_positions, pairs, slice(1))
            later = self._predict_later_tokens(cache, tokens.shape[1], owners)
            for number, ((row, index), first) in enumerate(zip(owners, firsts, strict=True)):
                predictions = [first, later[number]] if number in later else [first]
                forward_tokens = lengths[row] / len(groups[batch_groups[row]]) + len(self.pairs[index].continuation) - 1
                self.finished(index, _score(self.pairs[index], predictions, round(forward_tokens)))

    def _predict_later_tokens(self, cache: KVCache, width: int, owners: list[tuple[int, int]]) -> dict[int, Prediction]:
        """Return the predictions of all but the first token of the longer continuations, by index into `owners`.

        `owners` are (row of the cache, index of the pair); `width` is the length of the cache.
        """
        predictions = {}
        longer = [number for number, (_, index) in enumerate(owners) if len(self.pairs[index].continuation) > 1]
        inputs = [self.pairs[owners[number][1]].continuation[:-1] for number in longer]
        for rows in batches([width + len(tokens) for tokens in inputs], self.limits):
            tokens = pad([inputs[row] for row in rows])
            present = np.arange(tokens.shape[1]) < np.array([[len(inputs[row])] for row in rows])
            row_cache = cache.select(self._tensor(np.array([owners[longer[row]][0] for row in rows])))
            hidden = self._read(tokens, row_cache, self._tensor(present))
            pairs = [self.pairs[owners[longer[row]][1]] for row in rows]
            positions = [np.arange(len(inputs[row])) for row in rows]
            later = self._predictions(hidden, positions, pairs, slice(1, None))
            predictions |= {longer[row]: prediction for row, prediction in zip(rows, later, strict=True)}
        return predictions

    def _predictions(
        self, hidden: Tensor, positions: list[np.ndarray], pairs: list[Pair], tokens: slice
    ) -> list[Prediction]:
        """Return the predictions of some `tokens` of each continuation, at `positions` of its row of `hidden`.

        `hidden` is [B, T, H].
        """
        targets = np.array([token for pair in pairs for token in pair.continuation[tokens]], np.int64)
        prediction = predict(self.model, select(hidden, positions), targets)
        return split(prediction, [len(row_positions) for row_positions in positions])

    def _read(self, tokens: np.ndarray, cache: KVCache, present: Tensor | None = None) -> Tensor:
        return self.model.read(self._tensor(tokens), cache, present, self.target_positions)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.embed_tokens.weight.device)


def _score(pair: Pair, predictions: list[Prediction], forward_tokens: int) -> Score:
    nats = sum(float(prediction.nll.sum()) for prediction in predictions)
    best = np.concatenate([prediction.best for prediction in predictions])
    is_greedy = bool((best == np.array(pair.continuation)).all())
    return Score(-nats, is_greedy, samples=1, forward_tokens=forward_tokens)
