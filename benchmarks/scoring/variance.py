"""The variance of the masked-diffusion bound and of the published estimator."""

import numpy as np

from benchmarks.scoring.options import Options
from benchmarks.scoring.texts import passages
from megatron.scoring.batched_forward import Limits, MaskedSequence, predict_sequences
from megatron.scoring.requests import Request, Scoring
from megatron.scoring.score import score
from megatron.training.load_run import Trained

PUBLISHED_SAMPLES = 32  # Monte-Carlo samples of every request
TARGET_TOKENS = (1, 4, 16, 64)


def published(run: Trained, model, texts: list[tuple[list[int], list[int]]], *, seed: int) -> list[float]:
    """Return the published estimate of the negative log-likelihood of each (context, continuation), in nats.

    1. K = `PUBLISHED_SAMPLES` diffusion times, t_k = (u + k / K) mod 1 with u uniform in [0, 1).
    2. For each t_k, every token of the continuation is masked with probability t_k.
    3. The estimate is the mean over k of the summed NLL of the masked tokens divided by t_k.
    """
    random = np.random.default_rng(seed)
    sequences = []
    text_indices = []  # by sequence
    times = []  # by sequence
    for text_index, (context, continuation) in enumerate(texts):
        for t in (random.random() + np.arange(PUBLISHED_SAMPLES) / PUBLISHED_SAMPLES) % 1:
            masked = len(context) + np.flatnonzero(random.random(len(continuation)) < t)
            if len(masked):
                tokens = np.array([*context, *continuation])
                targets = tokens[masked]
                tokens[masked] = run.vocabulary.mask_id
                sequences.append(MaskedSequence(tokens, masked, targets))
                text_indices.append(text_index)
                times.append(t)
    sums = [prediction.nll.sum() for prediction in predict_sequences(model, sequences, Limits(16384))]
    return np.bincount(text_indices, np.array(sums) / times / PUBLISHED_SAMPLES, minlength=len(texts)).tolist()


def variances(options: Options, run: Trained) -> list[dict]:
    """Return, for each number of target tokens, the variance of the published estimator and of ours, at 32 samples."""
    model = run.model()
    seq_length = run.config.data.seq_length
    results = []
    for size in (*TARGET_TOKENS, seq_length - 1):
        context = min(options.context, seq_length - size)
        texts = [(text[:context], text[context:]) for text in passages(run, [context + size] * options.texts, size)]
        theirs = np.array([published(run, model, texts, seed=seed) for seed in range(options.draws)])
        # noise is a function of the document id: one id per draw and text
        requests = [
            Request(*text, f"{draw}/{index}") for draw in range(options.draws) for index, text in enumerate(texts)
        ]
        scoring = Scoring(num_mc=PUBLISHED_SAMPLES, decide_at=0.0, only_mc_nll=True)
        scores = score(model, "mdm", requests, scoring, eod=run.tokenizer().eod, seq_length=seq_length)
        ours = -np.array([estimate.log_likelihood for estimate in scores]).reshape(theirs.shape)  # [draws, texts]
        published_variance = theirs.var(axis=0, ddof=1).mean()
        variance = ours.var(axis=0, ddof=1).mean()
        exact = all(estimate.standard_error == 0 for estimate in scores)
        results.append(
            {
                "tokens": size,
                "published_variance": published_variance,
                "variance": 0.0 if exact else variance,
                "times": None if exact else published_variance / variance,
                "samples": max(estimate.samples for estimate in scores),
                "reported_variance": np.mean([estimate.standard_error**2 for estimate in scores]),
            }
        )
    return results
