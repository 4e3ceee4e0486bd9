"""Likelihoods of validation windows under unmasking policies, in the form that `validation.evaluate` reads."""

import hashlib
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron.batch import Batch
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import Chains
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class WholeWindows(Likelihood):
    """Windows of a likelihood with all scored tokens masked; the engine decides in which order they are unmasked.

    Batches contain the true tokens up to the last scored one, with a weight of 1 at the scored ones.
    """

    inner: Likelihood

    exact = True
    target_offset = 0

    @property
    def name(self) -> str:
        """The name of the inner likelihood."""
        return self.inner.name

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of the inner likelihood."""
        return self.inner.prepare(ids, sample_indices, seed)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return the batch of T tokens of `ids` [B, S+1]; there is no noise."""
        scored = self.scored_tokens(ids.shape[1] - 1, alignment)
        tokens = torch.from_numpy(ids[:, : scored.stop].copy())
        weights = torch.zeros(tokens.shape)
        weights[:, scored] = 1
        return Batch(tokens, tokens, weights, np.full(len(ids), scored.stop - scored.start), causal=False)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored."""
        return self.inner.scored_tokens(seq_length, alignment)


@dataclass(frozen=True)
class PolicyEngine:
    """Evaluates windows exactly under one unmasking policy: an `EvaluationEngine` of one model on this rank."""

    chains: Chains
    ranks: ParallelContext
    sampling: Sampling

    def nll(self, batch: Batch) -> Tensor:
        """Return the NLL of the tokens of `WholeWindows`, fp32 [B, T]."""
        return self.order_nll(batch, 0)

    def order_nll(self, batch: Batch, index: int) -> Tensor:
        """Return what `nll` does; with a random order, in the `index`-th order of each window."""
        masked = batch.weights > 0  # [B, T]
        real = masked.any(1)
        nll = torch.zeros(masked.shape, device=self.ranks.device)
        if real.any():
            keys = [(_key(text), index) for text in batch.tokens[real].numpy()]
            silent = self.ranks.rank != 0 or not sys.stderr.isatty()
            bar = {"unit": "token", "leave": False, "delay": 5, "disable": silent}  # of batches longer than 5 s
            with tqdm(desc=self.sampling.order, total=int(masked.sum()), **bar) as progress:
                policy = {"keys": keys, "sampling": self.sampling, "advance": progress.update}
                nll[real.to(nll.device)] = self.chains.nll(batch.tokens[real], masked[real], **policy)
        return nll

    def train(self) -> None:
        """Do nothing: the model is not trained."""

    def eval(self) -> None:
        """Set evaluation mode."""
        self.chains.model.eval()

    def reshard(self) -> None:
        """Do nothing: the model is whole on every rank."""


def _key(text: np.ndarray) -> int:
    """Return a key of the random orders of a window: a hash of its tokens."""
    return int.from_bytes(hashlib.blake2b(text.astype(np.int64).tobytes(), digest_size=8).digest(), "little")
