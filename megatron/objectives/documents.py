"""Documents of one sample: whether they see one another, and whether the first token of one is asked for.

Megatron's --reset-attention-mask, --reset-position-ids and --eod-mask-loss. They hold in training and in evaluation,
as they say what is modelled: documents, or the stream of all.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood


@dataclass(frozen=True)
class DocumentRules:
    """What ends with a document, whose last token is `eod`."""

    eod: int
    sight: bool = False
    positions: bool = False
    loss: bool = False


@dataclass(frozen=True)
class ByDocument(Likelihood):
    """An objective that reads from left to right, under these rules."""

    inner: Likelihood
    rules: DocumentRules

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def exact(self) -> bool:
        return self.inner.exact

    @property
    def target_offset(self) -> int:
        return self.inner.target_offset

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        return self._ruled(self.inner.prepare(ids, sample_indices, seed), ids, "published")

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        return self._ruled(self.inner.evaluation(ids, noise, windows, alignment), ids, alignment)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        return self.inner.scored_tokens(seq_length, alignment)

    def scored(self, ids: np.ndarray, alignment: str) -> np.ndarray:
        """Return which of the tokens `ids` [B, S+1] are scored: not the first of a document, if so ruled."""
        scored = self.inner.scored(ids, alignment)
        if self.rules.loss:
            scored[:, 1:] &= ids[:, :-1] != self.rules.eod
        return scored

    def _ruled(self, batch: Batch, ids: np.ndarray, alignment: str) -> Batch:
        length, changes = ids.shape[1] - 1, {}
        # block diffusion reads a sample twice
        places = np.broadcast_to(np.arange(batch.tokens.shape[1]) % length, batch.tokens.shape)
        begins = np.zeros(ids.shape, np.int64)
        begins[:, 1:] = ids[:, :-1] == self.rules.eod
        if self.rules.sight:
            documents = np.cumsum(begins, axis=1)  # the number of each token's document in its sample
            changes["documents"] = torch.from_numpy(np.take_along_axis(documents, places, axis=1))
        if self.rules.positions:
            starts = np.maximum.accumulate(begins * np.arange(length + 1), axis=1)
            changes["position_ids"] = torch.from_numpy(places - np.take_along_axis(starts, places, axis=1))
            if batch.target_positions is not None:
                changes["target_positions"] = changes["position_ids"] + self.target_offset
        if self.rules.loss:
            scored = self.scored(ids, alignment)
            asked = torch.from_numpy(scored[:, self.target_offset : self.target_offset + length])
            weights = batch.weights.clone()
            weights[:, : asked.shape[1]] *= asked
            changes |= {"weights": weights, "counts": scored.sum(axis=1), "scored_positions": None}
        return replace(batch, **changes)
