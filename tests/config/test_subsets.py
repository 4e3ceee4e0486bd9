"""Names of the published subsets, and their counts against the names and against one another."""

import pickle
import re
from argparse import ArgumentTypeError
from copy import deepcopy

import pytest

from megatron.config.subsets import DATA_VALUE_EPOCHS, DATA_VALUE_FAMILIES, SUBSETS, TokenCount
from megatron.training.command_line import parse


def amount(name: str) -> float:
    """Return the tokens that a published name states: 25M, 1B5."""
    whole, unit, tenths = re.fullmatch(r"(\d+)([MB])(\d?)", name).groups()
    return float(f"{whole}.{tenths or 0}") * {"M": 1e6, "B": 1e9}[unit]


def test_a_name_states_about_its_tokens():
    for name, tokens in SUBSETS.items():
        _, published, *epochs = name.split("-")
        assert tokens * int(epochs[0].removesuffix("ep") if epochs else 1) == pytest.approx(amount(published), rel=0.03)
    missing = {f"C4-{family}-50ep" for family in ("23B8", "40B")}
    assert (
        len(SUBSETS) == 8 + len(DATA_VALUE_FAMILIES) * len(DATA_VALUE_EPOCHS) - len(missing) == len({*SUBSETS.values()})
    )
    assert not missing & {*SUBSETS}


def test_the_sets_of_a_family_cost_the_same():
    """The published subsets are whole documents: k epochs of one miss the single epoch by -0.31% to +0.04%."""
    for family in DATA_VALUE_FAMILIES.values():
        for epochs in DATA_VALUE_EPOCHS[1:]:
            if tokens := SUBSETS.get(f"C4-{family}-{epochs}ep"):
                assert -0.0032 < epochs * tokens / SUBSETS[f"C4-{family}"] - 1 < 0.0005


def test_a_count_is_a_number_that_keeps_its_name():
    for copied in (
        TokenCount("C4-100M"),
        deepcopy(TokenCount("C4-100M")),
        pickle.loads(pickle.dumps(TokenCount("C4-100M"))),
    ):
        assert (copied, copied.subset) == (99_952_399, "C4-100M")
    assert [TokenCount(text) for text in ("7", "1e6", "100_000", 5)] == [7, 1_000_000, 100_000, 5]
    assert TokenCount("99952399").subset is None
    for text in ("c4-100m", "100M", "1.5", "nan"):
        with pytest.raises(ArgumentTypeError, match="or the name of a published subset"):
            TokenCount(text)


def test_a_run_names_its_subset():
    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --train-samples 1 --train-data-path a".split()
    assert parse("ar", [*flags, "--train-unique-tokens", "SlimPajama-1B"]).data.train_unique_tokens == 999_536_648
