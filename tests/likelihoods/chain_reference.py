"""Conditional distributions of masked diffusion, block diffusion and any-order models, read by plain loops."""

import itertools

import numpy as np
import torch

from megatron.batch import Batch
from megatron.likelihoods.chains import AnyOrderChains, BlockChains, Chains, MaskedChains
from megatron.objectives.any_order import AnyOrder
from megatron.objectives.block_diffusion import BlockDiffusion
from megatron.objectives.masked_diffusion import MaskedDiffusion

SIZE, MASK = 3, 3
BLOCK = 2


def likelihood_of(chains: Chains):
    """Return the likelihood whose chains these are."""
    if isinstance(chains, MaskedChains):
        return MaskedDiffusion(MASK, 1, shifted=bool(chains.offset))
    return AnyOrder() if isinstance(chains, AnyOrderChains) else BlockDiffusion(MASK, chains.block_size)


def batch_of(tokens, causal: bool, **fields) -> Batch:
    tensor = torch.tensor([tokens])
    fields = {name: torch.tensor([value]) for name, value in fields.items()}
    return Batch(tensor, tensor, torch.zeros(tensor.shape), np.zeros(1), causal=causal, **fields)


@torch.no_grad()
def conditional(chains: Chains, text: list[int], order: list[int], position: int) -> torch.Tensor:
    """Return the distribution of the token at `position`, fp64 [V], given those at the positions `order` read before.

    Blocks are read from left to right: only the current one has positions that are not read.
    """
    length = len(text)
    revealed = [token if index in order else MASK for index, token in enumerate(text)]
    if isinstance(chains, AnyOrderChains):
        batch = batch_of(
            [text[index] for index in order],
            True,
            position_ids=list(order),
            target_positions=[*order[1:], position],
        )
        output = len(order) - 1
    elif isinstance(chains, BlockChains):
        block = [index // chains.block_size for index in range(length)]
        blocked = np.ones((2 * length, 2 * length), bool)
        for query in range(length):
            for key in range(length):
                blocked[query, key] = block[key] != block[query]
                blocked[query, length + key] = block[key] >= block[query]
                blocked[length + query, length + key] = block[key] > block[query]
        current = position // chains.block_size
        # later blocks of the masked form and of the text are not seen: any tokens will do
        later = [token if block[index] <= current else 0 for index, token in enumerate(text)]
        ids = list(range(length))
        batch = batch_of([*revealed, *later], False, position_ids=[*ids, *ids], blocked=blocked.tolist())
        output = position
    else:
        batch, output = batch_of(revealed, False), position - chains.offset
    hidden = chains.model.hidden_states(batch)
    return chains.model.head(hidden[0, output]).double().softmax(-1)


def group_of(chains: Chains, position: int) -> int:
    """Return the block of a position; without blocks, 0."""
    return position // chains.block_size if isinstance(chains, BlockChains) else 0


def orders_of(chains: Chains, length: int) -> list[tuple[int, ...]]:
    """Return all orders of positions 1.. of a text; blocks from left to right."""
    orders = itertools.permutations(range(1, length))
    return [order for order in orders if sorted(order, key=lambda index: group_of(chains, index)) == list(order)]


def order_nll(chains: Chains, text: list[int], order: tuple[int, ...]) -> np.ndarray:
    """Return the NLL of each token of a text in an order of its last positions, given those before them, fp64 [T]."""
    nll, read = np.zeros(len(text)), list(range(len(text) - len(order)))
    for position in order:
        nll[position] = -np.log(float(conditional(chains, text, read, position)[text[position]]))
        read.append(position)
    return nll


def policy_order(chains: Chains, text: list[int], order: str, start: int) -> tuple[int, ...]:
    """Return the order in which a policy of one token a step unmasks positions `start`.. of a text."""
    read, left = list(range(start)), list(range(start, len(text)))
    while left:
        group = [index for index in left if group_of(chains, index) == group_of(chains, left[0])]
        certainties = []
        for position in group:
            probabilities = conditional(chains, text, read, position)
            highest, second = probabilities.topk(2).values.tolist()
            entropy = float(-(probabilities * probabilities.log()).sum())
            certainties.append(
                {
                    "left-to-right": -position,
                    "right-to-left": position,
                    "confidence": highest,
                    "margin": highest - second,
                    "entropy": -entropy,
                }[order]
            )
        position = group[int(np.argmax(certainties))]
        read.append(position)
        left.remove(position)
    return tuple(read[start:])
