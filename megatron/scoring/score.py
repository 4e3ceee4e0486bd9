"""Log-likelihoods of continuations given contexts, by trained models: what every downstream task is made of.

Next-token prediction gives exact values. Masked diffusion gives an upper bound of the negative log-likelihood (the mean
over all orders of the tokens) with its Monte-Carlo error, the exact likelihood of an unmasking policy, or the bound of
several random orders. Sequences longer than the model was trained on are split as in lm-eval: contexts are truncated on
the left, and long continuations are scored in rolling windows. Block diffusion is scored block by block.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron.config.sections import DataConfig, ObjectiveConfig
from megatron.generation.generate import check_empty_prompt
from megatron.model.transformer import Transformer
from megatron.objectives.registry import capabilities
from megatron.scoring.batched_forward import Limits
from megatron.scoring.causal import Finished, Pair, score_causal
from megatron.scoring.inputs import BlockInputs, MaskedInputs
from megatron.scoring.masked import MaskedScorer, content_key
from megatron.scoring.pending import PendingRequest
from megatron.scoring.permuted import score_permuted
from megatron.scoring.requests import Request, Score, Scoring

logger = logging.getLogger(__name__)

PENDING_DOCUMENTS = 128  # documents that masked diffusion scores at one time


@dataclass
class Job:
    """A distinct request, the indices of all requests equal to it, its windows and their scores so far."""

    request: Request
    indices: list[int]
    windows: list[Pair]
    truncated_tokens: int
    scores: list[Score] = field(default_factory=list)


AddWindow = Callable[[Job, Score], None]


def score(
    model: Transformer,
    objective: ObjectiveConfig | str,
    requests: Sequence[Request],
    scoring: Scoring,
    *,
    eod: int,
    seq_length: int,
    data: DataConfig | None = None,
    finished: Finished = lambda index, score: None,
) -> list[Score]:
    """Return the score of every request; `finished(index, score)` is called as soon as each is known.

    Equal requests are scored once. The likelihood of a whole text is that of a continuation of the empty context. A
    model that was trained both causally and bidirectionally (dual) is scored causally unless `scoring` names a
    likelihood. `objective` is that of a run, or the name of one that has its default configuration.

    Raises: ConfigurationError for settings without effect and, where `data` is the configuration of a run that masked
    attention across documents or the first token after an end of document, for an empty context.
    """
    objective = ObjectiveConfig(objective=objective) if isinstance(objective, str) else objective
    scoring.check(objective, seq_length)
    if data is not None and any(not request.context for request in requests):
        check_empty_prompt(data)
    reads_last = scoring.form(objective.objective) in ("masked", "blocks")  # causal models have it as a target only
    longest = seq_length - reads_last
    jobs = _jobs(requests, eod, longest)
    split_jobs = sum(len(job.windows) > 1 for job in jobs)
    if split_jobs:
        logger.info("%d of %d texts are longer than --seq-length %d: windows", split_jobs, len(jobs), seq_length)
    scores: dict[int, Score] = {}

    def add_window(job: Job, window_score: Score) -> None:
        job.scores.append(window_score)
        if len(job.scores) >= len(job.windows):
            total = replace(sum_windows(job.scores), truncated_tokens=job.truncated_tokens)
            for index in job.indices:
                scores[index] = total
                finished(index, total)

    for job in jobs:
        if not job.windows:
            add_window(job, Score(0.0, True))  # an empty continuation has log-likelihood 0
    if reads_last:
        _score_masked(model, objective, jobs, scoring, seq_length=seq_length, add_window=add_window)
    else:
        _score_causal(model, objective, jobs, scoring, add_window=add_window)
    return [scores[index] for index in range(len(requests))]


def _jobs(requests: Sequence[Request], eod: int, longest: int) -> list[Job]:
    jobs: dict[tuple, Job] = {}
    for index, request in enumerate(requests):
        context = tuple(request.context) or (eod,)
        continuation = tuple(request.continuation)
        content = (context, continuation, request.doc_key)
        if content not in jobs:
            pairs = list(windows(context, continuation, longest))
            jobs[content] = Job(request, [], pairs, truncated_tokens(context, continuation, longest))
        jobs[content].indices.append(index)
    return list(jobs.values())


def windows(context: tuple[int, ...], continuation: tuple[int, ...], longest: int) -> Iterator[Pair]:
    """Yield pairs of at most `longest` + 1 tokens whose log-likelihoods sum to that of `continuation`.

    Every token of the continuation is a target once. A continuation that fits keeps as much of the context as fits.
    Otherwise the windows are lm-eval's rolling windows: the first has the last token of the context as its context, and
    the last one has as many tokens before its targets as fit.
    """
    size = len(continuation)
    if 0 < size <= longest:
        yield Pair(context[-(longest + 1 - size) :], continuation)
        return
    tokens = (*context[-1:], *continuation)
    start = 1  # of the next targets
    while start <= size:
        end = min(start + longest, size + 1)
        yield Pair(tokens[end - longest - 1 : start], tokens[start:end])
        start = end


def truncated_tokens(context: Sequence[int], continuation: Sequence[int], longest: int) -> int:
    """Return the number of tokens at the beginning of the context that are in no window."""
    size = len(continuation)
    if size == 0:
        return 0
    room = longest + 1 - size if size <= longest else 1
    return max(0, len(context) - room)


def sum_windows(scores: list[Score]) -> Score:
    """Return the score of a continuation from the scores of its windows, whose errors are independent."""
    greedy = [score.is_greedy for score in scores]
    return Score(
        sum(score.log_likelihood for score in scores),
        None if None in greedy else all(greedy),
        standard_error=math.hypot(*(score.standard_error for score in scores)),
        samples=sum(score.samples for score in scores),
        forward_tokens=sum(score.forward_tokens for score in scores),
        upper_bound=any(score.upper_bound for score in scores),
    )


def _score_causal(
    model: Transformer, objective: ObjectiveConfig, jobs: list[Job], scoring: Scoring, *, add_window: AddWindow
) -> None:
    """Score jobs by causal passes, from left to right or in the orders that `scoring` names."""
    limits = Limits(scoring.batch_tokens, scoring.batch_rows)
    owners = [(job, number, pair) for job in jobs for number, pair in enumerate(job.windows)]
    pairs = [pair for *_, pair in owners]

    def finished(index: int, window_score: Score) -> None:
        add_window(owners[index][0], window_score)

    if scoring.form(objective.objective) == "permuted":
        keys = [_key(job, number) for job, number, _ in owners]
        score_permuted(model, pairs, keys, limits, scoring=scoring, finished=finished)
    else:
        target_positions = capabilities(objective.objective).target_positions or objective.target_positions
        score_causal(model, pairs, limits, finished, target_positions=target_positions)


def _score_masked(
    model: Transformer,
    objective: ObjectiveConfig,
    jobs: list[Job],
    scoring: Scoring,
    *,
    seq_length: int,
    add_window: AddWindow,
) -> None:
    """Score PENDING_DOCUMENTS documents at a time, those of similar length together."""
    limits = Limits(scoring.batch_tokens, scoring.batch_rows)
    inputs = MaskedInputs(model, limits, capabilities(objective.objective).masked_offset, scoring.cfg)
    if scoring.form(objective.objective) == "blocks":
        inputs = BlockInputs(model, limits, objective.diffusion_block_size, seq_length)
        for job in jobs:
            job.windows = [block for pair in job.windows for block in pair.in_blocks(inputs.block_size)]
    scorer = MaskedScorer(inputs, scoring)
    documents: list[list[tuple[Job, PendingRequest]]] = []
    for choices in _choices(jobs):
        pending = [(job, request) for job in choices for request in _pending_requests(job)]
        documents += [pending] if len(choices) > 1 else [[item] for item in pending]  # windows of a text do not compete
    documents.sort(key=lambda pending: -max(len(request.sequence) for _, request in pending))
    for start in range(0, len(documents), PENDING_DOCUMENTS):
        chunk = documents[start : start + PENDING_DOCUMENTS]
        scorer.score([[request for _, request in pending] for pending in chunk])
        for job, request in (item for pending in chunk for item in pending):
            add_window(job, scorer.result(request))


def _choices(jobs: list[Job]) -> list[list[Job]]:
    """Return the jobs grouped as choices of one document.

    A job is alone where it has no document, and where the jobs of a document are not comparable: one has several
    windows, or only some have a context (there the task compares each choice with itself without the context).
    """
    documents: dict[str, list[Job]] = {}
    for number, job in enumerate(job for job in jobs if job.windows):
        doc_key = job.request.doc_key
        documents.setdefault(f"alone {number}" if doc_key is None else doc_key, []).append(job)
    groups = []
    for choices in documents.values():
        same_kind = len({bool(job.request.context) for job in choices}) == 1
        comparable = same_kind and all(len(job.windows) == 1 for job in choices)
        groups += [choices] if comparable else [[job] for job in choices]
    return groups


def _pending_requests(job: Job) -> list[PendingRequest]:
    request = job.request
    length = len(request.continuation) if request.length is None else request.length
    return [
        PendingRequest(
            np.array([*pair.context, *pair.continuation], np.int64),
            len(pair.context),
            _key(job, number),
            max(length, 1e-9),
        )
        for number, pair in enumerate(job.windows)
    ]


def _key(job: Job, number: int) -> str:
    """Return the key of the Monte-Carlo noise of the window `number` of a job."""
    key = job.request.doc_key or content_key([*job.request.context, -1, *job.request.continuation])
    return f"{key}/{number}" if number else key
