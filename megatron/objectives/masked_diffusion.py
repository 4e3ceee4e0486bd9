"""Masked (absorbing) diffusion: hide a random share of the tokens, see all others, say what was hidden.

With p the share, uniform on (0, 1), the weighted loss sum_masked(nll / p) / S is an unbiased estimate of an upper
bound of the negative log-likelihood in nats per token (2406.07524, 2502.09992; published system: 2507.15857). The
bound is the mean, over all orders of the tokens, of the negative log of the chain rule; exactly k hidden tokens with
weight S / k, k uniform on 1..S, estimate the same with less noise.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.randomness import radical_inverse, stream


@dataclass(frozen=True)
class MaskedDiffusion(Likelihood):
    """The masked-diffusion objective: its forward process in training and in evaluation.

    `suffix_ratio` of the sequences hide as many tokens at their end instead (--ar-ratio, 2507.15857), and the first
    `low_noise_samples` samples have their times multiplied by `low_noise_ratio`. `shifted`, the position before a
    hidden token says what it is, as in next-token prediction, and token 0 is never hidden (MNTP, 2404.05961).
    """

    mask_id: int
    time_block: int  # K: run positions that share one random shift of the times
    eps: float = 1e-3
    mask_times: str = "stratified"
    suffix_ratio: float = 0.0
    low_noise_samples: int = 0
    low_noise_ratio: float = 0.5
    shifted: bool = False

    name = "mdm"
    exact = False

    @property
    def target_offset(self) -> int:
        """How many tokens after position j stands the one that its output speaks of."""
        return int(self.shifted)

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B]: weights mask / p.

        Every sequence counts all its maskable tokens, S unless shifted;
        p = (1 - eps) * time + eps, so no weight exceeds 1 / eps.
        """
        size, length = len(ids), ids.shape[1] - 1
        times = np.array([self.time(int(i), seed) for i in sample_indices])
        shares = (1 - self.eps) * times[:, None] + self.eps  # p, [B, 1]
        draws = np.stack([stream(seed, "mask", int(i)).random(length) for i in sample_indices])
        mask = draws < shares
        for row, position in enumerate(sample_indices):
            if self.suffix_ratio and stream(seed, "suffix", int(position)).random() < self.suffix_ratio:
                mask[row] = np.arange(length) >= length - mask[row].sum()
        mask[:, : self.target_offset] = False
        return self._batch(ids, mask, 1 / shares, np.full(size, length - self.target_offset))

    def time(self, position: int, seed: int) -> float:
        """Return the diffusion time of a run position, in [0, 1).

        Stratified: a block of K positions shares one uniform shift of the K-point set of radical inverses,
        so each time is uniform, and any stretch of consecutive samples is nearly evenly spread.
        """
        scale = self.low_noise_ratio if position < self.low_noise_samples else 1.0
        if self.mask_times == "iid":
            return scale * stream(seed, "time", position).random()
        block, offset = divmod(position, self.time_block)
        return scale * ((stream(seed, "time", block).random() + radical_inverse(offset)) % 1.0)

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        Of n maskable tokens exactly k are hidden, with weight n / k and k uniform on 1..n: no eps, and every
        time costs one forward pass. Counts are spread evenly over the windows by one shift a replicate, so
        replicates are independent and their spread is the Monte-Carlo error.
        """
        size, length = len(ids), ids.shape[1] - 1
        first = self.scored_tokens(length, alignment).start
        maskable = length - first
        shift = stream(noise.seed, f"evaluation time/{noise.set_name}", noise.replicate).random()
        mask, weights = np.zeros((size, length), bool), np.zeros((size, 1))
        for row, window in enumerate(windows):
            hidden = 1 + int(maskable * ((shift + radical_inverse(int(window))) % 1.0))
            draw = stream(noise.seed, f"evaluation mask/{noise.set_name}", noise.replicate, int(window))
            mask[row, first + draw.permutation(maskable)[:hidden]] = True
            weights[row] = maskable / hidden
        return self._batch(ids, mask, weights, np.full(size, maskable))

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored; "common" leaves token 0 visible."""
        return slice(0 if alignment == "published" and not self.shifted else 1, seq_length)

    def _batch(self, ids: np.ndarray, mask: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> Batch:
        """Return the batch that hides `mask` [B, S] and weighs each hidden token with `weights` [B, 1]."""
        length, offset = mask.shape[1], self.target_offset
        asked = np.zeros_like(mask)  # at the position that says it
        asked[:, : length - offset] = mask[:, offset:]
        return Batch(
            tokens=torch.from_numpy(np.where(mask, self.mask_id, ids[:, :-1])),
            targets=torch.from_numpy(ids[:, offset : offset + length].copy()),
            weights=torch.from_numpy(np.where(asked, weights, 0).astype(np.float32)),
            counts=counts,
            causal=False,
        )
