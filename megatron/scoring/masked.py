"""Log-likelihoods of continuations under masked diffusion: the bound over all orders, policies, and greedy decoding.

Only tokens of the continuation are masked. The sequence ends with the continuation; nothing is appended.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron.randomness import stream
from megatron.scoring.batched_forward import Prediction
from megatron.scoring.chains import ChainScorer, count, has_all_orders
from megatron.scoring.inputs import Inputs
from megatron.scoring.mask_designs import Design, balanced_design, exhaustive_design, full_mask
from megatron.scoring.pending import Choices, PendingRequest, combine_rounds, undecided
from megatron.scoring.requests import REPLICATES, Score, Scoring


class MaskedScorer:
    """Scores continuations with a model of masked diffusion, or within blocks with one of block diffusion.

    The bound of a document's choices:

    1. One sequence per choice with the whole continuation masked. It is exact for one token, and it is the control
       variate of all later samples.
    2. Sampling rounds with balanced mask designs; all choices of a document share the noise. A continuation with fewer
       masks than samples is evaluated at every mask instead, which is exact.
    3. After each round, choices that are clearly worse stop sampling (successive elimination), see `undecided`.
    """

    def __init__(self, inputs: Inputs, scoring: Scoring):
        self.inputs = inputs
        self.scoring = scoring
        self.chains = ChainScorer(inputs, scoring)

    def score(self, documents: Sequence[Choices]) -> None:
        """Evaluate what the settings ask for, for all choices of all documents; `result` returns it."""
        requests = [request for choices in documents for request in choices]
        scoring = self.scoring
        if not scoring.only_generate:
            if scoring.likelihood == "chain":
                self.chains.score_chains(requests)
            elif scoring.likelihood == "iwae":
                self.chains.score_mixtures(requests)
            else:
                self._bounds(documents)
        if not scoring.only_mc_nll and (scoring.only_generate or scoring.likelihood != "chain"):
            self._greedy(requests)

    def result(self, request: PendingRequest) -> Score:
        """Return the score of a request after `score`."""
        if self.scoring.only_generate:
            return Score(float("nan"), request.greedy, forward_tokens=round(request.forward_tokens))
        nats, error = request.exact, request.error
        if nats is None:
            nats, error = combine_rounds(np.array(request.rounds), request.round_sizes)
        exact = {"chain": True, "iwae": has_all_orders(request.size, self.scoring.num_orders)}
        bound = not exact.get(self.scoring.likelihood or "bound", request.size == 1)
        return Score(
            -nats,
            request.greedy,
            standard_error=error,
            samples=request.samples,
            forward_tokens=round(request.forward_tokens),
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

    # ------------------------------------------------------------------------------------ greedy

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
        sequences = [self.inputs.sequence(requests[index], masks[index]) for index in indices]
        predictions = self.inputs.predict(sequences)
        for index, prediction in zip(indices, predictions, strict=True):
            count(requests[index], prediction, samples=0)
        return predictions

    def _evaluate(self, requests: list[PendingRequest], designs: list[Design]) -> list[list[Prediction]]:
        """Return the predictions at every mask of the design of each request; all requests share batches."""
        sequences = [
            self.inputs.sequence(request, mask)
            for request, design in zip(requests, designs, strict=True)
            for mask in design.masked
        ]
        predictions = iter(self.inputs.predict(sequences))
        results = []
        for request, design in zip(requests, designs, strict=True):
            results.append([next(predictions) for _ in design.masked])
            for prediction in results[-1]:
                count(request, prediction)
        return results


def content_key(tokens: Sequence[int]) -> str:
    """Return a key of the Monte-Carlo noise of a request without a document: a hash of its tokens."""
    return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=16).hexdigest()
