"""Rows: sequences of which some tokens are asked for, and what a model says there.

Rows are read in batches of about one length. The head is applied where something is asked, nowhere else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.model.transformer import Transformer

LOGITS = 2**26  # numbers of one call of the head: a quarter of a GB


@dataclass(frozen=True)
class Limits:
    """How large a batch may be: in tokens, what fills rows up counted, and in rows."""

    tokens: int
    rows: int | None = None


@dataclass(frozen=True)
class Row:
    """A sequence for a bidirectional model, and the places in it whose tokens are asked for."""

    tokens: np.ndarray  # [T] ids
    places: np.ndarray  # [A], in [0, T)
    targets: np.ndarray  # [A] ids
    unconditional: np.ndarray | None = None  # [T] ids: the same without the context, for guidance


@dataclass(frozen=True)
class Prediction:
    """What a model says at A places: the nll of what stands there, its own first choice and how sure it is of it."""

    nll: np.ndarray  # [A] float64, nats
    best: np.ndarray  # [A] ids
    confidence: np.ndarray  # [A] log-probability of `best`


def batches(lengths: Sequence[int], limits: Limits) -> Iterator[list[int]]:
    """Yield the indices of sequences that are read together, longest first; each is at least one sequence."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, limits.tokens // max(1, lengths[order[0]]))
        size = min(size, limits.rows or size)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def ask(model: Transformer, rows: Sequence[Row], limits: Limits, guidance: float = 0.0) -> list[Prediction]:
    """Return what a bidirectional model says of each row.

    With `guidance` w the logits are (1 + w) * conditional - w * unconditional (2410.18514).
    """
    found: list[Prediction | None] = [None] * len(rows)
    for chosen in batches([len(row.tokens) for row in rows], limits):
        hidden = _hidden(model, [rows[index].tokens for index in chosen])
        places = [rows[index].places for index in chosen]
        asked = select(hidden, places)
        other = None
        if guidance:
            other = select(_hidden(model, [rows[index].unconditional for index in chosen]), places)
        targets = np.concatenate([rows[index].targets for index in chosen])
        said = answers(model, asked, targets, other, guidance)
        for index, one in zip(chosen, split(said, [len(each) for each in places]), strict=True):
            found[index] = one
    return found


def _hidden(model: Transformer, sequences: Sequence[np.ndarray]) -> Tensor:
    """Return what the head reads, [B, T, H], of sequences that see themselves; shorter ones are filled up."""
    device, lengths = model.embed_tokens.weight.device, np.array([len(sequence) for sequence in sequences])
    tokens = torch.from_numpy(fill_up(sequences)).to(device)
    batch = Batch.unscored(tokens, causal=False)
    if lengths.min() < lengths.max():
        filling = np.arange(lengths.max()) >= lengths[:, None]  # a document of its own, which nobody sees
        batch = replace(batch, documents=torch.from_numpy(filling.astype(np.int64)).to(device))
    return model.hidden_states(batch)


def fill_up(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return sequences of several lengths as int64 [B, T], filled up with id 0 on the right."""
    filled = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in enumerate(sequences):
        filled[row, : len(sequence)] = sequence
    return filled


def select(hidden: Tensor, places: Sequence[np.ndarray]) -> Tensor:
    """Return `hidden` [B, T, H] at the `places` of each row, [A, H] for all rows together."""
    length = hidden.shape[1]
    flat = np.concatenate([row * length + np.asarray(each, np.int64) for row, each in enumerate(places)])
    return hidden.flatten(0, 1)[torch.from_numpy(flat).to(hidden.device)]


def answers(
    model: Transformer, hidden: Tensor, targets: np.ndarray, other: Tensor | None = None, guidance: float = 0.0
) -> Prediction:
    """Return what the head says of `targets` [A] at `hidden` [A, H], guided away from `other` [A, H]."""
    targets = torch.from_numpy(np.ascontiguousarray(targets, np.int64)).to(hidden.device)
    size, parts = max(1, LOGITS // model.vocabulary.size), []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = model.head(hidden[part])
        if guidance:
            logits = (1 + guidance) * logits - guidance * model.head(other[part])
        normaliser = logits.logsumexp(-1)
        told = logits.gather(-1, targets[part, None])[:, 0]
        highest, best = logits.max(-1)
        parts.append(torch.stack([(normaliser - told).double(), (highest - normaliser).double(), best.double()]))
    nll, confidence, best = torch.cat(parts, dim=1).cpu().numpy() if parts else np.zeros((3, 0))
    return Prediction(nll, best.astype(np.int64), confidence)


def split(said: Prediction, sizes: Sequence[int]) -> list[Prediction]:
    """Return what was said as parts of the given sizes."""
    ends = np.cumsum(sizes)[:-1]
    columns = (np.split(column, ends) for column in (said.nll, said.best, said.confidence))
    return [Prediction(*parts) for parts in zip(*columns, strict=True)]
