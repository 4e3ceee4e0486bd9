"""The published subsets of C4 and SlimPajama by name, and numbers of tokens that may be given by such a name.

A subset is the first documents of its data set, with one end-of-document token each, as GPT-2's BPE counts them.
Source of the counts: utils/epoch_tokens.sh of the published system (2507.15857).
"""

from argparse import ArgumentTypeError

from megatron.config.flags import parse_number

UNIQUE_TOKENS = {
    "25M": 24_743_247,
    "50M": 49_874_872,
    "100M": 99_952_399,
    "200M": 199_836_911,
    "500M": 499_791_318,
    "SLIM_100M": 100_555_177,
    "SLIM_1B": 999_536_648,
    "SLIM_1B5": 1_463_840_091,
}
# (objective, training FLOPs): unique tokens of the published set read for that many epochs, all at the same compute
DATA_VALUE_EPOCHS = (1, 2, 4, 10, 20, 50, 100)
DATA_VALUE_TOKENS = {
    ("ar", 1e19): (7659172026, 3828933780, 1912366531, 765785518, 382715500, 153236635, 76353846),
    ("ar", 3e19): (11989951744, 5994199162, 2996211869, 1197248201, 599002480, 239303648, 119915151),
    ("ar", 1e20): (23799431827, 11896289461, 5948135698, 2377968564, 1188094510, None, 237404226),
    ("mdm", 1e19): (13483058828, 6740277937, 3369504102, 1346088411, 673890685, 269182389, 134797413),
    ("mdm", 3e19): (22988018799, 11490703400, 5744951068, 2296463795, 1147274152, 459770397, 229473764),
    ("mdm", 1e20): (39984781511, 19993255532, 9992112872, 3995476798, 1995252321, None, 399354803),
}
# the published names of these families, after the tokens of their single epoch
DATA_VALUE_FAMILIES = {
    ("ar", 1e19): "7B6",
    ("ar", 3e19): "12B",
    ("ar", 1e20): "23B8",
    ("mdm", 1e19): "13B5",
    ("mdm", 3e19): "23B",
    ("mdm", 1e20): "40B",
}


def subset_name(published: str, epochs: int = 1) -> str:
    """Return the name of a subset from its published name, and the epochs for which its family reads it."""
    corpus = "SlimPajama" if published.startswith("SLIM_") else "C4"
    return f"{corpus}-{published.removeprefix('SLIM_')}" + (f"-{epochs}ep" if epochs > 1 else "")


def _named() -> dict[str, int]:
    """Return the tokens of all subsets by name."""
    named = {subset_name(name): tokens for name, tokens in UNIQUE_TOKENS.items()}
    for point, family in DATA_VALUE_FAMILIES.items():
        pairs = zip(DATA_VALUE_EPOCHS, DATA_VALUE_TOKENS[point], strict=True)
        named |= {subset_name(family, epochs): tokens for epochs, tokens in pairs if tokens}
    return named


SUBSETS = _named()  # tokens by name: "C4-100M", "SlimPajama-1B", and "C4-7B6-4ep" for the set of 4 epochs of "C4-7B6"


class TokenCount(int):
    """A number of tokens, which may be given by the name of a published subset: then `subset` is that name."""

    subset: str | None = None

    def __new__(cls, value: str | int) -> "TokenCount":
        """Return the count of a number, of a whole number as flags take them, or of a name.

        Raises: ArgumentTypeError for other text, with a message that follows the name of the flag.
        """
        if isinstance(value, TokenCount):
            return value
        if not isinstance(value, str):
            return super().__new__(cls, value)
        if value not in SUBSETS:
            try:
                return super().__new__(cls, parse_number(int, value))
            except ArgumentTypeError as error:
                message = f"{error}, or the name of a published subset, such as C4-100M (tools/sizes.py lists them)"
                raise ArgumentTypeError(message) from None
        count = super().__new__(cls, SUBSETS[value])
        count.subset = value
        return count
