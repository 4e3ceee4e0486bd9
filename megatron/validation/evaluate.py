"""Validation: the same windows, the same noise, every time; sums by document, divided once."""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from megatron.batch import without_padding
from megatron.data.samples import ValidationWindows
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.parallel.engine import Engine


@dataclass(frozen=True)
class ValidationSet:
    """A named held-out set; `token_bytes` [V] is the text length of each id, None where ids have no text."""

    name: str
    windows: ValidationWindows
    documents: int
    token_bytes: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """Sums by document: what the summary figures and paired comparisons are made of."""

    nats: np.ndarray  # [R, D] float64, R noise replicates
    tokens: np.ndarray  # [D] scored tokens
    bytes: np.ndarray | None  # [D] bytes of text of the scored tokens

    def summary(self) -> dict:
        """Return loss (nats per token), mc_se, data_se and bits_per_byte.

        mc_se is the standard error over independent noise replicates, None where there is only one.
        data_se treats documents as clusters drawn at random: the ratio estimator's standard error
        (Cochran, Sampling Techniques, 1977, section 6.3). It contains the noise that differs between
        documents, so for another set of documents it stands alone: adding mc_se would count noise twice.
        """
        means = self.nats.sum(axis=1) / self.tokens.sum()
        loss, replicates = float(means.mean()), len(means)
        seen = self.tokens > 0
        residual = self.nats.mean(axis=0)[seen] - loss * self.tokens[seen]
        clusters = int(seen.sum())
        data_se = np.sqrt(clusters / max(1, clusters - 1) * (residual**2).sum()) / self.tokens.sum()
        has_text = self.bytes is not None and self.bytes.sum() > 0
        return {
            "loss": loss,
            "mc_se": float(means.std(ddof=1) / np.sqrt(replicates)) if replicates > 1 else None,
            "data_se": float(data_se) if clusters > 1 else None,
            "bits_per_byte": float(self.nats.mean(axis=0).sum() / np.log(2) / self.bytes.sum()) if has_text else None,
        }


@torch.no_grad()
def evaluate(
    engine: Engine,
    likelihood: Likelihood,
    data: ValidationSet,
    *,
    seed: int,
    replicates: int,
    batch_size: int,
    alignment: str,
    models: int = 1,
) -> list[Evaluation]:
    """Return the per-document sums of `data` over `replicates` draws of the noise; every process returns the same.

    There is one `Evaluation` for each of several `models`, whose nll `engine.nll` gives together, [models, B, S].

    A token's nats go to the document of the token itself, not to that of the position that speaks of it. All
    processes run the same number of forward passes: what is missing at the end is padded without weight.
    """
    ranks = engine.ranks
    replicates = 1 if likelihood.exact else replicates
    nats = np.zeros((models, replicates, data.documents))
    tokens = np.zeros(data.documents)
    text = np.zeros(data.documents)
    starts = range(0, len(data.windows), batch_size * ranks.data_size)
    silent = ranks.rank != 0 or not sys.stderr.isatty()
    # only an evaluation that takes its time shows how far it is
    bar = tqdm(desc=data.name, total=len(starts) * replicates, unit="pass", leave=False, delay=5, disable=silent)
    engine.eval()
    for start in starts:
        windows = start + ranks.data_rank * batch_size + np.arange(batch_size)
        real = windows < len(data.windows)
        windows = np.where(real, windows, 0)
        read = [data.windows[int(window)] for window in windows]
        ids, documents = (np.stack(part) for part in zip(*read))
        for replicate in range(replicates):
            batch = likelihood.evaluation(ids, EvaluationNoise(seed, data.name, replicate), windows, alignment)
            batch = without_padding(batch, torch.from_numpy(real))
            asked = batch.weights.numpy() > 0  # an unasked position may speak of no token at all
            owners = documents[asked.nonzero()[0], likelihood.target_token_positions(batch)[asked]]
            nll = engine.nll(batch).cpu().numpy().reshape(models, *asked.shape)
            for index, weighted in enumerate(nll.astype(np.float64) * batch.weights.numpy()):
                nats[index, replicate] += np.bincount(owners, weighted[asked], minlength=data.documents)
            bar.update()
        scored = likelihood.scored(ids, alignment) & real[:, None]
        owners = documents[scored]
        tokens += np.bincount(owners, minlength=data.documents)
        if data.token_bytes is not None:
            text += np.bincount(owners, data.token_bytes[ids[scored]], minlength=data.documents)
    bar.close()
    engine.train()
    engine.reshard()
    # of the processes that read the same windows one counts them
    sums = ranks.sum_tensor(torch.from_numpy(np.vstack([*nats, tokens, text]) * ranks.is_loss_rank)).numpy()
    text = None if data.token_bytes is None else sums[-1]
    return [Evaluation(each, sums[-2], text) for each in sums[:-2].reshape(nats.shape)]
