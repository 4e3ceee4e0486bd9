"""Block diffusion: blocks of tokens follow one another autoregressively, and each is diffused given those before it.

The network reads every sample twice at once (2503.09573): its masked form and, behind it, the text
itself. A position of the masked form sees its own block of that and the text of the blocks before; a position of the
text sees the text up to the end of its own block. One pass then trains all blocks, each at a time of its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.randomness import radical_inverse, stream


@dataclass(frozen=True)
class BlockDiffusion(Likelihood):
    """The block-diffusion objective; a block of 1 is next-token prediction, a block of S is masked diffusion."""

    mask_id: int
    block_size: int
    eps: float = 1e-3

    name = "block-diffusion"
    exact = False
    target_offset = 0  # the output at position j of the masked form speaks of token j

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1], T = 2S positions: weights mask / p, p drawn for every block.

        The times of a sample's blocks share one uniform shift, so that they are spread evenly over (0, 1).
        """
        length = ids.shape[1] - 1
        block, shares, draws = np.arange(length) // self.block_size, [], []
        for position in sample_indices:
            shift = stream(seed, "block times", int(position)).random()
            times = (shift + np.array([radical_inverse(index) for index in range(block[-1] + 1)])) % 1.0
            shares.append(((1 - self.eps) * times + self.eps)[block])
            draws.append(stream(seed, "mask", int(position)).random(length))
        return self._batch(ids, np.stack(draws) < shares, 1 / np.stack(shares), length)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        As in masked diffusion, exactly k of a block's n maskable tokens are hidden, with weight n / k.
        """
        length = ids.shape[1] - 1
        first = self.scored_tokens(length, alignment).start
        mask, weights = np.zeros((len(ids), length), bool), np.zeros((len(ids), length))
        for row, window in enumerate(windows):
            draw = stream(noise.seed, f"evaluation blocks/{noise.set_name}", noise.replicate, int(window))
            shift = draw.random()
            for index, start in enumerate(range(0, length, self.block_size)):
                places = np.arange(max(start, first), min(start + self.block_size, length))
                if len(places):
                    hidden = 1 + int(len(places) * ((shift + radical_inverse(index)) % 1.0))
                    mask[row, draw.permutation(places)[:hidden]] = True
                    weights[row, places] = len(places) / hidden
        return self._batch(ids, mask, weights, length - first)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored; "common" leaves token 0 visible."""
        return slice(0 if alignment == "published" else 1, seq_length)

    def _batch(self, ids: np.ndarray, mask: np.ndarray, weights: np.ndarray, count: int) -> Batch:
        text = ids[:, :-1]
        weights = np.where(mask, weights, 0).astype(np.float32)
        places = np.broadcast_to(np.arange(text.shape[1]), text.shape)
        return Batch(
            tokens=torch.from_numpy(np.hstack([np.where(mask, self.mask_id, text), text])),
            targets=torch.from_numpy(np.hstack([text, text])),
            weights=torch.from_numpy(np.hstack([weights, np.zeros_like(weights)])),
            counts=np.full(len(ids), count),
            causal=False,
            position_ids=torch.from_numpy(np.hstack([places, places])),
            blocked=_blocked(text.shape[1], self.block_size)[None],
        )


@lru_cache(maxsize=2)
def _blocked(length: int, block_size: int) -> torch.Tensor:
    """Return what each position must not see, bool [2S, 2S]: rows and columns are the masked form, then the text."""
    block = torch.arange(length) // block_size
    query, key = block[:, None], block[None, :]
    masked = torch.cat((query == key, key < query), dim=1)
    text = torch.cat((torch.zeros(length, length, dtype=torch.bool), key <= query), dim=1)
    return ~torch.cat((masked, text))
