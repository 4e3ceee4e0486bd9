"""Rotary position embeddings in the rotate-half convention (Llama, Hugging Face).

Channel i of a head forms a pair with channel i + D/2, so weights convert to Hugging Face without a permutation.
"""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, fp32 [B, 1, S, D], of integer positions [B, S]; B may be 1 for all sequences."""
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (channels / head_size)  # [D/2]
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, heads, S, D] by the table; computed in fp32, returned in their dtype."""
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
