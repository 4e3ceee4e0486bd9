"""Whether documents come back from their tokens: decode(encode(text)) == text."""

import os
from collections import Counter

from megatron.data.corpus import Document
from megatron.errors import ConfigurationError

SHOWN_CHARACTERS = 20  # of a document that an example shows


class RoundTrip:
    """Counts, over the documents of a split, of what its tokens do not give back."""

    def __init__(self, tokenizer_named: str):
        self._tokenizer_named = tokenizer_named
        self.changed_documents = 0
        self.characters = 0  # of all documents
        self.missing_characters = 0  # wherever they were in their document
        self._example: dict | None = None

    def compare(self, document: Document, decoded: str) -> None:
        """Count one document, whose tokens decode to `decoded`.

        Raises: ConfigurationError where nothing is left of the text.
        """
        text = document.text
        self.characters += len(text)
        if decoded == text:
            return
        if not decoded.strip():
            raise ConfigurationError(
                f"{self._tokenizer_named}: leaves nothing of {document.name}, which begins "
                f"{text.strip()[:SHOWN_CHARACTERS]!r}; give a tokenizer that covers this text, or remove the document"
            )
        missing = (Counter(text) - Counter(decoded)).total()
        self.changed_documents += 1
        self.missing_characters += missing
        if self._example is None or missing > self._example["missing_characters"]:
            start = len(os.path.commonprefix([text, decoded]))
            end = start + SHOWN_CHARACTERS
            self._example = {
                "document": document.name,
                "missing_characters": missing,
                "character": start,
                "text": text[start:end],
                "decoded": decoded[start:end],
            }

    def summary(self) -> dict:
        """Return the counts and, where a document is changed, the first of those that miss most as the example."""
        return {
            "changed_documents": self.changed_documents,
            "characters": self.characters,
            "missing_characters": self.missing_characters,
            "example": self._example,
        }


def describe_changes(documents: int, changes: dict) -> str:
    """Return a RoundTrip's summary of `documents` documents in words; the summary counts some that are changed."""
    share = changes["missing_characters"] / max(1, changes["characters"])
    return (
        f"{changes['changed_documents']:,} of {documents:,} documents do not come back from their tokens as they were, "
        f"{share:.2%} of the characters are missing"
    )
