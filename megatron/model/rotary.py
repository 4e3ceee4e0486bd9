"""Rotary position embeddings in the rotate-half convention (Llama, Hugging Face).

Channel i of a head is paired with channel i + D/2, so weights convert to Hugging Face without a permutation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosines and sines of the rotation angles, fp32 [B, S, 1, D]; B is 1 where all sequences share them."""

    cos: Tensor
    sin: Tensor


def rotary_table(position_ids: Tensor, head_size: int, base: float) -> RotaryTable:
    """Return the table of `position_ids` [B, S]."""
    channels = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (channels / head_size)  # [D/2]
    angles = position_ids[:, :, None, None].float() * frequencies  # [B, S, 1, D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, S, 1, D]
    return RotaryTable(angles.cos(), angles.sin())


def rotate(heads: Tensor, table: RotaryTable) -> Tensor:
    """Return queries or keys [B, S, heads, D] rotated by the table; computed in fp32, returned in their dtype."""
    heads_fp32 = heads.float()
    first, second = heads_fp32.chunk(2, dim=-1)
    return (heads_fp32 * table.cos + torch.cat((-second, first), dim=-1) * table.sin).to(heads.dtype)
