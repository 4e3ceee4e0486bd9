"""What README and docs state about defaults and tolerances, compared with the code."""

import dataclasses
import re

import pytest

from megatron.config.sections import SECTIONS
from tests.conftest import ROOT
from tests.steps import LOSS_TOLERANCE

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"combinations.md", "compatibility.md"}
DEFAULTS = {
    "--" + field.name.replace("_", "-"): field.default
    for section in SECTIONS.values()
    for field in dataclasses.fields(section)
}
FLAG = r"`(--[a-z][\w-]*)[^`]*`"
VALUE = r"`?(\d[\w.+-]*|(?<=`)[\w-]+)`?"  # a number, or a word in backticks
STATEMENTS = (
    rf"{FLAG}[^`|\n]*?\bdefault(?:s to| is| of)? {VALUE}",  # `--flag` ..., default 3
    rf"{FLAG}[^`|\n]*?, {VALUE} (?:without the flag|by default)",
)


def default_of(flag: str) -> str:
    """Return the default of a flag as documentation writes it."""
    value = DEFAULTS[flag]
    return f"{value:g}" if isinstance(value, float) else str(value)


def false_statements(text: str) -> list[str]:
    """Return what a page says about a default that is not so."""
    stated = [match for pattern in STATEMENTS for match in re.findall(pattern, text)]
    # a table whose rows are the values of the flag named last before it
    for value, before in (
        (row[1], text[: row.start()]) for row in re.finditer(r"^\| `([\w-]+)` \(default\)", text, re.M)
    ):
        stated.append((re.findall(FLAG, before)[-1], value))
    known = [(flag, value) for flag, value in stated if flag in DEFAULTS]
    return [f"{flag}: {value}, but it is {default_of(flag)}" for flag, value in known if default_of(flag) != value]


def regularisers() -> list[tuple[str, str | None]]:
    """Return (flag, stated default) of the table of regularisers in docs/training.md; None: off."""
    text = (ROOT / "docs" / "training.md").read_text()
    on = dict(re.findall(r"off by default but ([a-z ]+), which is ([\d.]+)", text))
    section = text[text.index("Regularisers do not act") : text.index("`--optimizer muon`")]
    rows = [line for line in section.splitlines() if line.startswith("| `--")]
    stated = {"--" + name.replace(" ", "-"): value for name, value in on.items()}
    return [(flag, stated.get(flag)) for row in rows for flag in re.findall(FLAG, row.split("|")[1])]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_stated_defaults_are_true(page):
    assert false_statements(page.read_text()) == []


def test_defaults_are_stated_at_all():
    text = "\n".join(page.read_text() for page in PAGES)
    assert sum(len(re.findall(pattern, text)) for pattern in STATEMENTS) + len(re.findall(r"\(default\)", text)) >= 2


@pytest.mark.parametrize(
    "text",
    [
        "`--distributed-timeout-minutes`, 20 without the flag",
        "`--weight-decay` is decoupled, default 0",
        "`--num-mc N` (default 7)",
        "`--epoch-order` says how:\n\n| order |\n|---|\n| `windows` (default) | x |",
    ],
)
def test_a_planted_false_default_is_found(text):
    assert len(false_statements(text)) == 1


@pytest.mark.parametrize("flag, stated", regularisers())
def test_regularisers_are_off_but_where_stated(flag, stated):
    assert default_of(flag) == stated if stated else not DEFAULTS[flag]


def test_the_stated_tolerance_is_the_tested_one():
    stated = re.search(r"losses agree to (1e-\d) per step in fp32", (ROOT / "docs" / "checkpoints.md").read_text())[1]
    assert float(stated) == LOSS_TOLERANCE
