"""docs/combinations.md is what the code does."""

from pathlib import Path

import pytest

from megatron.objectives.registry import OBJECTIVES
from megatron.training.command_line import parser
from tests.distributed import joined
from tests.objectives.combinations import OPTIONS, markdown, pairs, refusal

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"


def test_the_page_tells_what_is_refused_and_why():
    assert PAGE.read_text() == markdown(pairs(None)), (
        "run python -m tests.objectives.combinations > docs/combinations.md"
    )


@pytest.mark.slow
def test_what_the_page_says_to_work_does():
    with joined() as ranks:
        assert PAGE.read_text() == markdown(pairs(ranks))


def test_the_flag_knows_every_objective():
    assert "--objective {" + ",".join(OBJECTIVES) + "}" in parser("ar").format_help()


def test_a_refusal_names_the_flag():
    for option in OPTIONS:
        message = refusal(f"--objective block-diffusion {option}", None)
        if message is not None:
            assert message.startswith("--") and ": " in message and "\n" not in message
