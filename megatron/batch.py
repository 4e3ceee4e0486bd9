"""The interface between objectives and the model: one batch of inputs, targets, weights and attention mask."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

DERIVED = cast(Tensor, None)  # default of a field that `Batch.__post_init__` sets


@dataclass(frozen=True)
class Batch:
    """Input tokens, targets and loss weights of B sequences.

    There are T positions, T = S except in block diffusion, where T = 2S. `scored_positions` is derived on the CPU,
    before the batch moves to a device, so that selecting them does not synchronise host and device; code that replaces
    the weights passes `scored_positions=None`.
    """

    tokens: Tensor  # [B, T] int64, inputs, possibly corrupted
    targets: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32, 0 where the loss leaves a position out
    counts: np.ndarray  # [B], each sequence's share of the denominator of the loss
    causal: bool  # True: a position attends to itself and those before it; False: to all
    position_ids: Tensor | None = None  # [B, T] int64, position ids of the tokens in their sample; None means 0..T-1
    target_positions: Tensor | None = None  # [B, T] int64, position ids of the targets, where the model is given them
    blocked: Tensor | None = None  # [B or 1, T, T] bool, True where a query must not attend to a key
    documents: Tensor | None = None  # [B, T] int64, document number; attention stays within a document
    residual_scales: Tensor | None = None  # [B, L] float32, factor of what each block adds to the residual stream
    scored_positions: Tensor = DERIVED  # [R] int64, flat indices of the positions with a nonzero weight

    def __post_init__(self):
        if self.scored_positions is None:
            object.__setattr__(self, "scored_positions", self.weights.flatten().nonzero().flatten())

    @classmethod
    def unscored(cls, tokens: Tensor, causal: bool, position_ids: Tensor | None = None) -> "Batch":
        """Return a batch of `tokens` [B, T] without scored positions."""
        weights = torch.zeros(tokens.shape, device=tokens.device)
        return cls(
            tokens,
            tokens,
            weights,
            np.zeros(len(tokens)),
            causal=causal,
            position_ids=position_ids,
            scored_positions=tokens.new_empty(0, dtype=torch.int64),  # known, so the host does not wait for the device
        )

    @property
    def count(self) -> float:
        """The denominator of the summed loss: the number of scored tokens for AR, of all tokens for MDM."""
        return float(self.counts.sum())

    def visible(self) -> Tensor | None:
        """Return the attention mask, bool [B or 1, T, T], True where attended; None where `causal` is enough."""
        visible = None
        if self.documents is not None:
            visible = self.documents[:, :, None] == self.documents[:, None, :]
        if self.blocked is not None:
            visible = ~self.blocked if visible is None else visible & ~self.blocked
        return visible.tril() if visible is not None and self.causal else visible

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a copy with `function` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if torch.is_tensor(value)})

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`; asynchronous from pinned memory."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory; the data loader calls it, so that `to` overlaps with computation."""
        return self.map_tensors(Tensor.pin_memory)


def without_padding(batch: Batch, real: Tensor) -> Batch:
    """Return the batch with weight and count of padding sequences set to 0; `real` [B] bool is False at padding."""
    if bool(real.all()):
        return batch
    weights = torch.where(real[:, None], batch.weights, 0.0)
    counts = np.where(real.numpy(), batch.counts, 0)
    return replace(batch, weights=weights, counts=counts, scored_positions=None)
