"""What an objective asks of the model: the only thing that passes between the two."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the model reads, what it must say, and how much each answer counts.

    Shapes: B sequences of S positions. `rows` is derived on the CPU, before the batch travels to a
    device, so that selecting the scored positions never makes the host wait for the device; whoever
    replaces the weights passes `rows=None`.
    """

    tokens: Tensor  # [B, S] int64, possibly corrupted
    targets: Tensor  # [B, S] int64
    weights: Tensor  # [B, S] float32; 0 where nothing is asked
    count: int  # what the summed loss is divided by: scored tokens for AR, all tokens for MDM
    causal: bool  # True: a position sees itself and what stands before it; False: it sees all
    positions: Tensor | None = None  # [B, S] int64 rotary positions; None means 0..S-1
    rows: Tensor | None = None  # [R] int64, flat indices of the positions with a weight

    def __post_init__(self):
        if self.rows is None:
            object.__setattr__(self, "rows", self.weights.flatten().nonzero().flatten())

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
