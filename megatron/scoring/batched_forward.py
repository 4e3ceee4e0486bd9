"""Batched forward passes for scoring: sequences of about the same length, and logits at requested positions only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.generation.certainty import certainty
from megatron.model.transformer import Transformer

MAX_LOGITS = 2**26  # elements of the logits of one call of the head: 256 MiB in fp32


@dataclass(frozen=True)
class Limits:
    """The largest batch: in tokens, padding included, and in sequences."""

    tokens: int
    sequences: int | None = None


@dataclass(frozen=True)
class MaskedSequence:
    """A partly masked sequence for a bidirectional model, and the positions at which it predicts targets."""

    tokens: np.ndarray  # [T] ids
    positions: np.ndarray  # [A], in [0, T)
    targets: np.ndarray  # [A] ids
    unconditional: np.ndarray | None = None  # [T] ids: the same with the context masked, for guidance


@dataclass(frozen=True)
class Prediction:
    """Predictions at A positions: the NLL of the target, the most probable token and how certain it is."""

    nll: np.ndarray  # [A] float64, nats
    best: np.ndarray  # [A] ids
    confidence: np.ndarray  # [A] log-probability of `best`, or the certainty of an unmasking order
    forward_tokens: float = 0.0  # of the forward passes that gave them


def batches(lengths: Sequence[int], limits: Limits) -> Iterator[list[int]]:
    """Yield the indices of the sequences of each batch, longest first; a batch has at least one sequence."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, limits.tokens // max(1, lengths[order[0]]))
        size = min(size, limits.sequences or size)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def predict_sequences(
    model: Transformer,
    sequences: Sequence[MaskedSequence],
    limits: Limits,
    *,
    guidance: float = 0.0,
    order: str | None = None,
) -> list[Prediction]:
    """Return the predictions of a bidirectional model for each sequence.

    With `guidance` w the logits are (1 + w) * conditional - w * unconditional (2410.18514). `confidence` is the
    certainty of the unmasking `order`, where that depends on predictions.
    """
    predictions: dict[int, Prediction] = {}
    for indices in batches([len(sequence.tokens) for sequence in sequences], limits):
        batch = [sequences[index] for index in indices]
        positions = [sequence.positions for sequence in batch]
        hidden = select(_hidden_states(model, [sequence.tokens for sequence in batch]), positions)
        unconditional = None
        if guidance:
            tokens = cast("list[np.ndarray]", [sequence.unconditional for sequence in batch])
            unconditional = select(_hidden_states(model, tokens), positions)
        targets = np.concatenate([sequence.targets for sequence in batch])
        prediction = predict(model, hidden, targets, unconditional=unconditional, guidance=guidance, order=order)
        chunks = split(prediction, [len(sequence.positions) for sequence in batch])
        for index, sequence, chunk in zip(indices, batch, chunks, strict=True):
            predictions[index] = replace(chunk, forward_tokens=len(sequence.tokens) * (2 if guidance else 1))
    return [predictions[index] for index in range(len(sequences))]


def _hidden_states(model: Transformer, sequences: Sequence[np.ndarray]) -> Tensor:
    """Return the bidirectional hidden states [B, T, H] of sequences, which are padded to the longest."""
    device = model.embed_tokens.weight.device
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = torch.from_numpy(pad(sequences)).to(device)
    batch = Batch.unscored(tokens, causal=False)
    if lengths.min() < lengths.max():
        padding = np.arange(lengths.max()) >= lengths[:, None]  # [B, T], a document of its own: masked for all others
        batch = replace(batch, documents=torch.from_numpy(padding.astype(np.int64)).to(device))
    return model.hidden_states(batch)


def pad(sequences: Sequence[np.ndarray | Sequence[int]]) -> np.ndarray:
    """Return sequences as int64 [B, T], padded on the right with id 0."""
    padded = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return padded


def select(hidden: Tensor, positions: Sequence[np.ndarray]) -> Tensor:
    """Return `hidden` [B, T, H] at the `positions` of each sequence, [A, H] for all sequences together."""
    length = hidden.shape[1]
    flat = np.concatenate([row * length + np.asarray(indices, np.int64) for row, indices in enumerate(positions)])
    return hidden.flatten(0, 1)[torch.from_numpy(flat).to(hidden.device)]


def predict(
    model: Transformer,
    hidden: Tensor,
    targets: np.ndarray,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 0.0,
    order: str | None = None,
) -> Prediction:
    """Return the predictions of `targets` [A] from hidden states [A, H], with guidance by `unconditional` [A, H].

    `confidence` is that of an unmasking `order`, by default the log-probability of the best token. The head runs in
    chunks, so that at most MAX_LOGITS logits exist at one time.
    """
    target_ids = torch.from_numpy(np.ascontiguousarray(targets, np.int64)).to(hidden.device)
    size = max(1, MAX_LOGITS // model.vocabulary.size)
    chunks = []
    for start in range(0, len(target_ids), size):
        chunk = slice(start, start + size)
        logits = model.head(hidden[chunk])
        if unconditional is not None:
            logits = (1 + guidance) * logits - guidance * model.head(unconditional[chunk])
        normaliser = logits.logsumexp(-1)
        target_logits = logits.gather(-1, target_ids[chunk, None])[:, 0]
        highest, best = logits.max(-1)
        confidence = certainty(logits, order) if order else highest - normaliser
        chunks.append(torch.stack([(normaliser - target_logits).double(), confidence.double(), best.double()]))
    nll, confidence, best = torch.cat(chunks, dim=1).cpu().numpy() if chunks else np.zeros((3, 0))
    return Prediction(nll, best.astype(np.int64), confidence)


def split(prediction: Prediction, sizes: Sequence[int]) -> list[Prediction]:
    """Return a prediction as consecutive chunks of the given sizes."""
    ends = np.cumsum(sizes)[:-1]
    columns = (np.split(column, ends) for column in (prediction.nll, prediction.best, prediction.confidence))
    return [Prediction(*chunk) for chunk in zip(*columns, strict=True)]
