"""Flags are generated from the sections: names, types, defaults, help, and one line for every mistake."""

import dataclasses
import typing

import pytest

from megatron.config import flags as machinery
from megatron.config.flags import (
    REQUIRED,
    HelpFormatter,
    Parser,
    add_section,
    build,
    flag,
    one_namespace,
    require,
    typed,
)
from megatron.config.sections import SECTIONS
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse, parser

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2".split()
FIELDS = [(section, field) for section in SECTIONS.values() for field in dataclasses.fields(section)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample: one field of each kind."""

    count_of_it: int = flag(help="a required integer")
    share: float = flag(0.5, "a number, 50% of the time")
    name: str = flag("one", "a choice", choices=("one", "two"))
    path: str | None = flag(None, "text", metavar="FILE")
    switch: bool = flag(True, "on or off")
    maybe: bool | None = flag(None, "on, off or neither")
    several: tuple[int, ...] = flag((), "several integers")


def sample(line: str = "--count-of-it 1", **defaults):
    sample_parser = Parser(formatter_class=HelpFormatter, allow_abbrev=False)
    add_section(sample_parser, Sample, defaults)
    return build(Sample, sample_parser.parse_known(line.split()))


def test_every_kind_of_field_becomes_a_flag():
    default = Sample(count_of_it=1)
    assert sample() == default
    line = "--count-of-it 3 --share 1e-3 --name two --path p --no-switch --maybe --several 1 2_000 1e3"
    expected = Sample(
        count_of_it=3, share=1e-3, name="two", path="p", switch=False, maybe=True, several=(1, 2000, 1000)
    )
    assert sample(line) == expected
    assert sample("--count-of-it=3 --path q") == dataclasses.replace(default, count_of_it=3, path="q")
    assert sample("--count-of-it 1 --count-of-it 2").count_of_it == 2  # the last one wins: scripts end with "$@"


def test_a_recipe_replaces_defaults_and_flags_win_over_it():
    assert sample(share=0.1, count_of_it=7).share == 0.1
    assert sample("", count_of_it=7).count_of_it == 7
    assert sample("--count-of-it 1 --share 0.2", share=0.1).share == 0.2


@pytest.mark.parametrize("text, value", [("100000", 100_000), ("100_000", 100_000), ("1e5", 100_000), ("-3", -3)])
def test_integers_may_be_written_in_three_ways(text, value):
    assert sample(f"--count-of-it {text}").count_of_it == value


def test_a_long_integer_is_not_rounded():
    assert sample(f"--count-of-it {2**60 + 1}").count_of_it == 2**60 + 1


MISTAKES = {
    "": "--count-of-it: required and not given; --help describes them",
    "--count-of-it x": "--count-of-it x: is not a number; write it like 100000, 100_000 or 1e5",
    "--count-of-it 1.5": "--count-of-it 1.5: is not a whole number; give one",
    "--count-of-it nan": "--count-of-it nan: is not a finite number; give one",
    "--count-of-it 1e999": "--count-of-it 1e999: is not a finite number; give one",
    "--count-of-it 1 --share nan": "--share nan: is not a finite number; give one",
    "--count-of-it 1 --share -inf": "--share -inf",
    "--count-of-it 1 --share half": "--share half: is not a number; write it like 0.1 or 1e-3",
    "--count-of-it 1 --name three": "--name three: is not one of one, two",
    "--count-of-it 1 --several 1 2 x": "--several x: is not a number",
    "--count-of-it": "--count-of-it: is not followed by a value; give one",
    "--count-of-it 1 --several": "--several: is not followed by a value; give one",
    "--count-of-it 1 --switch=yes": "--switch/--no-switch: takes no value; write the flag alone",
    "--count-of-it 1 --sahre 1": "unknown flag --sahre; did you mean --share?",
    "--count-of-it 1 --zzzz": "unknown flag --zzzz; --help lists every flag",
    "--count-of-it 1 2": "2: belongs to no flag; each flag is followed by its own values",
    "--count 1": "unknown flag --count; did you mean --count-of-it?",
}


@pytest.mark.parametrize("line", [line for line in MISTAKES if "-inf" not in line])
def test_mistakes_are_told_in_one_line(line):
    with pytest.raises(ConfigurationError) as caught:
        sample(line)
    assert str(caught.value).startswith(MISTAKES[line]) and "\n" not in str(caught.value)


def test_a_negative_infinity_is_refused_too():
    with pytest.raises(ConfigurationError, match="^--share -inf: is not a finite number"):
        sample("--count-of-it 1 --share=-inf")


def test_all_missing_flags_are_named_at_once():
    with pytest.raises(ConfigurationError, match="^--num-layers, --hidden-size and --num-attention-heads: required"):
        parse("ar", [])


def test_values_are_shown_as_they_are_typed():
    assert typed("lr", 0.1) == "--lr 0.1" and typed("num_layers", 3) == "--num-layers 3"
    assert typed("fp32", True) == "--fp32" and typed("swiglu", False) == "--no-swiglu"
    assert typed("min_lr", None) == "no --min-lr" and typed("data_path", ()) == "no --data-path"
    assert typed("data_path", ("a", "b")) == "--data-path a b" == typed("data_path", ["a", "b"])
    assert typed("txt_separator", "") == "--txt-separator ''"
    with pytest.raises(ConfigurationError, match="^--lr 0: must be positive$"):
        require(False, "lr", 0, "must be positive")
    require(True, "lr", 1, "must be positive")


def test_two_sections_cannot_claim_one_flag():
    @dataclasses.dataclass(frozen=True)
    class Other:
        share: int = flag(1, "a name of Sample")

    with pytest.raises(TypeError, match="--share is claimed by Sample.share and by Other.share"):
        one_namespace({"first": Sample, "second": Other})
    assert one_namespace({"first": Sample}) == {"first": Sample}


def test_the_sections_are_checked_at_import(monkeypatch):
    import importlib

    from megatron.config import sections

    def refuse(_):
        raise TypeError("checked")

    with monkeypatch.context() as patched:
        patched.setattr(machinery, "one_namespace", refuse)
        with pytest.raises(TypeError, match="checked"):
            specification = importlib.util.spec_from_file_location("another", sections.__file__)
            specification.loader.exec_module(importlib.util.module_from_spec(specification))


@pytest.mark.parametrize("section, field", FIELDS, ids=lambda item: getattr(item, "name", None))
def test_every_field_is_a_flag_with_help_and_a_default_that_it_accepts(section, field):
    help = field.metadata["help"]
    assert len(help) > 5 and not help.endswith(".") and help[0] not in " -"
    if field.default is REQUIRED:
        return
    kind = typing.get_type_hints(section)[field.name]
    allowed = typing.get_args(kind) if typing.get_origin(kind) is not tuple else ()
    assert isinstance(field.default, allowed or typing.get_origin(kind) or kind)
    choices = field.metadata["choices"]
    assert not choices or field.default in choices or (field.default is None and type(None) in allowed)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_help_is_grouped_complete_and_fits(objective):
    text = parser(objective).format_help()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    usage = f"usage: pretrain_{'gpt' if objective == 'ar' else 'mdm'}.py --num-layers INT --hidden-size INT"
    assert lines[0].startswith(usage) and lines[0].endswith("[FLAG ...]")
    position = 0
    for section in SECTIONS.values():  # sections and their flags are in order
        position = text.index("\n" + section.__doc__.splitlines()[0].rstrip(".") + ":\n", position)
        for field in dataclasses.fields(section):
            position = text.index(f"\n  --{field.name.replace('_', '-')}", position)
    flat = " ".join(text.split())
    assert flat.count("; required)") == 3 and "number of transformer blocks (at least 1; required)" in flat
    assert "peak learning rate (positive; default: 0.0002)" in flat
    assert "SwiGLU MLP; --no-swiglu is GELU (default: on)" in flat
    assert "(default: None)" not in flat and "default: False" not in flat and "PREFIX" in flat
    assert "default 1% of the budget" in flat and "%%" not in flat
    assert not [
        line for line in lines if line.rstrip().endswith("-") and "--" in line
    ]  # flags are not broken at hyphens


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_help_is_printed_and_leaves_with_0(objective, capsys):
    with pytest.raises(SystemExit) as left:
        parser(objective).parse_known(["--help"])
    assert left.value.code == 0 and "--train-epochs" in capsys.readouterr().out


def test_parse_returns_typed_sections():
    config = parse("mdm", [*MODEL, "--data-path", "a", "--lr", "1e-3", "--no-fp32", "--seq-length", "1e2"])
    assert config.model.num_layers == 2 and config.data.train_data_path == ("a",) and config.optimizer.lr == 1e-3
    assert config.training.fp32 is False and config.training.bf16 is None and config.data.seq_length == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 2
