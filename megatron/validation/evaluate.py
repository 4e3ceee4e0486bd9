"""Validation on fixed windows with fixed noise; losses are summed per document and divided once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron.batch import Batch, without_padding
from megatron.data.blend import ValidationBlend
from megatron.data.samples import ValidationWindows
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.parallel.mesh import ParallelContext
from megatron.statistics import clustered_ratio, noise_error


class EvaluationEngine(Protocol):
    """The part of an `Engine` that `evaluate` uses; an ensemble of engines has it too."""

    @property
    def ranks(self) -> ParallelContext:
        """This rank in the device mesh."""
        ...

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted NLL per position, fp32 [B, S], or [models, B, S] of several models."""
        ...

    def train(self) -> None:
        """Set training mode."""

    def eval(self) -> None:
        """Set evaluation mode."""

    def reshard(self) -> None:
        """Free parameters that a forward pass gathered."""


@dataclass(frozen=True)
class ValidationSet:
    """A named held-out set; `token_bytes` [V] is the number of text bytes of each id, None if ids have no text."""

    name: str
    windows: ValidationWindows | ValidationBlend
    documents: int
    token_bytes: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """Per-document sums, from which summaries and paired comparisons are computed."""

    nats: np.ndarray  # [R, D] float64, R noise replicates
    tokens: np.ndarray  # [D] scored tokens
    bytes: np.ndarray | None  # [D] text bytes of the scored tokens

    def summary(self) -> dict:
        """Return loss (nats per token), mc_se, data_se and bits_per_byte.

        mc_se is the standard error over independent noise replicates, None if there is only one.
        data_se is the standard error over documents, None if only one has scored tokens. It includes the noise that
        differs between documents, so it is the whole error for another set of documents: adding mc_se would count
        noise twice.
        """
        loss = clustered_ratio(self.nats, self.tokens)
        text = 0 if self.bytes is None else self.bytes.sum()
        return {
            "loss": loss.value,
            "mc_se": noise_error(self.nats, self.tokens),
            "data_se": loss.standard_error,
            "bits_per_byte": float(self.nats.mean(axis=0).sum() / np.log(2) / text) if text > 0 else None,
        }


@torch.no_grad()
def evaluate(
    engine: EvaluationEngine,
    likelihood: Likelihood,
    data: ValidationSet,
    *,
    seed: int,
    replicates: int,
    batch_size: int,
    alignment: str,
    models: int = 1,
    before_pass: Callable[[], None] = lambda: None,
) -> list[Evaluation]:
    """Return the per-document sums of `data` over `replicates` Monte-Carlo samples of the noise, the same on all ranks.

    There is one `Evaluation` per model; for several `models` `engine.nll` returns [models, B, S].

    NLL is attributed to the document that contains the target token, not to that of the predicting position. All
    ranks run the same number of forward passes: missing windows at the end are padding with weight 0.

    Raises: what `before_pass`, called before every forward pass, raises on all ranks to stop.
    """
    ranks = engine.ranks
    replicates = 1 if likelihood.exact else replicates
    nats = np.zeros((models, replicates, data.documents))
    tokens = np.zeros(data.documents)
    text_bytes = np.zeros(data.documents)
    starts = range(0, len(data.windows), batch_size * ranks.data_size)
    silent = ranks.rank != 0 or not sys.stderr.isatty()
    # a progress bar only for evaluations longer than 5 s
    bar = tqdm(desc=data.name, total=len(starts) * replicates, unit="pass", leave=False, delay=5, disable=silent)
    engine.eval()
    try:
        for start in starts:
            windows = start + ranks.data_rank * batch_size + np.arange(batch_size)  # [B]
            real = windows < len(data.windows)
            windows = np.where(real, windows, 0)
            ids, documents = (np.stack(arrays) for arrays in zip(*[data.windows[int(window)] for window in windows]))
            for replicate in range(replicates):
                before_pass()
                batch = likelihood.evaluation(ids, EvaluationNoise(seed, data.name, replicate), windows, alignment)
                batch = without_padding(batch, torch.from_numpy(real))
                scored = batch.weights.numpy() > 0  # [B, S]; an unscored position may have no target token
                owners = documents[scored.nonzero()[0], likelihood.target_token_positions(batch)[scored]]
                nll = engine.nll(batch).cpu().numpy().reshape(models, *scored.shape)
                for index, weighted in enumerate(nll.astype(np.float64) * batch.weights.numpy()):
                    nats[index, replicate] += np.bincount(owners, weighted[scored], minlength=data.documents)
                bar.update()
            scored_tokens = likelihood.scored(ids, alignment) & real[:, None]
            owners = documents[scored_tokens]
            tokens += np.bincount(owners, minlength=data.documents)
            if data.token_bytes is not None:
                text_bytes += np.bincount(owners, data.token_bytes[ids[scored_tokens]], minlength=data.documents)
    finally:
        bar.close()
        engine.train()
        engine.reshard()
    # several ranks read the same windows; only the loss rank counts them
    sums = ranks.sum_tensor(torch.from_numpy(np.vstack([*nats, tokens, text_bytes]) * ranks.is_loss_rank)).numpy()
    text_bytes = None if data.token_bytes is None else sums[-1]
    return [Evaluation(model_nats, sums[-2], text_bytes) for model_nats in sums[:-2].reshape(nats.shape)]
