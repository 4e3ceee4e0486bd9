"""Certainty and NLL of predictions, from sums over the vocabulary that need no log-probabilities of all ids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.model.transformer import Transformer

CACHED_LOGITS = 2**18  # elements that a CPU's cache holds twice: 1 MiB in fp32
COLUMN = 8  # logits of a column of `_highest_two`


class SoftmaxSums(NamedTuple):
    """Sums over the vocabulary, or a block of it, at each of N positions."""

    highest: Tensor  # [N, 1] the highest logit; for margin [N, 2], the highest two in descending order
    total: Tensor  # [N] sum of exp(logit - highest)
    product: Tensor | None  # [N] sum of exp(logit - highest) * (logit - highest), for entropy

    def certainty(self) -> Tensor:
        """Return the `certainty` of the order that has these sums, [N]; of confidence, where no other has them."""
        if self.product is not None:
            return self.product / self.total - self.total.log()
        first, *second = (self.highest - self.normaliser()[:, None]).exp().unbind(1)
        return first - second[0] if second else first

    def normaliser(self) -> Tensor:
        """Return the log of the sum of exp(logit), [N]."""
        return self.total.log() + self.highest[:, 0]

    def nll(self, target_logits: Tensor) -> Tensor:
        """Return the NLL of targets, [N], given their logits [N]."""
        return self.total.log() - (target_logits - self.highest[:, 0])


def certainty(logits: Tensor, order: str) -> Tensor:
    """Return the certainty of the model at each of N positions, [N], from `logits` [N, V]; higher is more certain.

    confidence: the highest probability (LLaDA, 2502.09992); margin: the difference of the highest two (2502.06768);
    entropy: the negative entropy. All are of the model's own distribution, at temperature 1.
    """
    positions = _cached(logits.shape[1], logits.device) or max(1, len(logits))
    return torch.cat([_sums_(chunk.clone(), order).certainty() for chunk in logits.split(positions)])


@torch.no_grad()
def predictions(model: Transformer, states: Tensor, targets: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Return the NLL of `targets` [N] and the certainties, both fp32 [N], from the head's input `states` [N, H].

    The NLL is of the model's softmax, as in validation: with --softmax-over-padding it includes the padding rows.
    Certainties are over the tokenizer's ids, as in generation. On a CPU the head runs on blocks of the vocabulary whose
    logits stay in its cache, and adds up their sums.
    """
    head, size = model.lm_weight(), model.vocabulary.size
    width = min(len(head), _cached(len(states), states.device) or len(head))
    # buffers for all blocks: allocation is expensive on a CPU
    buffer = states.new_empty(len(states), width)
    scratch = torch.empty_like(buffer, dtype=torch.float32)
    target_logits = scratch.new_zeros(len(states), 1)
    blocks = []
    for start in range(0, size, width):
        weight = head[start : start + width]
        logits = torch.mm(states, weight.T, out=buffer[:, : len(weight)])[:, : size - start].float()
        ids = targets[:, None] - start
        inside = (ids >= 0) & (ids < logits.shape[1])
        target_logits = logits.gather(1, ids.where(inside, 0)).where(inside, target_logits)
        blocks.append(_sums_(logits, order, scratch[:, : logits.shape[1]]))
    sums = _merged(blocks)
    nll = sums.nll(target_logits[:, 0])
    if model.softmax_size > size:
        padding = torch.mm(states, head[size : model.softmax_size].T).float().logsumexp(-1)
        nll += torch.nn.functional.softplus(padding - sums.normaliser())
    return nll, sums.certainty()


def _cached(length: int, device: torch.device) -> int | None:
    """Return how many times `length` logits a CPU's cache holds, at least 1; None on other devices."""
    return max(1, CACHED_LOGITS // max(1, length)) if device.type == "cpu" else None


def _sums_(logits: Tensor, order: str, scratch: Tensor | None = None) -> SoftmaxSums:
    """Return the sums that an order and the NLL need; overwrites `logits` [N, V] and, for entropy, `scratch` [N, V]."""
    highest = _highest_two(logits) if order == "margin" else logits.amax(-1, keepdim=True)
    shifted = logits.sub_(highest[:, :1])
    if order != "entropy":
        return SoftmaxSums(highest, shifted.exp_().sum(-1), None)
    shifted.clamp_(min=-100)  # -inf, which has probability 0, too
    weights = torch.exp(shifted, out=scratch)
    return SoftmaxSums(highest, weights.sum(-1), weights.mul_(shifted).sum(-1))


def _merged(blocks: Sequence[SoftmaxSums]) -> SoftmaxSums:
    """Return the sums over the vocabulary, given those over its blocks."""
    highest = torch.cat([block.highest for block in blocks], dim=1)
    highest = highest.topk(blocks[0].highest.shape[1]).values
    shifts = [block.highest[:, 0] - highest[:, 0] for block in blocks]
    total, product = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[0])
    for block, shift in zip(blocks, shifts, strict=True):
        total += shift.exp() * block.total
        if block.product is not None:
            product += shift.exp() * (block.product + shift * block.total)
    return SoftmaxSums(highest, total, None if blocks[0].product is None else product)


def _highest_two(logits: Tensor) -> Tensor:
    """Return the highest two of each row of `logits` [N, V], [N, 2]; [N, 1] where there is only one.

    They are in the two of its columns that have the highest maxima, or in the rest: a maximum costs less than `topk`.
    """
    width = logits.shape[1] // COLUMN
    if width < 2:
        return logits.topk(min(2, logits.shape[1])).values
    columns = logits[:, : width * COLUMN].unflatten(1, (COLUMN, width))  # [N, COLUMN, width]
    best = columns.amax(1).topk(2).indices  # [N, 2]
    candidates = columns.gather(2, best[:, None].expand(-1, COLUMN, -1)).flatten(1)
    return torch.cat([candidates, logits[:, width * COLUMN :]], dim=1).topk(2).values
