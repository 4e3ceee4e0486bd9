"""Every range, need and exclusion that a field declares is checked, and shown in --help."""

import dataclasses
import re

import pytest

from megatron.config.flags import REQUIRED, Section, flag, spelling, typed
from megatron.config.ranges import Range
from megatron.config.sections import SECTIONS, ModelConfig
from megatron.errors import ConfigurationError
from megatron.training.command_line import parser

MODEL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
FIELDS = [(section, field) for section in SECTIONS.values() for field in dataclasses.fields(section)]


def declaring(name: str) -> list:
    """Return (section, field) of the fields that declare a constraint, as parameters of a test."""
    return [pytest.param(*item, id=item[1].name) for item in FIELDS if item[1].metadata[name]]


@pytest.fixture(scope="module")
def help_of_flags() -> dict[str, str]:
    """The help of each flag, on one line."""
    actions = parser("ar")._actions
    return {action.dest: " ".join((action.help or "").split()).replace("%%", "%") for action in actions}


def refusal(section, **fields) -> str:
    with pytest.raises(ConfigurationError) as caught:
        section(**(MODEL if section is ModelConfig else {}) | fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outside(within: Range) -> list[float]:
    """Return values next to the bounds of a range and beyond them."""
    values = [within.low] if within.open_low else [within.low - 1]
    if within.high < float("inf"):
        values.append(within.high if within.open_high else within.high + 1)
    return [*values, within.low - 2, float("nan")]


def other_value(section, name: str):
    """Return a valid value of a field that is not its default."""
    (field,) = (field for field in dataclasses.fields(section) if field.name == name)
    within, default = field.metadata["within"], field.default
    if isinstance(default, bool):
        return not default
    if within:
        return next(value for value in (0.25, 0.5, 1, 2) if value in within and value != default)
    return ("value",) if default == () else "value"


def relation(section, text: str) -> tuple[dict, str]:
    """Return the field of a relation with a value that fulfils it, and its flag as --help shows it."""
    name, space, value = text.partition(" ")
    return {name: value or other_value(section, name)}, spelling(name) + space + value


@pytest.mark.parametrize("section, field", declaring("within"))
def test_a_value_outside_its_range_is_refused_and_help_names_the_range(section, field, help_of_flags):
    within = field.metadata["within"]
    remedy = "change it" if field.default is REQUIRED else "change it, or leave it out for the default"
    for value in outside(within):
        message = refusal(section, **{field.name: value})
        assert message == f"{spelling(field.name)} {value}: {within.requirement}; {remedy}"
    assert field.default in (REQUIRED, None) or field.default in within
    assert re.search(rf"\({re.escape(str(within))}[;)]", help_of_flags[field.name])


@pytest.mark.parametrize("section, field", declaring("needs"))
def test_a_value_without_what_it_needs_is_refused_and_help_names_that(section, field, help_of_flags):
    value = other_value(section, field.name)
    for text in field.metadata["needs"]:
        _, needed = relation(section, text)
        message = refusal(section, **{field.name: value})
        assert message == f"{typed(field.name, value)}: does nothing without {needed}; give both or neither"
        assert re.search(rf"[(;] ?needs {re.escape(needed)}[;)]", help_of_flags[field.name])


@pytest.mark.parametrize("section, field", declaring("excludes"))
def test_a_value_with_what_it_excludes_is_refused_and_help_names_that(section, field, help_of_flags):
    value = other_value(section, field.name)
    for text in field.metadata["excludes"]:
        fields, excluded = relation(section, text)
        ((name, other),) = fields.items()
        message = refusal(section, **{field.name: value}, **fields)
        assert message == f"{typed(field.name, value)}: excludes {typed(name, other)}; give one of them"
        assert re.search(rf"[(;] ?excludes {re.escape(excluded)}[;)]", help_of_flags[field.name])


def test_constraints_name_fields_of_their_section():
    for section, field in FIELDS:
        for text in (*field.metadata["needs"], *field.metadata["excludes"]):
            assert text.partition(" ")[0] in {other.name for other in dataclasses.fields(section)}


def test_a_need_that_is_met_and_an_exclusion_that_is_not_pass():
    @dataclasses.dataclass(frozen=True)
    class Sample(Section):
        """Sample."""

        kind: str = flag("plain", "a kind")
        size: int | None = flag(None, "a size", within="[1, inf)", needs="kind large")
        start: int | None = flag(None, "a start", excludes="size")

    assert Sample("large", 3).size == 3 and Sample(start=0).start == 0
    with pytest.raises(ConfigurationError, match="^--size 3: does nothing without --kind large; give both or neither$"):
        Sample("small", 3)
    with pytest.raises(ConfigurationError, match="^--start 0: excludes --size 1; give one of them$"):
        Sample("large", 1, 0)


@pytest.mark.parametrize(
    "text, words, inside, outside",
    [
        ("[0, 1)", "in [0, 1)", (0, 0.999), (-1e-9, 1)),
        ("(0, 1]", "in (0, 1]", (1e-9, 1), (0, 1.1)),
        ("[0, 720]", "in [0, 720]", (0, 720), (-1, 721)),
        ("(0, inf)", "positive", (1e-300, 1e300), (0, -1)),
        ("[0, inf)", "not negative", (0, 5), (-1e-9,)),
        ("[2, inf)", "at least 2", (2, 10**9), (1,)),
        ("(2, inf)", "above 2", (3,), (2,)),
    ],
)
def test_a_range_says_what_it_holds(text, words, inside, outside):
    within = Range.parse(text)
    assert str(within) == words
    assert all(value in within for value in inside) and not any(value in within for value in outside)


@pytest.mark.parametrize("text", ["0, 1", "[0 1]", "[0, 1", "at least 1"])
def test_what_is_no_interval_is_a_programming_error(text):
    with pytest.raises(TypeError, match="is not an interval"):
        Range.parse(text)
