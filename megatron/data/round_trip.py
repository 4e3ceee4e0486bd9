"""Checks the round trip of documents through a tokenizer: decode(encode(text)) == text."""

from collections import Counter

from megatron.errors import ConfigurationError

EXAMPLE_CHARACTERS = 20


class RoundTrip:
    """Counts the documents of a split that the round trip changes, and the characters that it drops."""

    def __init__(self, tokenizer_named: str):
        self._tokenizer_named = tokenizer_named
        self.changed_documents = 0
        self.characters = 0  # of all documents
        self.missing_characters = 0
        self._example: dict | None = None

    def compare(self, name: str, text: str, decoded: str) -> None:
        """Add one document, whose tokens decode to `decoded`.

        Raises: ConfigurationError if `decoded` is blank.
        """
        self.characters += len(text)
        if decoded == text or not text.strip():
            return
        if not decoded.strip():
            raise ConfigurationError(
                f"{self._tokenizer_named}: leaves nothing of {name}, which begins "
                f"{text.strip()[:EXAMPLE_CHARACTERS]!r}; give a tokenizer that covers this text, or remove the document"
            )
        missing = (Counter(text) - Counter(decoded)).total()
        self.changed_documents += 1
        self.missing_characters += missing
        if self._example is None or missing > self._example["missing_characters"]:
            pairs = enumerate(zip(text, decoded))
            start = next((index for index, (a, b) in pairs if a != b), min(len(text), len(decoded)))
            end = start + EXAMPLE_CHARACTERS
            self._example = {
                "document": name,
                "missing_characters": missing,
                "character": start,
                "text": text[start:end],
                "decoded": decoded[start:end],
            }

    def merge(self, summary: dict) -> None:
        """Add the `summary` of the documents that follow."""
        self.changed_documents += summary["changed_documents"]
        self.characters += summary["characters"]
        self.missing_characters += summary["missing_characters"]
        example = summary["example"]
        if example and (self._example is None or example["missing_characters"] > self._example["missing_characters"]):
            self._example = example

    def summary(self) -> dict:
        """Return the counts and, as an example, the first of the changed documents that miss most characters."""
        return {
            "changed_documents": self.changed_documents,
            "characters": self.characters,
            "missing_characters": self.missing_characters,
            "example": self._example,
        }


def describe_changes(documents: int, changes: dict) -> str:
    """Return the summary of a `RoundTrip` over `documents` documents as text; some of them are changed."""
    share = changes["missing_characters"] / max(1, changes["characters"])
    return (
        f"{changes['changed_documents']:,} of {documents:,} documents are not the same after encoding and decoding, "
        f"{share:.2%} of the characters are missing"
    )
