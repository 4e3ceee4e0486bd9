"""The padded vocabulary of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """The padded vocabulary: the tokenizer's ids 0..size-1, then [MASK], then unused rows up to a multiple of 128.

    Only the tokenizer's ids enter the softmax; text can never encode to [MASK].
    """

    size: int

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return self.size

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and the head."""
        return (self.size + 1 + 127) // 128 * 128
