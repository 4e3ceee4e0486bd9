"""Token ids of contexts and continuations, and counts of those that were truncated or encoded alone."""

from dataclasses import dataclass

from megatron.data.tokenizer import NullTokenizer, Tokenizer

MARK = "\u241f"  # a character that tokenizers do not merge with others


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a context and of the continuation after it."""

    context: list[int]
    continuation: list[int]
    encoded_alone: bool = False  # whether a token of the joined text spans the join


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> EncodedPair:
    """Return the ids of a context and of the continuation after it.

    1. Whitespace at the end of the context moves to the continuation, as in lm-eval.
    2. The joined text is encoded; what it adds to the ids of the context is the continuation, as in lm-eval.
    3. Where the joined ids do not begin with those of the context, or add none, a token spans the join: the
       continuation is encoded alone.

    The ids of a continuation are empty only where the continuation is, or where the tokenizer drops all of it.
    """
    stripped = context.rstrip()
    moved = context[len(stripped) :]
    context_ids, joined_ids = tokenizer.encode(stripped), tokenizer.encode(context + continuation)
    ids = joined_ids[len(context_ids) :]
    if not continuation:
        return EncodedPair(context_ids, ids)
    if (moved or not ids) and not tokenizer.encode(continuation):
        return EncodedPair(context_ids, [])  # moved whitespace alone is not a continuation
    if ids and joined_ids[: len(context_ids)] == context_ids:
        return EncodedPair(context_ids, ids)
    return EncodedPair(context_ids, _encode_alone(tokenizer, context_ids, moved + continuation, joined_ids), True)


def _encode_alone(tokenizer: Tokenizer, context_ids: list[int], text: str, joined_ids: list[int]) -> list[int]:
    """Return the ids of a text alone, without the space that some tokenizers put before every text."""
    ids = tokenizer.encode(text)
    if isinstance(tokenizer, NullTokenizer):
        return ids  # encodes numbers only, and MARK is not a number
    joined_text = tokenizer.decode(joined_ids)
    if tokenizer.decode([*context_ids, *ids]) != joined_text:
        mark_ids, marked_ids = tokenizer.encode(MARK), tokenizer.encode(MARK + text)
        after_mark = marked_ids[len(mark_ids) :]
        if after_mark and tokenizer.decode([*context_ids, *after_mark]) == joined_text:
            return after_mark
    return ids


@dataclass(frozen=True)
class EncodingCounts:
    """Numbers of requests, of truncated contexts and their tokens, and of continuations that were encoded alone."""

    requests: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    max_truncated_tokens: int = 0
    encoded_alone: int = 0

    @classmethod
    def of_request(cls, truncated_tokens: int, encoded_alone: bool = False) -> "EncodingCounts":
        """Return the counts of one request."""
        return cls(
            requests=1,
            truncated=int(truncated_tokens > 0),
            truncated_tokens=truncated_tokens,
            max_truncated_tokens=truncated_tokens,
            encoded_alone=int(encoded_alone),
        )

    def __add__(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(
            requests=self.requests + other.requests,
            truncated=self.truncated + other.truncated,
            truncated_tokens=self.truncated_tokens + other.truncated_tokens,
            max_truncated_tokens=max(self.max_truncated_tokens, other.max_truncated_tokens),
            encoded_alone=self.encoded_alone + other.encoded_alone,
        )

    def lines(self, seq_length: int) -> list[str]:
        """Return a log line for truncated contexts and one for continuations encoded alone, where there are any."""
        lines = []
        if self.truncated:
            lines.append(
                f"{self.truncated} of {self.requests} requests have a context that is truncated on the left to fit "
                f"--seq-length {seq_length}: {self.truncated_tokens} tokens in total, at most "
                f"{self.max_truncated_tokens} in one request"
            )
        if self.encoded_alone:
            lines.append(
                f"{self.encoded_alone} of {self.requests} requests have a token that spans context and continuation: "
                "their continuations are encoded alone"
            )
        return lines
