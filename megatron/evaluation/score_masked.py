"""Likelihoods of continuations under masked diffusion: the bound over all orders, the chain rule in one, and greedy.

Of a sequence, context and continuation, only tokens of the continuation are hidden, and nothing stands behind it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.evaluation.batched_forward import Limits, Prediction, Row, ask
from megatron.evaluation.mask_designs import Design, all_sets, balanced, everything
from megatron.evaluation.requests import REPLICATES, Score, Scoring
from megatron.model.transformer import Transformer
from megatron.randomness import stream

ROWS = 4096  # of the chain rule that are made at one time


@dataclass(eq=False)
class Answer:
    """A continuation under way: what is known of its likelihood so far."""

    sequence: np.ndarray  # [T] ids of context and continuation
    start: int  # where the continuation begins
    key: str  # what its noise is keyed by; rivals have the same
    length: float
    first: Prediction | None = None  # when all of it is hidden
    exact: float | None = None  # nats
    rounds: list[np.ndarray] = field(default_factory=list)  # [replicates] nats each
    sizes: list[int] = field(default_factory=list)  # rows of each round
    known: dict[bytes, float] = field(default_factory=dict)  # mean nll of hidden sets, where all may be listed
    greedy: bool | None = None
    samples: int = 0
    tokens: int = 0

    @property
    def size(self) -> int:
        """The number of tokens of the continuation."""
        return len(self.sequence) - self.start

    def nats(self, rounds: int) -> np.ndarray:
        """Return its replicates of every round, [rounds, replicates]; all the same where it is known exactly."""
        if self.exact is not None:
            return np.full((rounds, REPLICATES), self.exact)
        return np.array(self.rounds[:rounds])


def combined(replicates: np.ndarray, sizes: Sequence[int]) -> tuple[float, float]:
    """Return the mean of `replicates` [rounds, R] and its standard error; a round counts as its rows do."""
    share = np.array(sizes) / np.sum(sizes)
    variances = replicates.var(axis=1, ddof=1) / replicates.shape[1]
    return float(share @ replicates.mean(axis=1)), float(np.sqrt(share**2 @ variances))


class MaskedScorer:
    """Scores continuations with a masked-diffusion model."""

    def __init__(self, model: Transformer, scoring: Scoring, limits: Limits):
        self.model, self.scoring, self.limits = model, scoring, limits

    def score(self, questions: Sequence[Sequence[Answer]]) -> None:
        """Find out of every answer what the settings ask for."""
        answers = [answer for question in questions for answer in question]
        scoring = self.scoring
        if not scoring.only_generate:
            if scoring.method == "chain":
                for answer in answers:
                    self._chain(answer)
            else:
                self._bounds(questions)
        if not scoring.only_mc_nll and (scoring.only_generate or scoring.method == "bound"):
            self._greedy(answers)

    def result(self, answer: Answer) -> Score:
        """Return what was found."""
        scoring, nats, error = self.scoring, answer.exact, 0.0
        if scoring.only_generate:
            return Score(float("nan"), answer.greedy, 0.0, 0, answer.tokens)
        if nats is None:
            nats, error = combined(np.array(answer.rounds), answer.sizes)
        bound = scoring.method == "bound" and answer.size > 1
        return Score(-nats, answer.greedy, error, answer.samples, answer.tokens, bound)

    # ------------------------------------------------------------------------------------ the bound

    def _bounds(self, questions: Sequence[Sequence[Answer]]) -> None:
        """Estimate the bounds: those of rivals in rounds, until it is known which is the best."""
        answers = [answer for question in questions for answer in question]
        self._hide_all(answers)
        most, decide_at = self.scoring.num_mc, self.scoring.decide_at
        contests = [question for question in questions if len(question) > 1 and decide_at]
        contested = {id(answer) for question in contests for answer in question}
        self._sample([answer for answer in answers if id(answer) not in contested], 0, most)
        for turn, total in enumerate(self._totals()):
            waiting = [each for question in contests for each in (undecided(question, decide_at) if turn else question)]
            self._sample(waiting, turn, total)

    def _totals(self) -> list[int]:
        """Return how many samples an undecided answer has had after each round: twice as many as before."""
        totals = [1 + 2 * REPLICATES]
        while 2 * totals[-1] < self.scoring.num_mc:
            totals.append(2 * totals[-1])
        # a round has a row for each replicate
        return [total for total in totals if total + REPLICATES <= self.scoring.num_mc] + [self.scoring.num_mc]

    def _hide_all(self, answers: list[Answer]) -> None:
        for answer, said in zip(answers, self._read(answers, [everything(each.size) for each in answers]), strict=True):
            answer.first = said[0]
            answer.known[everything(answer.size).hidden[0].tobytes()] = float(said[0].nll.mean())
            if answer.size == 1:
                answer.exact = float(said[0].nll.sum())

    def _sample(self, answers: list[Answer], turn: int, total: int) -> None:
        """Bring every answer to `total` samples: all hidden sets of a short one, else a round of replicates."""
        answers = [answer for answer in answers if answer.exact is None]
        short = [answer for answer in answers if 2**answer.size - 1 <= total]
        designs = [all_sets(answer.size) for answer in short]
        for answer, means, design in zip(short, self._means(short, designs), designs, strict=True):
            answer.exact = float(design.weights @ means)
        long = [answer for answer in answers if answer.exact is None]
        plans = []
        for answer in long:
            rows = (total - sum(answer.sizes) - (turn == 0)) // REPLICATES
            plans.append([self._design(answer, turn, replicate, rows) for replicate in range(REPLICATES)])
        joined = [
            Design(*(np.concatenate([getattr(one, part) for one in plan]) for part in ("hidden", "weights")))
            for plan in plans
        ]
        for answer, design, means in zip(long, joined, self._means(long, joined), strict=True):
            # how hard the tokens are when all are hidden is known: what that explains is no noise
            hardness = design.hidden @ answer.first.nll / design.hidden.sum(1) - answer.first.nll.mean()
            counted = (design.weights * (means - hardness)).reshape(REPLICATES, -1)
            answer.rounds.append(answer.first.nll.mean() + counted.sum(1))
            answer.sizes.append(len(design.weights) + (turn == 0))

    def _design(self, answer: Answer, turn: int, replicate: int, rows: int) -> Design:
        """Return the hidden sets of one replicate: the same for rivals of one length, and alike for others."""
        draw = stream(self.scoring.eval_seed, f"score {answer.key}", turn, replicate)
        shift = draw.random()
        return balanced(answer.size, rows, shift, np.argsort(np.argsort(draw.random(answer.size))))

    def _means(self, answers: list[Answer], designs: list[Design]) -> list[np.ndarray]:
        """Return the mean nll of the hidden sets of each design, [R]; no set of a short answer is read twice."""
        asked = []
        for answer, design in zip(answers, designs, strict=True):
            if 2**answer.size - 1 <= self.scoring.num_mc:
                fresh = [row for row in np.unique(design.hidden, axis=0) if row.tobytes() not in answer.known]
                asked.append(Design(np.array(fresh, bool).reshape(-1, answer.size), np.ones(len(fresh))))
            else:
                asked.append(design)
        found = []
        for answer, design, new, said in zip(answers, designs, asked, self._read(answers, asked), strict=True):
            means = [float(each.nll.mean()) for each in said]
            if new is not design:
                answer.known |= {row.tobytes(): mean for row, mean in zip(new.hidden, means, strict=True)}
                means = [answer.known[row.tobytes()] for row in design.hidden]
            found.append(np.array(means))
        return found

    # ------------------------------------------------------------------------------------ one order, and greedy

    def _chain(self, answer: Answer) -> None:
        """Score an answer exactly in one order: a row a token, which sees the context and what came before it."""
        size, nats, greedy = answer.size, 0.0, True
        order = self._order(answer)
        turns = np.argsort(order)  # when each token comes
        for begin in range(0, size, ROWS):
            block = order[begin : begin + ROWS]
            hidden = turns >= np.arange(begin, begin + len(block))[:, None]
            rows = [self._row(answer, mask, place) for mask, place in zip(hidden, block[:, None], strict=True)]
            for token, said in zip(block, self._ask(rows), strict=True):
                nats += float(said.nll[0])
                greedy &= bool(said.best[0] == answer.sequence[answer.start + token])
            self._count(answer, len(rows), samples=True)
        answer.exact = nats
        answer.greedy = None if self.scoring.only_mc_nll else greedy

    def _order(self, answer: Answer) -> np.ndarray:
        size = answer.size
        if self.scoring.chain_order == "random":
            return np.argsort(stream(self.scoring.eval_seed, f"order {answer.key}").random(size))
        return np.arange(size)[:: 1 if self.scoring.chain_order == "left-to-right" else -1]

    def _greedy(self, answers: list[Answer]) -> None:
        """Find out which answers the model gives itself, if it says the token that it is surest of, one at a time.

        As long as what it says is the answer, what is seen is the answer's; the first other token ends it.
        """
        hidden = [np.ones(answer.size, bool) for answer in answers]
        going = list(range(len(answers)))
        fresh = [index for index in going if answers[index].first is None]
        for index, said in zip(fresh, self._read_rows(answers, hidden, fresh), strict=True):
            answers[index].first = said
        said = {index: answers[index].first for index in going}
        while going:
            for index in going:
                answer, surest = answers[index], int(said[index].confidence.argmax())
                place = hidden[index].nonzero()[0][surest]
                hidden[index][place] = False
                if said[index].best[surest] != answer.sequence[answer.start + place]:
                    answer.greedy = False
                elif not hidden[index].any():
                    answer.greedy = True
            going = [index for index in going if answers[index].greedy is None]
            said = dict(zip(going, self._read_rows(answers, hidden, going), strict=True))

    def _read_rows(self, answers, hidden, chosen) -> list[Prediction]:
        rows = [self._row(answers[index], hidden[index]) for index in chosen]
        for index in chosen:
            self._count(answers[index], 1, samples=False)
        return self._ask(rows)

    # ------------------------------------------------------------------------------------ rows

    def _read(self, answers: list[Answer], designs: list[Design]) -> list[list[Prediction]]:
        """Return what is said in every row of the design of each answer; all answers are read together."""
        rows = [
            self._row(answer, mask) for answer, design in zip(answers, designs, strict=True) for mask in design.hidden
        ]
        said, found = iter(self._ask(rows)), []
        for answer, design in zip(answers, designs, strict=True):
            found.append([next(said) for _ in design.hidden])
            self._count(answer, len(design.hidden), samples=True)
        return found

    def _row(self, answer: Answer, hidden: np.ndarray, asked: np.ndarray | None = None) -> Row:
        """Return the sequence of an answer with `hidden` [n] masked; `asked` are places of [n], default the hidden."""
        masked = answer.start + hidden.nonzero()[0]
        places = masked if asked is None else answer.start + asked
        tokens, mask_id = answer.sequence.copy(), self.model.vocabulary.mask_id
        tokens[masked] = mask_id
        other = None
        if self.scoring.cfg:
            other = tokens.copy()
            other[: answer.start] = mask_id
        return Row(tokens, places, answer.sequence[places], other)

    def _ask(self, rows: list[Row]) -> list[Prediction]:
        return ask(self.model, rows, self.limits, self.scoring.cfg)

    def _count(self, answer: Answer, rows: int, samples: bool) -> None:
        answer.samples += rows if samples else 0
        answer.tokens += rows * len(answer.sequence) * (2 if self.scoring.cfg else 1)


def undecided(question: Sequence[Answer], decide_at: float) -> list[Answer]:
    """Return the answers that may yet be the best, by nats or by nats a length, unless it is known which one is.

    The difference of two answers has less noise than each, as they share their masks; it is that of the rounds which
    both have had.
    """
    if len(question) == 1:
        return list(question)
    left: list[Answer] = []
    for lengths in ([1.0] * len(question), [answer.length for answer in question]):
        values = [_estimate(answer) / length for answer, length in zip(question, lengths, strict=True)]
        best = int(np.argmin(values))
        rivals = [
            index
            for index in range(len(question))
            if index != best and not _behind(question[index], question[best], lengths[index], lengths[best], decide_at)
        ]
        left += [question[index] for index in [best, *rivals] if rivals and question[index] not in left]
    return left


def _estimate(answer: Answer) -> float:
    return answer.exact if answer.exact is not None else combined(np.array(answer.rounds), answer.sizes)[0]


def _behind(rival: Answer, best: Answer, rival_length: float, best_length: float, decide_at: float) -> bool:
    """Return whether `rival` is known to be worse than `best`."""
    if rival.exact is not None and best.exact is not None:
        return True  # nothing more can be known
    rounds = min(len(answer.rounds) for answer in (rival, best) if answer.exact is None)
    sizes = (rival if rival.exact is None else best).sizes[:rounds]
    gap, error = combined(rival.nats(rounds) / rival_length - best.nats(rounds) / best_length, sizes)
    return gap > decide_at * error


def key_of(tokens: Sequence[int]) -> str:
    """Return what the noise of a request is keyed by: its content."""
    return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=16).hexdigest()
