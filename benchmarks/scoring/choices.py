"""Cost and best choice of multiple-choice documents, ours and with the published estimator."""

import numpy as np

from benchmarks.scoring.options import Options
from benchmarks.scoring.texts import passages
from benchmarks.scoring.variance import PUBLISHED_SAMPLES, published
from megatron.scoring.requests import Request, Score, Scoring
from megatron.scoring.score import score
from megatron.training.load_run import Trained

PUBLISHED_TOKENS = 2048  # of every sample, padded with [MASK]
REFERENCE_SAMPLES = 1024
NUM_CHOICES = 4


def questions(options: Options, run: Trained) -> dict:
    """Return cost and error of multiple-choice scoring, and how often the best choice is that of 1,024 samples."""
    model = run.model()
    requests = _choice_requests(options, run)

    def ours(**settings) -> list[Score]:
        scoring = Scoring(only_mc_nll=True, **settings)
        eod, seq_length = run.tokenizer().eod, run.config.data.seq_length
        return score(model, "mdm", requests, scoring, eod=eod, seq_length=seq_length)

    def best(nlls) -> np.ndarray:
        return np.array(nlls).reshape(-1, NUM_CHOICES).argmin(1)

    reference_scores = ours(num_mc=REFERENCE_SAMPLES, decide_at=0.0, eval_seed=1)
    scores = ours()
    reference_nlls = [-estimate.log_likelihood for estimate in reference_scores]
    reference_best = best(reference_nlls)
    texts = [(request.context, request.continuation) for request in requests]
    theirs = np.array([published(run, model, texts, seed=seed) for seed in range(5)])
    lengths = np.array([len(context) + len(continuation) for context, continuation in texts])
    return {
        "questions": options.questions,
        "published": {
            "tokens_per_request": PUBLISHED_SAMPLES * PUBLISHED_TOKENS,
            "tokens_per_request_unpadded": float(PUBLISHED_SAMPLES * lengths.mean()),
            "error": float(np.sqrt(((theirs - reference_nlls) ** 2).mean())),
            "same_best": float(np.mean([best(nlls) == reference_best for nlls in theirs]) * options.questions),
        },
        "ours": {
            "tokens_per_request": float(np.mean([estimate.forward_tokens for estimate in scores])),
            "samples": float(np.mean([estimate.samples for estimate in scores])),
            "error": float(np.sqrt(np.mean([estimate.standard_error**2 for estimate in scores]))),
            "same_best": int((best([-estimate.log_likelihood for estimate in scores]) == reference_best).sum()),
        },
        "reference_error": float(np.sqrt(np.mean([estimate.standard_error**2 for estimate in reference_scores]))),
        "true_answer_is_best": int((reference_best == 0).sum()),
    }


def _choice_requests(options: Options, run: Trained) -> list[Request]:
    """Return the requests of all documents, `NUM_CHOICES` each; the first choice is the true continuation."""
    spread = options.answer // 3
    sizes = np.random.default_rng(1).integers(
        options.answer - spread, options.answer + spread + 1, NUM_CHOICES * options.questions
    )
    true_texts = passages(run, [options.context + int(size) for size in sizes[::NUM_CHOICES]], 2)
    distractors = iter(passages(run, [int(size) for index, size in enumerate(sizes) if index % NUM_CHOICES], 3))
    requests = []
    for index, text in enumerate(true_texts):
        context = text[: options.context]
        choices = [text[options.context :], *(next(distractors) for _ in range(NUM_CHOICES - 1))]
        requests += [Request(context, choice, f"question {index}") for choice in choices]
    return requests
