"""Items of local probes: contexts from held-out documents, and choices of what comes next, one of them right.

An item is a doc of lm-eval. Its label follows from the text alone: the next line, the closing bracket that matches, or
the indentation that Python's grammar requires. docs/scoring.md says which positions of a document give items.
"""

import ast
import bisect
import io
import itertools
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.data.tokenizer import Tokenizer
from megatron.scoring.encoding import encode_pair

CLOSING = {"(": ")", "[": "]", "{": "}"}
BRACKETS = re.compile(r"[()\[\]{}]")
PARAGRAPH = re.compile(r"\S.*?(?=\n\s*\n|\Z)", re.DOTALL)
SKIPPED_TOKENS = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
MIN_WORDS = 3  # of a line that is a choice
MAX_LENGTH_RATIO = 1.1  # of the choices of one item, in characters
CONTEXT_SHARE = 3 / 4  # of a sequence; the rest is left to the choices
NUM_LINES = 4  # choices of `cloze`


class Document:
    """A held-out text, as models that read `seq_length` tokens see it.

    `lines` are without their ends; `starts` and `token_starts`, [lines + 1], are the characters and the tokens before
    each line, where lines are encoded alone, after a newline.
    """

    def __init__(self, number: int, text: str, tokenizer: Tokenizer, seq_length: int):
        self.number, self.text, self.tokenizer, self.seq_length = number, text, tokenizer, seq_length
        self.lines = text.split("\n")
        self.starts = line_starts(text)
        tokens = tokenizer.encode_batch([f"\n{line}" for line in self.lines])
        self.token_starts = np.cumsum([0, *map(len, tokens)])
        self.max_context = int(seq_length * CONTEXT_SHARE)  # tokens

    def context_start(self, offset: int) -> int | None:
        """Return where the longest context begins that ends before character `offset`: at the start of a line.

        None if not even the line of `offset` fits.
        """
        line = bisect.bisect_right(self.starts, offset) - 1
        first = int(np.searchsorted(self.token_starts, self.token_starts[line + 1] - self.max_context))
        return self.starts[first] if first <= line else None


def line_starts(text: str) -> list[int]:
    """Return the first character of each line, and of the line that would follow."""
    return [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]


@dataclass(frozen=True)
class Candidate:
    """A position that may give an item: `choices` at character `offset` of a document, of which the text has `right`.

    The label follows from the text between the characters `needed` and `offset`.
    """

    document: Document
    needed: int
    offset: int
    choices: tuple[str, ...]
    right: str


@dataclass(frozen=True)
class Item:
    """An item in lm-eval's form; `document` and `offset`, in characters, are the position in the data set."""

    document: int
    offset: int
    context: str
    choices: list[str]
    label: int

    @property
    def right(self) -> str:
        """The right choice."""
        return self.choices[self.label]


# ---------------------------------------------------------------------------------------------- brackets


def bracket_candidates(documents: Iterable[Document], generator: np.random.Generator) -> Iterator[Candidate]:
    """Yield closing brackets and, at random, one of the two other kinds."""
    for document in documents:
        for opening, closing in matching_brackets(document.text):
            right = document.text[closing]
            wrong = generator.choice([bracket for bracket in CLOSING.values() if bracket != right])
            yield Candidate(document, opening, closing, (right, str(wrong)), right=right)


def matching_brackets(text: str) -> list[tuple[int, int]]:
    """Return the characters of each opening bracket and of the one that closes it.

    In Python brackets in strings and comments do not count. In other text, only those of paragraphs whose brackets
    match all count.
    """
    tokens = python_tokens(text)
    if tokens is None:
        paragraphs = [part.span() for part in PARAGRAPH.finditer(text)]
        brackets = [[match.start() for match in BRACKETS.finditer(text, *span)] for span in paragraphs]
        return [pair for offsets in brackets for pair in _match(text, offsets)]
    starts = line_starts(text)
    positions = [token.start for token in tokens if token.type == tokenize.OP and BRACKETS.fullmatch(token.string)]
    return _match(text, [starts[row - 1] + column for row, column in positions])


def _match(text: str, offsets: Iterable[int]) -> list[tuple[int, int]]:
    """Return the matching pairs of the brackets at `offsets`, in the order of their ends; none unless all match."""
    pairs, stack = [], []
    for offset in offsets:
        if text[offset] in CLOSING:
            stack.append(offset)
        elif stack and CLOSING[text[stack[-1]]] == text[offset]:
            pairs.append((stack.pop(), offset))
        else:
            return []
    return [] if stack else pairs


