"""What an objective asks of the model: the only thing that passes between the two."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the model reads, what it must say, and how much each answer counts.

    Shapes: B sequences of T positions, T = S but in block diffusion. `scored_positions` is derived on the CPU, before
    the batch is moved to a device, so that selecting them never makes the host wait for the device; code that replaces
    the weights passes `scored_positions=None`.
    """

    tokens: Tensor  # [B, T] int64, possibly corrupted
    targets: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32; 0 where nothing is asked
    counts: np.ndarray  # [B]: what the summed loss is divided by, of each sequence
    causal: bool  # True: a position sees itself and what stands before it; False: it sees all
    position_ids: Tensor | None = None  # [B, T] int64, the place of each token in its sample; None means 0..T-1
    target_positions: Tensor | None = None  # [B, T] int64, the place of the token asked for, where the model is told
    blocked: Tensor | None = None  # [B or 1, T, T] bool, what a position must not see beside that
    documents: Tensor | None = None  # [B, T] int64; a position sees its own document only
    residual_scales: Tensor | None = None  # [B, blocks] float32, factor of what each block adds to the residual stream
    scored_positions: Tensor | None = None  # [R] int64, flat indices of the positions with a weight

    def __post_init__(self):
        if self.scored_positions is None:
            object.__setattr__(self, "scored_positions", self.weights.flatten().nonzero().flatten())

    @classmethod
    def unscored(cls, tokens: Tensor, causal: bool, position_ids: Tensor | None = None) -> "Batch":
        """Return a batch that asks for nothing."""
        nothing = torch.zeros(tokens.shape, device=tokens.device)
        return cls(tokens, tokens, nothing, np.zeros(len(tokens)), causal, position_ids)

    @property
    def count(self) -> float:
        """What the summed loss of all its sequences is divided by: scored tokens for AR, all tokens for MDM."""
        return float(self.counts.sum())

    def visible(self) -> Tensor | None:
        """Return what each position may see, bool [B or 1, T, T]; None where `causal` says it all."""
        visible = None
        if self.documents is not None:
            visible = self.documents[:, :, None] == self.documents[:, None, :]
        if self.blocked is not None:
            visible = ~self.blocked if visible is None else visible & ~self.blocked
        return visible.tril() if visible is not None and self.causal else visible

    def map_tensors(self, function) -> "Batch":
        """Return a copy with `function` applied to every tensor."""
        changed = {
            f.name: function(getattr(self, f.name)) for f in fields(self) if torch.is_tensor(getattr(self, f.name))
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> "Batch":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the data loader, so that `to` can overlap with computation."""
        return self.map_tensors(Tensor.pin_memory)


def without_padding(batch: Batch, real: Tensor) -> Batch:
    """Return the batch with the weight and count of padded sequences taken away; `real` is [B] bool."""
    if bool(real.all()):
        return batch
    return replace(
        batch, weights=batch.weights * real[:, None], counts=batch.counts * real.numpy(), scored_positions=None
    )
