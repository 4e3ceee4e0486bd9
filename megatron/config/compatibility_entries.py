"""Entries of the compatibility table: an alias, a no-op flag, a refused flag."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Same:
    """An alias of `words`; the value of the flag follows them, unless `words` end in one or the flag is a `switch`.

    With `batches` the value counts batches and ours counts samples.
    """

    words: str
    batches: bool = False
    switch: bool = False


@dataclass(frozen=True)
class NoOp:
    """Accepted without effect; with `only`, values other than these are refused with the message `otherwise`.

    A value is required with `takes_value`, and optional with `may_take_value`.
    """

    reason: str
    takes_value: bool = False
    only: tuple[str, ...] = ()
    otherwise: str = ""
    may_take_value: bool = False


@dataclass(frozen=True)
class Refused:
    """Refused with the message `FLAG: reason`."""

    reason: str


def no_op(names: str, reason: str) -> dict:
    """Return table entries of switches without effect."""
    return {name: NoOp(reason) for name in names.split()}


def no_op_value(names: str, reason: str, only: str = "", otherwise: str = "") -> dict:
    """Return table entries of flags with one value and without effect."""
    return {
        name: NoOp(reason, takes_value=True, only=tuple(only.split()), otherwise=otherwise) for name in names.split()
    }


def refused(names: str, reason: str) -> dict:
    """Return table entries of refused flags."""
    return {name: Refused(reason) for name in names.split()}


def later(names: str, feature: str) -> dict:
    """Return table entries of flags of a feature that does not exist yet."""
    return refused(names, f"not supported yet ({feature}); leave it out")


def one_table(*groups: dict) -> dict:
    """Return all groups as one table.

    Raises: TypeError if two of them claim one flag.
    """
    table = {}
    for group in groups:
        if duplicates := table.keys() & group.keys():
            raise TypeError(f"claimed twice: {', '.join(duplicates)}")
        table |= group
    return table
