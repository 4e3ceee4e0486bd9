"""Masked (absorbing) diffusion: a random share of the tokens is masked and predicted from all others.

A token is masked with the mask probability p, uniform on (0, 1) over the sequences. The loss, the sum of nll / p over
the masked tokens divided by S, is an unbiased estimate of an upper bound of the negative log-likelihood in nats per
token (2406.07524, 2502.09992; published system: 2507.15857). The bound is the mean negative log-likelihood over all
orders of the tokens. Masking exactly k tokens with weight S / k, k uniform on 1..S, estimates it with less variance.
Training may draw p from another density, or weight all masked tokens alike; see `mask_times`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron.batch import Batch
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.mask_times import UNIFORM_TIMES, TimeSampling
from megatron.randomness import radical_inverse, stream


@dataclass(frozen=True)
class MaskedDiffusion(Likelihood):
    """The masked-diffusion objective: the forward process of masked diffusion in training and evaluation."""

    mask_id: int
    time_block: int  # K: samples whose stratified times share one random shift
    eps: float = 1e-3  # smallest mask probability in training
    mask_times: str = "stratified"  # or "iid"
    suffix_ratio: float = 0.0  # share of sequences that are masked at their end instead (--ar-ratio, 2507.15857)
    low_noise_samples: int = 0  # the times of the first samples of a run are multiplied by `low_noise_ratio`
    low_noise_ratio: float = 0.5
    time_sampling: TimeSampling = UNIFORM_TIMES
    shifted: bool = False  # position j predicts token j + 1, and token 0 is never masked (MNTP, 2404.05961)

    name = "mdm"
    exact = False

    @property
    def target_offset(self) -> int:
        """The output at position j predicts token j + target_offset."""
        return int(self.shifted)

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return the training batch of `ids` [B, S+1] at the `sample_indices` [B].

        A masked token has weight 1 / p <= 1 / eps, if `time_sampling` does not change it. A sequence counts all its
        maskable tokens: S, or S - 1 if shifted.
        """
        batch_size, length = len(ids), ids.shape[1] - 1

        # 1. Diffusion times t in [0, 1), one per sequence
        times = np.array([self.time(int(index), seed) for index in sample_indices])  # [B]

        # 2. Mask probabilities p = (1 - eps) t + eps; the bound weights a masked token by 1 / p
        mask_prob = (1 - self.eps) * times[:, None] + self.eps  # [B, 1]

        # 3. Mask every token independently with probability p
        draws = np.stack([stream(seed, "mask", int(index)).random(length) for index in sample_indices])  # [B, S]
        masked = draws < mask_prob  # [B, S]

        # 4. In a share of the sequences (--ar-ratio), mask the same number of tokens at the end instead
        if self.suffix_ratio:
            for row, index in enumerate(sample_indices):
                if stream(seed, "suffix", int(index)).random() < self.suffix_ratio:
                    num_masked = masked[row].sum()
                    masked[row] = np.arange(length) >= length - num_masked

        # 5. If shifted, no position predicts token 0: never mask it
        masked[:, : self.target_offset] = False

        # 6. Masked inputs, targets and weights; normalise by the maskable tokens, not by the masked ones
        counts = np.full(batch_size, length - self.target_offset)  # [B]
        return self._batch(ids, masked, self._weights(mask_prob, sample_indices, seed), counts)

    def time(self, sample_index: int, seed: int) -> float:
        """Return the diffusion time of a sample, in [0, 1).

        Stratified times: K consecutive samples share one uniform shift of the first K radical inverses, so each time is
        uniform, and the times of any consecutive samples cover [0, 1) nearly evenly. Times of another density are its
        quantiles at these.
        """
        return self._time_scale(sample_index) * self._full_noise_time(sample_index, seed)

    def _time_scale(self, sample_index: int) -> float:
        return self.low_noise_ratio if sample_index < self.low_noise_samples else 1.0

    def _full_noise_time(self, sample_index: int, seed: int) -> float:
        quantile = self.time_sampling.density.quantile
        if self.mask_times == "iid":
            return quantile(stream(seed, "time", sample_index).random())
        block, offset = divmod(sample_index, self.time_block)
        return quantile((stream(seed, "time", block).random() + radical_inverse(offset)) % 1.0)

    def _weights(self, mask_prob: np.ndarray, sample_indices: np.ndarray, seed: int) -> np.ndarray:
        """Return the weight of the masked tokens of each sequence, [B, 1], given its mask probability [B, 1]."""
        sampling = self.time_sampling
        if sampling.simple:
            scales = np.array([self._time_scale(int(index)) for index in sample_indices])  # [B]
            mask_prob = ((1 - self.eps) * scales * sampling.mean + self.eps)[:, None]  # the expected one
        if not sampling.importance:
            return 1 / mask_prob
        times = [self._full_noise_time(int(index), seed) for index in sample_indices]
        return sampling.importance_weights(times)[:, None] / mask_prob

    def evaluation(self, ids: np.ndarray, noise: EvaluationNoise, windows: np.ndarray, alignment: str) -> Batch:
        """Return a batch whose weighted nll estimates the bound of the scored tokens of `ids` [B, S+1].

        Exactly k of n maskable tokens are masked, with weight n / k and k uniform on 1..n; no eps is needed. One random
        shift per replicate spreads k evenly over the windows, so replicates are independent and their spread is the
        Monte-Carlo error. A window costs one forward pass per replicate.
        """
        batch_size, length = len(ids), ids.shape[1] - 1
        first = self.scored_tokens(length, alignment).start
        maskable = length - first
        shift = stream(noise.seed, f"evaluation time/{noise.set_name}", noise.replicate).random()
        masked = np.zeros((batch_size, length), bool)
        weights = np.zeros((batch_size, 1))
        for row, window in enumerate(windows):
            num_masked = 1 + int(maskable * ((shift + radical_inverse(int(window))) % 1.0))
            generator = stream(noise.seed, f"evaluation mask/{noise.set_name}", noise.replicate, int(window))
            masked[row, first + generator.permutation(maskable)[:num_masked]] = True
            weights[row] = maskable / num_masked
        return self._batch(ids, masked, weights, np.full(batch_size, maskable))

    def scored_tokens(self, seq_length: int, alignment: str) -> slice:
        """Return which of a window's S+1 tokens are scored; "common" never masks token 0."""
        return slice(0 if alignment == "published" and not self.shifted else 1, seq_length)

    def _batch(self, ids: np.ndarray, masked: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> Batch:
        """Return the batch of `ids` [B, S+1] with `masked` [B, S] tokens, each with its sequence's weight [B, 1]."""
        length, offset = masked.shape[1], self.target_offset
        scored = np.zeros_like(masked)  # [B, S], the positions that predict a masked token
        scored[:, : length - offset] = masked[:, offset:]
        return Batch(
            tokens=torch.from_numpy(np.where(masked, self.mask_id, ids[:, :-1])),
            targets=torch.from_numpy(ids[:, offset : offset + length].copy()),
            weights=torch.from_numpy(np.where(scored, weights, 0).astype(np.float32)),
            counts=counts,
            causal=False,
        )
