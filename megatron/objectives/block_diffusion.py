"""Block diffusion: autoregressive over blocks of tokens, masked diffusion within a block given the blocks before it.

The model reads a sample as one sequence of 2S positions (2503.09573): its masked form, then the text. A position of the
masked form attends to its own block there and to the blocks before it in the text; a position of the text attends to
the text up to the end of its own block. One pass trains all blocks, each at its own diffusion time.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.mask_times import UNIFORM_TIMES, TimeSampling
from megatron.randomness import radical_inverse, stream


@dataclass(frozen=True)
class BlockDiffusion(Likelihood):
    """The block-diffusion objective; blocks of 1 are next-token prediction, one block of S is masked diffusion."""

    mask_id: int
    block_size: int
    eps: float = 1e-3  # smallest mask probability in training
    time_sampling: TimeSampling = UNIFORM_TIMES

    name = "block-diffusion"
    exact = False
    target_offset = 0  # the output at position j of the masked form predicts token j

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1], T = 2S positions; weights 1 / p, with a p for each block.

        The times of a sample's blocks share one uniform shift, so that they cover (0, 1) evenly. Times of another
        density are its quantiles at these, and `time_sampling` may change the weights.
        """
        length = ids.shape[1] - 1
        block = np.arange(length) // self.block_size  # [S], block index of each token
        inverses = np.array([radical_inverse(number) for number in range(block[-1] + 1)])  # [blocks]
        mask_prob = []
        weights = []
        draws = []
        for index in sample_indices:
            shift = stream(seed, "block times", int(index)).random()
            times = [self.time_sampling.density.quantile(value) for value in (shift + inverses) % 1.0]  # [blocks]
            mask_prob.append(((1 - self.eps) * np.array(times) + self.eps)[block])  # [S]
            weights.append(self._weights(times)[block])  # [S]
            draws.append(stream(seed, "mask", int(index)).random(length))  # [S]
        masked = np.stack(draws) < mask_prob  # [B, S]
        return self._batch(ids, masked, np.stack(weights), length)

    def _weights(self, times: list[float]) -> np.ndarray:
        """Return the weight of the masked tokens of each block, [blocks], given its time."""
        sampling = self.time_sampling
        mask_prob = (1 - self.eps) * np.array([sampling.mean] * len(times) if sampling.simple else times) + self.eps
        return (sampling.importance_weights(times) if sampling.importance else 1) / mask_prob

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        As in masked diffusion, exactly k of a block's n maskable tokens are masked, with weight n / k.
        """
        length = ids.shape[1] - 1
        first = self.scored_tokens(length, alignment).start
        masked = np.zeros((len(ids), length), bool)
        weights = np.zeros((len(ids), length))
        for row, window in enumerate(windows):
            generator = stream(noise.seed, f"evaluation blocks/{noise.set_name}", noise.replicate, int(window))
            shift = generator.random()
            for index, start in enumerate(range(0, length, self.block_size)):
                maskable = np.arange(max(start, first), min(start + self.block_size, length))
                if len(maskable):
                    num_masked = 1 + int(len(maskable) * ((shift + radical_inverse(index)) % 1.0))
                    masked[row, generator.permutation(maskable)[:num_masked]] = True
                    weights[row, maskable] = len(maskable) / num_masked
        return self._batch(ids, masked, weights, length - first)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored; "common" never masks token 0."""
        return slice(0 if alignment == "published" else 1, seq_length)

    def _batch(self, ids: np.ndarray, masked: np.ndarray, weights: np.ndarray, count: int) -> Batch:
        """Return the batch of `ids` [B, S+1] with `masked` tokens and `weights`, both [B, S]."""
        text = ids[:, :-1]
        weights = np.where(masked, weights, 0).astype(np.float32)
        masked_form = torch.from_numpy(np.where(masked, self.mask_id, text))
        return replace(
            two_forms(masked_form, torch.from_numpy(text.copy()), self.block_size),
            targets=torch.from_numpy(np.hstack([text, text])),
            weights=torch.from_numpy(np.hstack([weights, np.zeros_like(weights)])),
            counts=np.full(len(ids), count),
            scored_positions=None,
        )


def two_forms(masked_form: torch.Tensor, text: torch.Tensor, block_size: int) -> Batch:
    """Return the unscored batch of T = 2S positions: the masked form of texts, then the texts, both [B, S]."""
    length = text.shape[1]
    position_ids = torch.arange(length, device=text.device).expand_as(text)
    tokens = torch.cat([masked_form, text], dim=1)
    batch = Batch.unscored(tokens, causal=False, position_ids=torch.cat([position_ids, position_ids], dim=1))
    return replace(batch, blocked=_blocked(length, block_size)[None].to(text.device))


@lru_cache(maxsize=2)
def _blocked(length: int, block_size: int) -> torch.Tensor:
    """Return the attention mask, bool [2S, 2S], True where blocked; both axes are the masked form, then the text."""
    block = torch.arange(length) // block_size
    return ~attended(torch.cat((1 + block, torch.zeros_like(block))), torch.cat((block, block)))


def attended(copy: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return the attention mask, bool [..., L, L], True where attended, of texts with masked forms of their blocks.

    `copy` [..., L] is 0 in the text and the number of a masked form elsewhere, -1 at padding; `block` [..., L] is the
    index of the block. A position of the text attends to the text up to the end of its block, one of a masked form to
    that form and to the text before its block. A block may have any number of masked forms.
    """
    query_copy, key_copy = copy[..., :, None], copy[..., None, :]
    text_before = block[..., None, :] < block[..., :, None] + (query_copy == 0).long()
    return torch.where(key_copy == 0, text_before & (query_copy >= 0), query_copy == key_copy)
