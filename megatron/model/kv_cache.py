"""What a causal model has read already: keys and values of every block, so that it reads each token once."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of what was read of B sequences. `Transformer.read` adds what it reads; a new one is empty.

    Sequences of several lengths are filled up with absent tokens, on any side, which take no place and are not seen.
    """

    def __init__(self):
        self.present: Tensor | None = None  # [B, P] bool, of every position read so far
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # by block: [B, groups, P, D], keys rotated

    def append(self, present: Tensor) -> tuple[Tensor, Tensor | None]:
        """Note that [B, T] more positions are read; return their places [B, T] and what they may see.

        That is bool [B, T, P + T], or None where all that stands before them is visible.
        """
        before = present[:, :0] if self.present is None else self.present
        self.present = torch.cat((before, present), dim=1)
        places = (self.present.cumsum(1) - 1).clamp(min=0)[:, before.shape[1] :]
        length = present.shape[1]
        if (length == 1 or not before.shape[1]) and self.present.all():
            return places, None
        visible = self.present[:, None].expand(-1, length, -1).tril(before.shape[1])
        # an absent token sees itself: attention over nothing has no value
        own = torch.eye(length, dtype=torch.bool, device=present.device)
        visible[:, :, before.shape[1] :] |= own
        return places, visible

    def block(self, name: str) -> "LayerKVCache":
        """Return the view that a block's attention reads and extends."""
        return LayerKVCache(self._kept, name)

    def select(self, rows: Tensor) -> "KVCache":
        """Return the past of the sequences `rows` [R], each as often as it is named: a prefix shared by its answers."""
        chosen = KVCache()
        chosen.present = self.present[rows]
        chosen._kept = {name: (keys[rows], values[rows]) for name, (keys, values) in self._kept.items()}
        return chosen


class LayerKVCache:
    """The past of one block."""

    def __init__(self, kept: dict[str, tuple[Tensor, Tensor]], name: str):
        self._kept, self._name = kept, name

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, groups, T, D] to what is kept; return all of it, [B, groups, P + T, D]."""
        if self._name in self._kept:
            before = self._kept[self._name]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (keys, values)))
        self._kept[self._name] = (keys, values)
        return keys, values
