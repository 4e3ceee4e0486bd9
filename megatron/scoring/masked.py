"""Log-likelihoods of continuations under masked diffusion: the bound over all orders, the chain rule in one, greedy.

Only tokens of the continuation are masked. The sequence ends with the continuation; nothing is appended.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron.model.transformer import Transformer
from megatron.randomness import stream
from megatron.scoring.batched_forward import Limits, MaskedSequence, Prediction, predict_sequences
from megatron.scoring.mask_designs import Design, balanced_design, exhaustive_design, full_mask
from megatron.scoring.pending import Choices, PendingRequest, combine_rounds, undecided
from megatron.scoring.requests import REPLICATES, Score, Scoring

CHAIN_SEQUENCES = 4096  # sequences of the chain rule that exist at one time


class MaskedScorer:
    """Scores continuations with a masked-diffusion model.

    The bound of a document's choices:

    1. One sequence per choice with the whole continuation masked. It is exact for one token, and it is the control
       variate of all later samples.
    2. Sampling rounds with balanced mask designs; all choices of a document share the noise. A continuation with fewer
       masks than samples is evaluated at every mask instead, which is exact.
    3. After each round, choices that are clearly worse stop sampling (successive elimination), see `undecided`.
    """

    def __init__(self, model: Transformer, scoring: Scoring, limits: Limits):
        self.model = model
        self.scoring = scoring
        self.limits = limits

    def score(self, documents: Sequence[Choices]) -> None:
        """Evaluate what the settings ask for, for all choices of all documents; `result` returns it."""
        requests = [request for choices in documents for request in choices]
        scoring = self.scoring
        if not scoring.only_generate:
            if scoring.method == "chain":
                for request in requests:
                    self._chain(request)
            else:
                self._bounds(documents)
        if not scoring.only_mc_nll and (scoring.only_generate or scoring.method == "bound"):
            self._greedy(requests)

    def result(self, request: PendingRequest) -> Score:
        """Return the score of a request after `score`."""
        if self.scoring.only_generate:
            return Score(float("nan"), request.greedy, forward_tokens=request.forward_tokens)
        nats = request.exact
        error = 0.0
        if nats is None:
            nats, error = combine_rounds(np.array(request.rounds), request.round_sizes)
        bound = self.scoring.method == "bound" and request.size > 1
        return Score(
            -nats,
            request.greedy,
            standard_error=error,
            samples=request.samples,
            forward_tokens=request.forward_tokens,
            upper_bound=bound,
        )

    # ------------------------------------------------------------------------------------ the bound

    def _bounds(self, documents: Sequence[Choices]) -> None:
        """Estimate the bounds; choices of one document are sampled in rounds, until the best one is known."""
        requests = [request for choices in documents for request in choices]
        self._evaluate_full_masks(requests)
        decide_at = self.scoring.decide_at
        contested_documents = [choices for choices in documents if len(choices) > 1 and decide_at]
        contested = {id(request) for choices in contested_documents for request in choices}
        self._sample([request for request in requests if id(request) not in contested], 0, self.scoring.num_mc)
        for round_index, total in enumerate(self._round_totals()):
            open_requests = [
                request
                for choices in contested_documents
                for request in (undecided(choices, decide_at) if round_index else choices)
            ]
            self._sample(open_requests, round_index, total)

    def _round_totals(self) -> list[int]:
        """Return the total samples of an undecided request after each round: twice those of the round before."""
        totals = [1 + 2 * REPLICATES]
        while 2 * totals[-1] < self.scoring.num_mc:
            totals.append(2 * totals[-1])
        # the last round has at least one sample per replicate
        return [total for total in totals if total + REPLICATES <= self.scoring.num_mc] + [self.scoring.num_mc]

    def _evaluate_full_masks(self, requests: list[PendingRequest]) -> None:
        designs = [full_mask(request.size) for request in requests]
        for request, design, (prediction,) in zip(requests, designs, self._evaluate(requests, designs), strict=True):
            request.full_mask = prediction
            request.mean_nll[design.masked[0].tobytes()] = float(prediction.nll.mean())
            if request.size == 1:
                request.exact = float(prediction.nll.sum())

    def _sample(self, requests: list[PendingRequest], round_index: int, total: int) -> None:
        """Bring every request to `total` samples: every mask of a short continuation, else a round of replicates."""
        requests = [request for request in requests if request.exact is None]
        short = [request for request in requests if 2**request.size - 1 <= total]
        designs = [exhaustive_design(request.size) for request in short]
        for request, means, design in zip(short, self._mean_nlls(short, designs), designs, strict=True):
            request.exact = float(design.weights @ means)
        long = [request for request in requests if request.exact is None]
        first_round = 1 if round_index == 0 else 0  # which includes the fully masked sequence
        round_designs = []
        for request in long:
            samples = (total - sum(request.round_sizes) - first_round) // REPLICATES
            replicates = [self._design(request, round_index, index, samples) for index in range(REPLICATES)]
            masked = np.concatenate([design.masked for design in replicates])
            round_designs.append(Design(masked, np.concatenate([design.weights for design in replicates])))
        for request, design, means in zip(long, round_designs, self._mean_nlls(long, round_designs), strict=True):
            # control variate: the fully masked pass tells how difficult the tokens of a mask are; its mean is known
            assert request.full_mask is not None
            full_nll = request.full_mask.nll
            difficulty = design.masked @ full_nll / design.masked.sum(1) - full_nll.mean()
            weighted = (design.weights * (means - difficulty)).reshape(REPLICATES, -1)
            request.rounds.append(full_nll.mean() + weighted.sum(1))
            request.round_sizes.append(len(design.weights) + first_round)

    def _design(self, request: PendingRequest, round_index: int, replicate: int, samples: int) -> Design:
        """Return the design of one replicate: equal for choices of one length, and similar for the others."""
        draw = stream(self.scoring.eval_seed, f"score {request.key}", round_index, replicate)
        shift = draw.random()
        return balanced_design(request.size, samples, shift, np.argsort(np.argsort(draw.random(request.size))))

    def _mean_nlls(self, requests: list[PendingRequest], designs: list[Design]) -> list[np.ndarray]:
        """Return the mean NLL of each mask of each design, [R]; no mask of a short continuation is evaluated twice."""
        new_designs = []
        for request, design in zip(requests, designs, strict=True):
            if 2**request.size - 1 <= self.scoring.num_mc:
                masks = [mask for mask in np.unique(design.masked, axis=0) if mask.tobytes() not in request.mean_nll]
                new_designs.append(Design(np.array(masks, bool).reshape(-1, request.size), np.ones(len(masks))))
            else:
                new_designs.append(design)
        results = []
        evaluations = self._evaluate(requests, new_designs)
        for request, design, new, predictions in zip(requests, designs, new_designs, evaluations, strict=True):
            means = [float(prediction.nll.mean()) for prediction in predictions]
            if new is not design:
                request.mean_nll |= {mask.tobytes(): mean for mask, mean in zip(new.masked, means, strict=True)}
                means = [request.mean_nll[mask.tobytes()] for mask in design.masked]
            results.append(np.array(means))
        return results

    # ------------------------------------------------------------------------------------ one order, and greedy

    def _chain(self, request: PendingRequest) -> None:
        """Score a request exactly in one order: a sequence per token, with the context and earlier tokens visible."""
        size = request.size
        order = self._chain_order(request)
        turns = np.argsort(order)  # [n], when each token is predicted
        nats = 0.0
        greedy = True
        for start in range(0, size, CHAIN_SEQUENCES):
            tokens = order[start : start + CHAIN_SEQUENCES]
            masks = turns >= np.arange(start, start + len(tokens))[:, None]  # [R, n]
            targets = tokens[:, None]
            sequences = [self._sequence(request, *pair) for pair in zip(masks, targets, strict=True)]
            for token, prediction in zip(tokens, self._predict(sequences), strict=True):
                nats += float(prediction.nll[0])
                greedy &= bool(prediction.best[0] == request.sequence[request.start + token])
            self._count(request, len(sequences), samples=True)
        request.exact = nats
        request.greedy = None if self.scoring.only_mc_nll else greedy

    def _chain_order(self, request: PendingRequest) -> np.ndarray:
        if self.scoring.chain_order == "random":
            return np.argsort(stream(self.scoring.eval_seed, f"order {request.key}").random(request.size))
        return np.arange(request.size)[:: 1 if self.scoring.chain_order == "left-to-right" else -1]

    def _greedy(self, requests: list[PendingRequest]) -> None:
        """Determine which continuations are greedy: the model unmasks its most confident token, one at a time.

        As long as the unmasked tokens equal those of the continuation, the next input is a mask of the continuation
        itself; the first other token ends it.
        """
        masks = [np.ones(request.size, bool) for request in requests]
        active = list(range(len(requests)))
        full_masks = [request.full_mask for request in requests]
        predictions = {index: prediction for index, prediction in enumerate(full_masks) if prediction is not None}
        missing = [index for index in active if index not in predictions]
        predictions |= zip(missing, self._predict_masked(requests, masks, missing), strict=True)
        while active:
            for index in active:
                request, prediction = requests[index], predictions[index]
                most_confident = int(prediction.confidence.argmax())
                token = masks[index].nonzero()[0][most_confident]
                masks[index][token] = False
                if prediction.best[most_confident] != request.sequence[request.start + token]:
                    request.greedy = False
                elif not masks[index].any():
                    request.greedy = True
            active = [index for index in active if requests[index].greedy is None]
            predictions = dict(zip(active, self._predict_masked(requests, masks, active), strict=True))

    def _predict_masked(
        self, requests: list[PendingRequest], masks: list[np.ndarray], indices: list[int]
    ) -> list[Prediction]:
        """Return the predictions at all masked tokens of the requests at `indices`."""
        sequences = [self._sequence(requests[index], masks[index]) for index in indices]
        for index in indices:
            self._count(requests[index], 1, samples=False)
        return self._predict(sequences)

    # ------------------------------------------------------------------------------------ sequences of the model

    def _evaluate(self, requests: list[PendingRequest], designs: list[Design]) -> list[list[Prediction]]:
        """Return the predictions at every mask of the design of each request; all requests share batches."""
        sequences = [
            self._sequence(request, mask)
            for request, design in zip(requests, designs, strict=True)
            for mask in design.masked
        ]
        predictions = iter(self._predict(sequences))
        results = []
        for request, design in zip(requests, designs, strict=True):
            results.append([next(predictions) for _ in design.masked])
            self._count(request, len(design.masked), samples=True)
        return results

    def _sequence(self, request: PendingRequest, mask: np.ndarray, targets: np.ndarray | None = None) -> MaskedSequence:
        """Return the model's input for one `mask` [n] of a continuation of n tokens.

        `targets` are indices in [0, n), by default all masked tokens. A context of three tokens and a continuation of
        four, two of them masked:

            index in the sequence    0    1    2  |  3     4     5     6
            sequence                c0   c1   c2  |  x0    x1    x2    x3
            mask                                  |  0     1     0     1
            tokens                  c0   c1   c2  |  x0  [MASK]  x2  [MASK]
            positions, targets                    |      4: x1       6: x3
            unconditional (--cfg)    M    M    M  |  x0  [MASK]  x2  [MASK]     M = [MASK]
        """
        masked_positions = request.start + mask.nonzero()[0]
        positions = masked_positions if targets is None else request.start + targets
        mask_id = self.model.vocabulary.mask_id
        tokens = request.sequence.copy()
        tokens[masked_positions] = mask_id
        unconditional = None
        if self.scoring.cfg:
            unconditional = tokens.copy()
            unconditional[: request.start] = mask_id
        return MaskedSequence(tokens, positions, request.sequence[positions], unconditional)

    def _predict(self, sequences: list[MaskedSequence]) -> list[Prediction]:
        return predict_sequences(self.model, sequences, self.limits, self.scoring.cfg)

    def _count(self, request: PendingRequest, sequences: int, samples: bool) -> None:
        request.samples += sequences if samples else 0
        request.forward_tokens += sequences * len(request.sequence) * (2 if self.scoring.cfg else 1)


def content_key(tokens: Sequence[int]) -> str:
    """Return a key of the Monte-Carlo noise of a request without a document: a hash of its tokens."""
    return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=16).hexdigest()
