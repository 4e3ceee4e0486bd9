"""The field's words: private synonyms stay out of prose, filler names out of code; the glossary is true."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

from tests.conftest import ROOT

# what stands for something else in the field, and the field's word; docs/glossary.md has the terms
WORDS = {
    r"beside": "next to, with",
    r"behind": "after",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"told|speaks?( of)?": "given, reported, predicts",
    r"(goes|went|going) on": "continues, resumes",
    r"(a|each|every|another|one|whole|any) training(?= (that|which|is|was|of|goes|ends|runs|with|on|in)\b|[.,;:)])": (
        "a training run"
    ),
    r"kept keys": "KV cache",
    r"hidden tokens?": "masked token",
    r"stands? at": "is at position",
    r"raw weights": "model weights",
    r"eager blocks": "uncompiled blocks",
    r"(leaves?|left) with (code )?[0-9]": "exits with code",
    r"main job": "quickstart",
    r"(so many )?times (less|as long)": "a ratio or factor",
    r"clock of the wall": "wall-clock time",
    r"squares of (a |the )?masks?": "tiles of a BlockMask",
    r"run positions?": "sample index",
    r"filled up": "padded",
    r"rivals?": "choices",
}
FILLERS = {"found", "asked", "said", "told", "made", "kept", "each", "one", "rule"}
GENERATED = {"docs/combinations.md", "docs/compatibility.md"}


def tracked(*suffixes: str) -> list[Path]:
    """Return the project's files of some suffixes, this one and generated tables left out."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    left_out = {*GENERATED, str(Path(__file__).relative_to(ROOT))}
    return [
        ROOT / name for name in names if name.endswith(suffixes) and name not in left_out and (ROOT / name).exists()
    ]


def prose(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of what people read: comments and strings of Python, everything of other files."""
    text = path.read_text()
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.start[0] + offset, line)
        for token in tokens
        if token.type in kinds
        for offset, line in enumerate(token.string.splitlines())
    ]


def private_words(path: Path) -> list[str]:
    """Return the places where a file uses a word of the table above."""
    return [
        f"{path}:{line}: {match.group()!r}, say: {better}"
        for line, text in prose(path)
        for pattern, better in WORDS.items()
        if (match := re.search(rf"\b({pattern})\b", text, re.IGNORECASE))
    ]


def filler_names(source: str) -> list[tuple[int, str]]:
    """Return (line, name) of every variable, argument, function or class with a filler for a name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append((node.lineno, node.name))
    return [(line, name) for line, name in names if name in FILLERS]


def test_prose_uses_the_words_of_the_field():
    assert [place for path in tracked(".py", ".md", ".sh") for place in private_words(path)] == []


def test_names_say_what_a_value_is():
    assert [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in tracked(".py")
        for line, name in filler_names(path.read_text())
    ] == []


@pytest.mark.parametrize("text", ["beside it", "what it speaks of", "a training that ends", "Hidden tokens", "goes on"])
def test_a_planted_word_is_found(text, tmp_path):
    for name, content in (("page.md", text), ("code.py", f'"""{text}"""\nx = 1  # {text}\n')):
        (tmp_path / name).write_text(content)
        assert private_words(tmp_path / name)


@pytest.mark.parametrize("source", ["found = 1", "def f(asked): ...", "for each in x: ...", "def said(): ..."])
def test_a_planted_filler_is_found(source):
    assert filler_names(source)


def glossary() -> list[tuple[str, str]]:
    """Return (term, file) of every row of the glossary."""
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()]
    return [(cells[0].strip(), cells[-1].strip(" `")) for cells in rows if len(cells) == 5 and "/" in cells[-1]]


@pytest.mark.parametrize("term, file", glossary())
def test_a_term_is_used_where_the_glossary_says(term, file):
    text = re.sub(r"\s+", " ", (ROOT / file).read_text().lower())
    alternatives = [re.sub(r" \(.*\)|`", "", word).strip() for word in term.lower().split(",")]
    assert any(word in text for word in alternatives), f"none of {alternatives} in {file}"
