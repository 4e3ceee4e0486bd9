"""The sampler of masked diffusion, teacher-forced: the exact likelihood of a text under an unmasking policy.

A policy chooses the next positions from the unmasked tokens alone, so the probabilities of the tokens of a text, each
given those unmasked before it, multiply to a probability distribution over texts (DUEL, 2603.01367). It is that of
`tools/generate.py` at temperature 1 with the same order, steps and blocks, where the length of a text is fixed.
"""

import torch
from torch import Tensor

from megatron.generation.diffusion import MAX_LOGIT_POSITIONS, Filling
from megatron.generation.sampling import Sampling
from megatron.model.transformer import Transformer


class ForcedFilling(Filling):
    """Unmasks the tokens of given texts, in place of sampled ones, and adds up their NLL."""

    def __init__(
        self,
        model: Transformer,
        texts: Tensor,
        masked: Tensor,
        *,
        keys: list[tuple[int, int]],
        sampling: Sampling,
        offset: int = 0,
    ):
        mask_id = model.vocabulary.mask_id
        inputs = torch.where(masked, mask_id, texts).tolist()
        super().__init__(model, inputs, keys, sampling, eod=0, open_end=False, offset=offset)
        self.truth = texts.to(self.device).gather(1, self.positions)  # [B, L]
        self.nll = torch.zeros(self.truth.shape, device=self.device)  # [B, L]

    def choose(self, states: Tensor, draws: Tensor, selected: Tensor) -> Tensor:
        """Return the tokens of the texts at the `selected` positions, and keep their NLL."""
        targets = self.truth[selected]  # [N]
        chunks = zip(states.split(MAX_LOGIT_POSITIONS), targets.split(MAX_LOGIT_POSITIONS), strict=True)
        nll = [
            torch.nn.functional.cross_entropy(self.logits(chunk), target, reduction="none") for chunk, target in chunks
        ]
        self.nll[selected] = torch.cat(nll)
        return targets

    def logits(self, states: Tensor) -> Tensor:
        """Return fp32 logits [N, V] of hidden states [N, H]; a text may contain the end of a document anywhere."""
        return self.model.head(states)


@torch.no_grad()
def policy_nll(
    model: Transformer,
    texts: Tensor,
    masked: Tensor,
    *,
    keys: list[tuple[int, int]],
    sampling: Sampling,
    offset: int = 0,
) -> Tensor:
    """Return the NLL of each masked token of texts [B, S], fp32 [B, S], 0 at the others.

    `masked` [B, S] has the same number of True in every row. The order, steps and blocks of `sampling` are the policy;
    its seed and the `keys` of the texts decide a random order. The output at position j predicts token j + `offset`.
    """
    filling = ForcedFilling(model, texts, masked, keys=keys, sampling=sampling, offset=offset)
    filling.run()
    return torch.zeros(texts.shape, device=filling.device).scatter_(1, filling.positions, filling.nll)
