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
from megatron.objectives.noise import EvaluationNoise
from megatron.randomness import radical_inverse, stream


@dataclass(frozen=True)
class MaskedDiffusion:
    """The masked-diffusion objective: its forward process in training and in evaluation."""

    mask_id: int
    time_block: int  # K: run positions that share one random shift of the times
    eps: float = 1e-3
    mask_times: str = "stratified"

    name = "mdm"
    exact = False
    target_offset = 0  # the output at position j speaks of token j

    def prepare(self, ids: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the run `positions` [B]: weights mask / p, count B * S.

        p = (1 - eps) * time + eps, so no weight exceeds 1 / eps.
        """
        targets = ids[:, :-1].copy()  # [B, S]
        times = np.array([self.time(int(i), seed) for i in positions])
        shares = (1 - self.eps) * times[:, None] + self.eps  # p, [B, 1]
        draws = np.stack([stream(seed, "mask", int(i)).random(targets.shape[1]) for i in positions])
        return self._batch(targets, draws < shares, 1 / shares, count=targets.size)

    def time(self, position: int, seed: int) -> float:
        """Return the diffusion time of a run position, in [0, 1).

        Stratified: a block of K positions shares one uniform shift of the K-point set of radical inverses,
        so each time is uniform, and any stretch of consecutive samples is nearly evenly spread.
        """
        if self.mask_times == "iid":
            return stream(seed, "time", position).random()
        block, offset = divmod(position, self.time_block)
        return (stream(seed, "time", block).random() + radical_inverse(offset)) % 1.0

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        Of n maskable tokens exactly k are hidden, with weight n / k and k uniform on 1..n: no eps, and every
        time costs one forward pass. Counts are spread evenly over the windows by one shift a replicate, so
        replicates are independent and their spread is the Monte-Carlo error.
        """
        targets = ids[:, :-1].copy()
        first = self.scored_tokens(targets.shape[1], alignment).start
        maskable = targets.shape[1] - first
        shift = stream(noise.seed, f"evaluation time/{noise.set_name}", noise.replicate).random()
        mask, weights = np.zeros(targets.shape, bool), np.zeros(targets.shape)
        for row, window in enumerate(windows):
            hidden = 1 + int(maskable * ((shift + radical_inverse(int(window))) % 1.0))
            draw = stream(noise.seed, f"evaluation mask/{noise.set_name}", noise.replicate, int(window))
            mask[row, first + draw.permutation(maskable)[:hidden]] = True
            weights[row] = maskable / hidden
        return self._batch(targets, mask, weights, count=len(targets) * maskable)

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored; "common" leaves token 0 visible."""
        return slice(0 if alignment == "published" else 1, seq_length)

    def _batch(self, targets: np.ndarray, mask: np.ndarray, weights: np.ndarray, count: int) -> Batch:
        return Batch(
            tokens=torch.from_numpy(np.where(mask, self.mask_id, targets)),
            targets=torch.from_numpy(targets),
            weights=torch.from_numpy(np.where(mask, weights, 0).astype(np.float32)),
            count=count,
            causal=False,
        )
