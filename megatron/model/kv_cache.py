"""KV cache of a causal model: keys and values of every use of a block for the tokens processed so far."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of B sequences; a new cache is empty, and `Transformer.read` appends to it.

    Sequences of different lengths are padded on any side. Padding takes no position and is masked out of attention.
    """

    def __init__(self):
        self._present: Tensor | None = None
        self._has_padding = False  # known to the host, which does not wait for the device at every token
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}  # position: rotated keys and values, [B, kv_heads, P, D]

    @property
    def present(self) -> Tensor | None:
        """Which tokens are not padding, bool [B, P]; None in a new cache."""
        return self._present

    @present.setter
    def present(self, present: Tensor) -> None:
        self._present = present
        self._has_padding = not bool(present.all())

    def append(self, present: Tensor, whole: bool = False) -> tuple[Tensor, Tensor | None]:
        """Append T tokens to each sequence, `present` [B, T]; return their position ids [B, T] and attention mask.

        The mask is bool [B, T, P + T], or None where each token attends to all before it. `whole` states that none of
        the tokens is padding; otherwise the host reads `present`.
        """
        before = present[:, :0] if self._present is None else self._present
        self._has_padding = self._has_padding or not (whole or bool(present.all()))
        self._present = torch.cat((before, present), dim=1)
        position_ids = (self._present.cumsum(1) - 1).clamp(min=0)[:, before.shape[1] :]
        length = present.shape[1]
        if (length == 1 or not before.shape[1]) and not self._has_padding:
            return position_ids, None
        visible = self._present[:, None].expand(-1, length, -1).tril(before.shape[1])
        # padding attends to itself: a softmax over no key is undefined
        diagonal = torch.eye(length, dtype=torch.bool, device=present.device)
        visible[:, :, before.shape[1] :] |= diagonal
        return position_ids, visible

    def block(self, position: int) -> "LayerKVCache":
        """Return the view of the cache that attention of the block at a `position` of the depth reads and extends."""
        return LayerKVCache(self._blocks, position)

    def select(self, rows: Tensor) -> "KVCache":
        """Return a copy of the sequences `rows` [R]; indices may repeat: answers share a prefix."""
        assert self._present is not None
        selected = KVCache()
        if self._has_padding:
            selected.present = self._present[rows]
        else:
            selected._present = self._present[rows]
        selected._blocks = {at: (keys[rows], values[rows]) for at, (keys, values) in self._blocks.items()}
        return selected


class LayerKVCache:
    """The KV cache of one use of a block."""

    def __init__(self, blocks: dict[int, tuple[Tensor, Tensor]], position: int):
        self._blocks = blocks
        self._position = position

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, kv_heads, T, D]; return the whole cache, [B, kv_heads, P + T, D]."""
        if self._position in self._blocks:
            cached = self._blocks[self._position]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(cached, (keys, values)))
        self._blocks[self._position] = (keys, values)
        return keys, values
