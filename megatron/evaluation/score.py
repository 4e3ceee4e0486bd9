"""Likelihoods of continuations behind contexts, by trained models: what every downstream task is made of.

Next-token prediction gives them exactly. Masked diffusion gives a bound, the mean over all orders of the tokens, with
its Monte-Carlo error, or the chain rule in one order. Text that is longer than the model has read in training is cut as
lm-eval cuts it: contexts on the left, continuations into windows that see what fits of the text before them.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron.config.sections import DataConfig
from megatron.evaluation.batched_forward import Limits
from megatron.evaluation.generate import CAUSAL, check_empty_prompt, check_objective
from megatron.evaluation.requests import Request, Score, Scoring
from megatron.evaluation.score_causal import Pair, score_causal
from megatron.evaluation.score_masked import Answer, MaskedScorer, key_of
from megatron.model.transformer import Transformer

logger = logging.getLogger(__name__)

QUESTIONS = 128  # of masked diffusion that are under way at one time

Finished = Callable[[int, Score], None]


@dataclass
class Job:
    """A distinct request: where it stands among all, the windows it is read in, and what is known of them."""

    request: Request
    indices: list[int]
    windows: list[Pair]
    truncated_tokens: int
    scores: list[Score] = field(default_factory=list)


def score(
    model: Transformer,
    objective_name: str,
    requests: Sequence[Request],
    scoring: Scoring,
    eod: int,
    seq_length: int,
    data: DataConfig | None = None,
    finished: Finished = lambda index, score: None,
) -> list[Score]:
    """Return the score of every request; `finished` is told of each by its index.

    Equal requests are scored once, and the likelihood of a whole text is that of a continuation of nothing. A model
    that was trained to read causally and both ways (dual) is scored causally. Raises ConfigurationError for objectives
    and settings that have no meaning here and, where `data` says that a run kept its documents apart, for an empty
    context, behind which it has never read on.
    """
    check_objective(objective_name)
    scoring.check(objective_name)
    if data is not None and any(not request.context for request in requests):
        check_empty_prompt(data)
    causal = objective_name in CAUSAL
    jobs = _jobs(requests, eod, seq_length if causal else seq_length - 1)  # a causal model reads all but the last
    cut = sum(len(job.windows) > 1 for job in jobs)
    if cut:
        logger.info("%d of %d texts are longer than --seq-length %d: windows", cut, len(jobs), seq_length)
    found: list[Score | None] = [None] * len(requests)

    def told(job: Job, one: Score) -> None:
        job.scores.append(one)
        if len(job.scores) >= len(job.windows):
            total = replace(together(job.scores), truncated_tokens=job.truncated_tokens)
            for index in job.indices:
                found[index] = total
                finished(index, found[index])

    limits = Limits(scoring.batch_tokens, scoring.batch_rows)
    for job in jobs:
        if not job.windows:
            told(job, Score(0.0, True))  # nothing is certain to follow
    if causal:
        owners = [(job, pair) for job in jobs for pair in job.windows]
        pairs = [pair for _, pair in owners]
        score_causal(model, pairs, limits, lambda index, one: told(owners[index][0], one))
    else:
        _score_masked(MaskedScorer(model, scoring, limits), jobs, told)
    return found


def _jobs(requests: Sequence[Request], eod: int, longest: int) -> list[Job]:
    jobs: dict[tuple, Job] = {}
    for index, request in enumerate(requests):
        context, continuation = tuple(request.context) or (eod,), tuple(request.continuation)
        content = (context, continuation, request.question)
        if content not in jobs:
            pairs = list(windows(context, continuation, longest))
            jobs[content] = Job(request, [], pairs, truncated_tokens(context, continuation, longest))
        jobs[content].indices.append(index)
    return list(jobs.values())


def windows(context: tuple[int, ...], continuation: tuple[int, ...], longest: int) -> Iterator[Pair]:
    """Yield the pairs whose likelihoods add up to that of `continuation`, of at most `longest` + 1 tokens each.

    Every token is said once. The first window says as many as it can behind what fits of the context, or behind its
    last token where the continuation alone does not fit; of those that follow, the last sees all that fits before it.
    """
    size = len(continuation)
    if 0 < size <= longest:
        yield Pair(context[-(longest + 1 - size) :], continuation)
        return
    text, said = (*context[-1:], *continuation), 1
    while said <= size:
        end = min(said + longest, size + 1)
        begin = end - longest - 1
        yield Pair(text[begin:said], text[said:end])
        said = end


def truncated_tokens(context: Sequence[int], continuation: Sequence[int], longest: int) -> int:
    """Return how many tokens at the beginning of the context no window has."""
    size = len(continuation)
    if size == 0:
        return 0
    room = longest + 1 - size if size <= longest else 1
    return max(0, len(context) - room)


def together(scores: list[Score]) -> Score:
    """Return the score of a continuation from those of its windows, whose errors are independent."""
    greedy = [each.is_greedy for each in scores]
    return Score(
        sum(each.log_likelihood for each in scores),
        None if None in greedy else all(greedy),
        math.hypot(*(each.standard_error for each in scores)),
        sum(each.samples for each in scores),
        sum(each.forward_tokens for each in scores),
        any(each.upper_bound for each in scores),
    )


def _score_masked(scorer: MaskedScorer, jobs: list[Job], told: Callable[[Job, Score], None]) -> None:
    """Score question by question, those of about one length together."""
    questions = []
    for rivals in _rivals(jobs):
        each = [(job, answer) for job in rivals for answer in _answers(job)]
        questions += [each] if len(rivals) > 1 else [[one] for one in each]  # windows of one text are no rivals
    questions.sort(key=lambda each: -max(len(answer.sequence) for _, answer in each))
    for start in range(0, len(questions), QUESTIONS):
        under_way = questions[start : start + QUESTIONS]
        scorer.score([[answer for _, answer in question] for question in under_way])
        for job, answer in (pair for question in under_way for pair in question):
            told(job, scorer.result(answer))


def _rivals(jobs: list[Job]) -> list[list[Job]]:
    """Return the jobs by question; a job stands alone that has no question, or is not what its rivals are.

    That is so where one is read in several windows, and where one has no context and others have: there the task
    compares each answer with itself.
    """
    groups: dict[str, list[Job]] = {}
    for number, job in enumerate(job for job in jobs if job.windows):
        groups.setdefault(f"alone {number}" if job.request.question is None else job.request.question, []).append(job)
    found = []
    for rivals in groups.values():
        alike = len({bool(job.request.context) for job in rivals}) == 1 and all(len(job.windows) == 1 for job in rivals)
        found += [rivals] if alike else [[job] for job in rivals]
    return found


def _answers(job: Job) -> list[Answer]:
    request = job.request
    key = request.question or key_of([*request.context, -1, *request.continuation])
    length = len(request.continuation) if request.length is None else request.length
    return [
        Answer(
            np.array([*pair.context, *pair.continuation], np.int64),
            len(pair.context),
            f"{key}/{number}" if number else key,
            max(length, 1e-9),
        )
        for number, pair in enumerate(job.windows)
    ]
