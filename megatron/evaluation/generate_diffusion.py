"""Text from masked diffusion: places that hold [MASK] are filled in, some at each reading of the whole.

A reading gives, at every hidden place, the probabilities of its token given all that is visible. Some places are
chosen, and a token is drawn for each of them. With one place a step, chosen at random, and temperature 1, texts come
from the any-order model itself; more places a step are drawn as if they were independent of one another.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.evaluation.sampling import Sampling, choose
from megatron.model.transformer import Transformer
from megatron.randomness import stream

ROWS = 1024  # places whose logits exist at one time

# told after each step: its number from 1, the rows of the call that were read, and their tokens [R, T]
OnStep = Callable[[int, list[int], Tensor], None]


@torch.no_grad()
def fill(
    model: Transformer,
    texts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    keyed: list[tuple[int, int]],
    eod: int,
    open_end: bool,
    advance: Callable[[int], None] = lambda tokens: None,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """Return `texts` with every [MASK] replaced by a token of the tokenizer; what stands there already stays.

    `keyed` is what the draws of each text are keyed by, beside the seed. With an `open_end` what comes behind the first
    `eod` that is filled in does not matter, and may be left as it is; else a text goes on behind its gaps, and no `eod`
    is filled in. `advance` is told how many places are decided.
    """
    mask_id = model.vocabulary.mask_id
    groups, filled = defaultdict(list), [list(text) for text in texts]
    for index, text in enumerate(texts):
        # texts of one shape are read together, so that no filler is ever seen
        groups[len(text), text.count(mask_id)].append(index)
    for (_, gaps), members in sorted(groups.items(), reverse=True):
        for start in range(0, len(members) if gaps else 0, batch_size):
            rows = members[start : start + batch_size]
            told = on_step and (lambda step, alive, tokens: on_step(step, [rows[row] for row in alive], tokens))
            chosen = [texts[row] for row in rows], [keyed[row] for row in rows]
            batch = _Filling(model, *chosen, sampling, eod, open_end)
            for row, text in zip(rows, batch.run(advance, told), strict=True):
                filled[row] = text
    return filled


class _Filling:
    """The filling of B texts of T tokens, of which each hides L."""

    def __init__(
        self, model: Transformer, texts: list[list[int]], keyed: list, sampling: Sampling, eod: int, open_end: bool
    ):
        self.model, self.sampling, self.keyed, self.eod, self.open_end = model, sampling, keyed, eod, open_end
        self.device, self.mask_id = model.embed_tokens.weight.device, model.vocabulary.mask_id
        self.tokens = torch.tensor(texts, device=self.device)  # [B, T]
        gaps = self.tokens == self.mask_id
        self.places = gaps.nonzero()[:, 1].view(len(texts), -1)  # [B, L], from left to right
        self.length = self.places.shape[1]
        self.steps = sampling.steps or self.length
        size = sampling.block_length or self.length
        self.blocks = torch.arange(self.length, device=self.device) // size  # [L]
        self.alive = torch.arange(len(texts), device=self.device)

    def run(self, advance: Callable[[int], None], on_step: OnStep | None) -> list[list[int]]:
        """Return the filled texts."""
        for step in range(self.steps):
            before, after = (self.length * turn // self.steps for turn in (step, step + 1))
            self._step(step, before, after)
            alive = self.alive.tolist()
            advance(len(alive) * (after - before))
            if on_step:
                on_step(step + 1, alive, self.tokens[self.alive])
            self._leave(advance, after)
            if not len(self.alive):
                break
        return self.tokens.tolist()

    def _step(self, step: int, before: int, after: int) -> None:
        """Read the texts and fill as many of their places that `after` of L hold tokens, where `before` of L did."""
        draws = self._draws(step)  # [3, R, L]
        tokens, places = self.tokens[self.alive], self.places[self.alive]
        answers = tokens.gather(1, places)  # [R, L]
        hidden = answers == self.mask_id
        again = self._hidden_again(~hidden, draws[2], before, after)
        counts = after - before + again.sum(1)
        if counts.any():
            states = self.model.hidden_states(Batch.unscored(tokens, causal=False))
            states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))  # [R, L, H]
            chosen = self._first(self._scores(states, hidden, counts, draws[1]), counts)
            answers[chosen] = self._choose(states[chosen], draws[0][chosen])
            answers[again] = self.mask_id
            self.tokens[self.alive] = tokens.scatter(1, places, answers)

    def _draws(self, step: int) -> Tensor:
        """Return a uniform number for the token, the turn and the hiding of each place, fp64 [3, R, L]."""
        keyed = [self.keyed[row] for row in self.alive.tolist()]
        if not self.sampling.draws:
            return torch.zeros((3, len(keyed), self.length), dtype=torch.float64, device=self.device)
        drawn = [stream(self.sampling.seed, "filling", *key, step).random((3, self.length)) for key in keyed]
        return torch.from_numpy(np.stack(drawn, axis=1)).to(self.device)

    def _hidden_again(self, filled: Tensor, draws: Tensor, before: int, after: int) -> Tensor:
        """Return which of the filled places [R, L] lose their token in this step, to be filled anew in a later one.

        Each does with the probability of --remask, lowered where more could be lost than may be hidden after the step
        (ReMDM-cap, 2503.00307, with exact numbers of hidden places in place of their means).
        """
        room = self.length - after
        if not self.sampling.remask or not before or not room:
            return torch.zeros_like(filled)
        share = min(self.sampling.remask, room / before)
        lost = filled & (draws < share)
        return lost & self._first(torch.where(lost, -draws, float("-inf")), lost.sum(1).clamp(max=room))

    def _scores(self, states: Tensor, hidden: Tensor, counts: Tensor, draws: Tensor) -> Tensor:
        """Return how early each place [R, L] is to be filled: highest first, -inf where it is not."""
        # the last block that the next places reach
        ordinal = hidden.cumsum(1)
        reached = torch.where(hidden & (ordinal <= counts[:, None]), self.blocks, -1).amax(1)
        open_blocks = hidden & (self.blocks <= reached[:, None])
        scores = torch.full_like(draws, float("-inf"))
        if self.sampling.order == "random":
            scores[open_blocks] = draws[open_blocks]
        else:
            pieces = states[open_blocks].split(ROWS)
            found = [certainty(self._logits(piece), self.sampling.order) for piece in pieces]
            scores[open_blocks] = torch.cat(found).double()
        # an earlier block goes before a later one, however certain
        earlier = open_blocks & (self.blocks < reached[:, None])
        return scores.masked_fill(earlier, float("inf"))

    def _choose(self, states: Tensor, draws: Tensor) -> Tensor:
        """Return the tokens [N] of what the head reads, [N, H]; `draws` [N] decide them."""
        pieces = zip(states.split(ROWS), draws.split(ROWS), strict=True)
        return torch.cat([choose(self._logits(piece), self.sampling, drawn) for piece, drawn in pieces])

    def _logits(self, states: Tensor) -> Tensor:
        """Return fp32 logits [N, V] of what the head reads, [N, H]."""
        logits = self.model.head(states)
        if not self.open_end:
            logits[:, self.eod] = float("-inf")
        return logits

    def _first(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Return where in each row of `scores` [R, L] its `counts` [R] highest are; of equals the leftmost."""
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
        return ranks < counts[:, None]

    def _leave(self, advance: Callable[[int], None], after: int) -> None:
        """Read texts no more that are decided: nothing is hidden before their first `eod`."""
        if not self.open_end or self.sampling.remask:
            return
        answers = self.tokens[self.alive].gather(1, self.places[self.alive])
        open_before_end = ((answers == self.mask_id) & ((answers == self.eod).cumsum(1) == 0)).any(1)
        advance(int((~open_before_end).sum()) * (self.length - after))
        self.alive = self.alive[open_before_end]


def certainty(logits: Tensor, order: str) -> Tensor:
    """Return how sure the model is of each row of `logits` [N, V], [N]; higher is surer.

    confidence: the largest probability (LLaDA, 2502.09992); margin: how far it is above the second (2502.06768);
    entropy: that of the distribution, negated. By the model's own distribution, at temperature 1.
    """
    if order == "entropy":
        return -torch.special.entr(logits.softmax(-1)).sum(-1)
    highest = (logits.topk(2).values - logits.logsumexp(-1, keepdim=True)).exp()
    return highest[:, 0] if order == "confidence" else highest[:, 0] - highest[:, 1]
