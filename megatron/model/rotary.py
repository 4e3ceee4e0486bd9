"""Rotary position embeddings in the rotate-half convention (Llama, Hugging Face).

Channel i of a head forms a pair with channel i + D/2, so weights convert to Hugging Face without a permutation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosines and sines of integer positions, fp32 [B, 1, S, D]; B may be 1 for all sequences."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, head_size: int, base: float) -> RotaryTable:
    """Return the table of integer positions [B, S]."""
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (channels / head_size)  # [D/2]
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return RotaryTable(angles.cos(), angles.sin())


def rotate(heads: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys [B, heads, S, D] by the table; computed in fp32, returned in their dtype."""
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * table.cos + torch.cat((-second, first), dim=-1) * table.sin).to(heads.dtype)
