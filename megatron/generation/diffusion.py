"""Text by masked diffusion: [MASK] positions are filled over several steps, each a bidirectional forward pass.

A forward pass gives, at every masked position, the distribution of its token given all visible tokens. Some positions
are selected, and a token is sampled for each of them. One position per step, in random order and at temperature 1,
samples from the any-order model exactly; several positions per step are sampled as if they were independent.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.generation.certainty import certainty
from megatron.generation.policies import candidates, select_highest
from megatron.generation.sampling import Sampling, choose
from megatron.model.transformer import Transformer
from megatron.randomness import stream

DIRECTIONS = {"left-to-right": -1, "right-to-left": 1}  # priority of the next position, by order
LOGIT_POSITIONS = {"cpu": 256, "cuda": 1024}  # positions whose logits exist at one time, by device type

# called after so many positions are decided
Advance = Callable[[int], object]

# called after each step: its number from 1, the indices of the texts in this step, and their tokens [R, T]
OnStep = Callable[[int, list[int], Tensor], None]


@torch.no_grad()
def fill(
    model: Transformer,
    texts: list[list[int]],
    keys: list[tuple[int, int]],
    sampling: Sampling,
    *,
    batch_size: int,
    eod: int,
    open_end: bool,
    advance: Advance = lambda tokens: None,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """Return `texts` with every [MASK] replaced by a token of the tokenizer; all other tokens stay.

    With the seed, `keys` are the keys of each text's draws. With an `open_end` tokens after the first new `eod` do not
    matter and may stay [MASK]. Otherwise the text continues after its gaps, and `eod` is never filled in. `advance(n)`
    is called after n positions are decided.
    """
    mask_id = model.vocabulary.mask_id
    groups = defaultdict(list)
    filled = [list(text) for text in texts]
    for index, text in enumerate(texts):
        # texts of the same length and number of masked tokens share a batch, so nothing is padded
        groups[len(text), text.count(mask_id)].append(index)
    for (_, num_masked), members in sorted(groups.items(), reverse=True):
        for start in range(0, len(members) if num_masked else 0, batch_size):
            indices = members[start : start + batch_size]
            batch_texts, batch_keys = [texts[index] for index in indices], [keys[index] for index in indices]
            filling = Filling(model, batch_texts, batch_keys, sampling, eod=eod, open_end=open_end)
            batch = filling.run(advance, _step_of_batch(on_step, indices) if on_step else None)
            for index, text in zip(indices, batch, strict=True):
                filled[index] = text
    return filled


def _step_of_batch(on_step: OnStep, indices: list[int]) -> OnStep:
    """Return `on_step` for a batch with the texts at `indices`."""
    return lambda step, active, tokens: on_step(step, [indices[row] for row in active], tokens)


class Filling:
    """The state of B texts of T tokens, each with up to L masked positions.

    A text with fewer of them is decided in an earlier step than the others. --remask needs equally many in all texts.
    """

    def __init__(
        self,
        model: Transformer,
        texts: list[list[int]],
        keys: list[tuple[int, int]],
        sampling: Sampling,
        *,
        eod: int,
        open_end: bool,
        offset: int = 0,
    ):
        self.model = model
        self.keys = keys
        self.eod = eod
        self.open_end = open_end
        self.offset = offset  # the output at position j predicts token j + offset
        self.device = model.embed_tokens.weight.device
        self.logit_positions = LOGIT_POSITIONS[self.device.type]
        self.mask_id = model.vocabulary.mask_id
        self.tokens = torch.tensor(texts, device=self.device)  # [B, T]
        masked = self.tokens == self.mask_id
        self.length = int(masked.sum(1).max())
        # [B, L], masked positions from left to right, then others where a text has fewer than L
        self.positions = masked.int().argsort(dim=1, descending=True, stable=True)[:, : self.length]
        self.schedule_length = self.length  # tokens over which the steps are spread
        self.steps = sampling.steps or self.length
        # one step fills all positions, in any order
        self.sampling = replace(sampling, order="left-to-right") if self.steps == 1 else sampling
        size = sampling.block_length or self.length
        self.blocks = torch.arange(self.length, device=self.device) // size  # [L]
        self.active = torch.arange(len(texts), device=self.device)  # [R], texts that are not decided yet

    def run(self, advance: Advance = lambda tokens: None, on_step: OnStep | None = None) -> list[list[int]]:
        """Return the filled texts."""
        for step in range(self.steps):
            before, after = (self.schedule_length * count // self.steps for count in (step, step + 1))
            self._step(step, before, after)
            active = self.active.tolist()
            advance(len(active) * (after - before))
            if on_step:
                on_step(step + 1, active, self.tokens[self.active])
            self._drop_decided(advance, after)
            if not len(self.active):
                break
        return self.tokens.tolist()

    def _step(self, step: int, before: int, after: int) -> None:
        """Run one step, after which `after` of the L positions are filled; `before` of them were.

        1. Select the filled positions that are masked again (--remask).
        2. Select as many masked positions as are to be filled, by --order.
        3. Sample a token for each of them.
        """
        draws = self._draws(step)  # [3, R, L]
        tokens, positions = self.tokens[self.active], self.positions[self.active]
        answers = tokens.gather(1, positions)  # [R, L]
        masked = answers == self.mask_id
        remasked = self._remasked(~masked, draws[2], before, after)
        counts = (after - before + remasked.sum(1)).clamp(max=masked.sum(1))  # [R]
        if counts.any():
            states = self.states(tokens, positions)  # [R, L, H]
            selected = select_highest(self._scores(states, masked, counts, draws[1]), counts)
            answers[selected] = self.choose(states[selected], draws[0][selected], selected)
            answers[remasked] = self.mask_id
            self.tokens[self.active] = tokens.scatter(1, positions, answers)

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the head's input that predicts the masked ones of `positions` [R, L] in `tokens` [R, T], [R, L, H]."""
        hidden = self.model.hidden_states(Batch.unscored(tokens, causal=False))  # [R, T, H]
        predicting = (positions - self.offset)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, predicting)

    def _draws(self, step: int) -> Tensor:
        """Return uniform numbers for the token, the order and the remasking of each position, fp64 [3, R, L]."""
        keys = [self.keys[row] for row in self.active.tolist()]
        if not self.sampling.is_random:
            return torch.zeros((3, len(keys), self.length), dtype=torch.float64, device=self.device)
        draws = [stream(self.sampling.seed, "filling", *key, step).random((3, self.length)) for key in keys]
        return torch.from_numpy(np.stack(draws, axis=1)).to(self.device)

    def _remasked(self, filled: Tensor, draws: Tensor, before: int, after: int) -> Tensor:
        """Return which of the filled positions [R, L] are masked again in this step, to be filled in a later one.

        Each is with the probability of --remask, or a lower one where the expected number would exceed the number of
        masked positions after the step (ReMDM-cap, 2503.00307, with exact counts instead of expectations).
        """
        room = self.length - after
        if not self.sampling.remask or not before or not room:
            return torch.zeros_like(filled)
        probability = min(self.sampling.remask, room / before)
        remasked = filled & (draws < probability)
        return remasked & select_highest(torch.where(remasked, -draws, float("-inf")), remasked.sum(1).clamp(max=room))

    def _scores(self, states: Tensor, masked: Tensor, counts: Tensor, draws: Tensor) -> Tensor:
        """Return the priority of each position [R, L]: the highest are filled first, -inf is not filled."""
        reached, finished = candidates(masked, counts, self.blocks)
        scores = torch.full_like(draws, float("-inf"))
        if self.sampling.order == "random":
            scores[reached] = draws[reached]
        elif self.sampling.order in DIRECTIONS:
            turns = torch.arange(self.length, device=self.device, dtype=scores.dtype).expand_as(scores)
            scores[reached] = DIRECTIONS[self.sampling.order] * turns[reached]
        else:
            scores[reached] = self.certainties(states[reached], reached).double()
        return scores.masked_fill(finished, float("inf"))  # earlier blocks have priority

    def certainties(self, states: Tensor, reached: Tensor) -> Tensor:
        """Return the certainties [N] of predictions from hidden states [N, H]; `reached` [R, L] is True at them."""
        chunks = states.split(self.logit_positions)
        return torch.cat([certainty(self.logits(chunk), self.sampling.order) for chunk in chunks])

    def choose(self, states: Tensor, draws: Tensor, selected: Tensor) -> Tensor:
        """Return tokens [N] sampled from hidden states [N, H] with uniform `draws` [N].

        `selected` [R, L] is True at their N positions.
        """
        chunks = zip(states.split(self.logit_positions), draws.split(self.logit_positions), strict=True)
        return torch.cat([choose(self.logits(chunk), self.sampling, uniforms) for chunk, uniforms in chunks])

    def logits(self, states: Tensor) -> Tensor:
        """Return fp32 logits [N, V] of hidden states [N, H]."""
        logits = self.model.head(states)
        if not self.open_end:
            logits[:, self.eod] = float("-inf")
        return logits

    def _drop_decided(self, advance: Advance, after: int) -> None:
        """Remove texts that are decided from the batch: those with no masked token before their first `eod`."""
        if not self.open_end or self.sampling.remask:
            return
        answers = self.tokens[self.active].gather(1, self.positions[self.active])
        undecided = ((answers == self.mask_id) & ((answers == self.eod).cumsum(1) == 0)).any(1)
        advance(int((~undecided).sum()) * (self.length - after))
        self.active = self.active[undecided]
