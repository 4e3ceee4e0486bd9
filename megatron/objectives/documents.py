"""Document boundaries in a sample: attention mask, position ids and loss.

Megatron's --reset-attention-mask, --reset-position-ids and --eod-mask-loss. They act in training and in evaluation, as
they decide what is modelled: single documents, or one stream of documents.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood


@dataclass(frozen=True)
class DocumentRules:
    """What is reset after the end-of-document token `eod`."""

    eod: int
    reset_attention_mask: bool = False  # mask attention across document boundaries
    reset_position_ids: bool = False  # start each document at position 0
    eod_mask_loss: bool = False  # exclude the first token of each document from the loss, if it follows another one


@dataclass(frozen=True)
class ByDocument(Likelihood):
    """A likelihood that reads from left to right, with document rules."""

    inner: Likelihood
    rules: DocumentRules

    @property
    def name(self) -> str:
        """The name of the inner likelihood."""
        return self.inner.name

    @property
    def exact(self) -> bool:
        """Whether one pass gives the inner likelihood."""
        return self.inner.exact

    @property
    def target_offset(self) -> int:
        """The output at position j predicts token j + target_offset."""
        return self.inner.target_offset

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the inner training batch with the document rules."""
        return self._with_rules(self.inner.prepare(ids, sample_indices, seed), ids, "published")

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the inner evaluation batch with the document rules."""
        return self._with_rules(self.inner.evaluation(ids, noise, windows, alignment), ids, alignment)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored, before the document rules."""
        return self.inner.scored_tokens(seq_length, alignment)

    def scored(self, ids: np.ndarray, alignment: str) -> np.ndarray:
        """Return which tokens of `ids` are scored, bool [B, S+1]; without first tokens under --eod-mask-loss."""
        scored = self.inner.scored(ids, alignment)
        if self.rules.eod_mask_loss:
            scored[:, 1:] &= ids[:, :-1] != self.rules.eod
        return scored

    def _with_rules(self, batch: Batch, ids: np.ndarray, alignment: str) -> Batch:
        length = ids.shape[1] - 1
        changes = {}
        # index of each input in its sample, [B, T]; block diffusion reads a sample twice
        token_index = np.broadcast_to(np.arange(batch.tokens.shape[1]) % length, batch.tokens.shape)
        is_start = np.zeros(ids.shape, np.int64)  # [B, S+1], 1 at the first token of a document
        is_start[:, 1:] = ids[:, :-1] == self.rules.eod
        if self.rules.reset_attention_mask:
            documents = np.cumsum(is_start, axis=1)  # [B, S+1], number of each token's document in its sample
            changes["documents"] = torch.from_numpy(np.take_along_axis(documents, token_index, axis=1))
        if self.rules.reset_position_ids:
            starts = np.maximum.accumulate(is_start * np.arange(length + 1), axis=1)  # [B, S+1]
            changes["position_ids"] = torch.from_numpy(token_index - np.take_along_axis(starts, token_index, axis=1))
            if batch.target_positions is not None:
                changes["target_positions"] = changes["position_ids"] + self.target_offset
        if self.rules.eod_mask_loss:
            scored = self.scored(ids, alignment)
            targets_scored = torch.from_numpy(scored[:, self.target_offset : self.target_offset + length])  # [B, S]
            weights = batch.weights.clone()
            weights[:, : targets_scored.shape[1]].masked_fill_(~targets_scored, 0)
            changes |= {"weights": weights, "counts": scored.sum(axis=1), "scored_positions": None}
        return replace(batch, **changes)
