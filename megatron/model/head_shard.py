"""The vocabulary rows of the output head that a rank holds, and the reductions over the ranks that share it."""

from torch import Tensor


class WholeHead:
    """An unsharded head. A vocabulary-parallel head overrides every attribute and method."""

    whole = True
    start = 0  # id of the first vocabulary row of this shard

    def local(self, weight: Tensor) -> Tensor:
        """Return the vocabulary rows of this shard."""
        return weight

    def highest(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all shards; may overwrite `values`."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the element-wise sum of `values` over all shards; may overwrite `values`."""
        return values


WHOLE = WholeHead()