def python_tokens(text: str) -> list[tokenize.TokenInfo] | None:
    """Return Python's tokens of a text, those inside f-strings left out, or None if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about escapes in strings
            ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="\n").readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    depth, outside = 0, []
    for token in tokens:  # since Python 3.12 an f-string is several tokens, of which the first stands for it
        outside += [token] if not depth else []
        name = tokenize.tok_name[token.type]
        depth += name.endswith("STRING_START") - name.endswith("STRING_END")
    return outside


# ---------------------------------------------------------------------------------------------- indentation


@dataclass(frozen=True)
class LogicalLine:
    """A logical line of Python: its first token, the number of its last physical line, and whether a block follows."""

    first: tokenize.TokenInfo
    last_row: int
    opens_block: bool

    @property
    def indentation(self) -> str:
        """The white space before it."""
        return self.first.line[: self.first.start[1]]


def indentation_candidates(documents: Iterable[Document], generator: np.random.Generator) -> Iterator[Candidate]:
    """Yield first words of lines, with the indentation of the line before and with a deeper one."""
    for document in documents:
        lines = logical_lines(document.text)
        units = {
            after.indentation.removeprefix(line.indentation)
            for line, after in itertools.pairwise(lines)
            if line.opens_block
        }
        if len(units) != 1:  # also where there is no block
            continue
        unit = units.pop()
        for line, after in itertools.pairwise(lines):
            depth = line.indentation
            is_determined = line.opens_block or after.indentation == depth
            if is_determined and after.first.start[0] == line.last_row + 1 and after.first.type == tokenize.NAME:
                choices = tuple(f"\n{indentation}{after.first.string}" for indentation in (depth, depth + unit))
                needed = document.starts[line.first.start[0] - 1]
                offset = document.starts[line.last_row] - 1
                yield Candidate(document, needed, offset, choices, right=choices[line.opens_block])


def logical_lines(text: str) -> list[LogicalLine]:
    """Return the logical lines of Python code, none for other text; a block follows one that ends with a colon."""
    lines, tokens = [], []
    for token in python_tokens(text) or ():
        if token.type == tokenize.NEWLINE:
            lines.append(LogicalLine(tokens[0], token.start[0], tokens[-1].string == ":"))
            tokens = []
        elif token.type not in SKIPPED_TOKENS:
            tokens.append(token)
    return lines


# ---------------------------------------------------------------------------------------------- cloze


def cloze_candidates(documents: Sequence[Document], generator: np.random.Generator) -> Iterator[Candidate]:
    """Yield lines, and three others of the same indentation and nearly the same length; which is right is drawn.

    Every line is in one item at most. What is required of the right line is required of all four.
    """
    counts = Counter(line.strip() for document in documents for line in document.lines)
    lines = [
        (document, index)
        for document in documents
        for index, line in enumerate(document.lines)
        if counts[line.strip()] == 1 and _can_be_choice(document, index)
    ]
    lines = [lines[index] for index in generator.permutation(len(lines))]
    lines.sort(key=lambda line: _shape(line[0].lines[line[1]]))
    while len(lines) >= NUM_LINES:
        group = lines[-NUM_LINES:]
        if not _are_similar(group):
            lines.pop()
            continue
        del lines[-NUM_LINES:]
        document, index = group[generator.integers(NUM_LINES)]
        choices = tuple("\n" + other.lines[line] for other, line in group)
        offset = document.starts[index] - 1
        yield Candidate(document, offset, offset, choices, right="\n" + document.lines[index])


def _shape(line: str) -> tuple[str, int]:
    """Return the indentation of a line and its length without it."""
    content = line.lstrip()
    return line[: len(line) - len(content)], len(content)


def _can_be_choice(document: Document, index: int) -> bool:
    """Return whether a line has some words, room for its tokens, a line before it, and half a context or more."""
    tokens = document.token_starts[index + 1] - document.token_starts[index]
    return (
        len(re.findall(r"\w+", document.lines[index])) >= MIN_WORDS
        and tokens <= document.seq_length - document.max_context
        and document.token_starts[index] >= document.max_context // 2
        and bool(document.lines[index - 1].strip())
        and document.context_start(document.starts[index] - 1) is not None
    )


def _are_similar(group: list[tuple[Document, int]]) -> bool:
    """Return whether lines have one indentation, similar lengths, and distances that no context spans."""
    shapes = [_shape(document.lines[index]) for document, index in group]
    lengths = [length for _, length in shapes]
    return (
        len({indentation for indentation, _ in shapes}) == 1
        and max(lengths) <= MAX_LENGTH_RATIO * min(lengths)
        and all(
            document is not other or abs(index - line) >= document.seq_length
            for (document, index), (other, line) in itertools.combinations(group, 2)
        )
    )


# ---------------------------------------------------------------------------------------------- items


def build_item(candidate: Candidate, generator: np.random.Generator) -> Item | None:
    """Return the item of a candidate, its choices in random order.

    None if the context is too short for the label to follow from it, if context and choice do not fit `seq_length`
    tokens, or if a token of the text would span a join: of context and choice, or of the right choice and what follows.
    """
    document, offset, right = candidate.document, candidate.offset, candidate.right
    text, tokenizer = document.text, document.tokenizer
    start, end = document.context_start(offset), offset + len(right)
    if start is None or start > candidate.needed:
        return None
    pairs = [encode_pair(tokenizer, text[start:offset], choice) for choice in candidate.choices]
    if any(pair.encoded_alone or len(pair.context) + len(pair.continuation) > document.seq_length for pair in pairs):
        return None
    following = text[end : text.find("\n", end) + 1]
    if encode_pair(tokenizer, text[start:end], following).encoded_alone:
        return None
    choices = [candidate.choices[index] for index in generator.permutation(len(pairs))]
    return Item(document.number, offset, text[start:offset], choices, label=choices.index(right))
