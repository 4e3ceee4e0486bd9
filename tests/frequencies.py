"""Whether counts come from a distribution that was worked out in another way."""

from collections.abc import Hashable, Mapping

import torch


def chi_square(frequencies: Mapping[Hashable, int], expected: Mapping[Hashable, float], count: int) -> float:
    """Return the probability of counts as far from `expected` shares of `count` draws; rare outcomes are one."""
    assert (
        abs(sum(expected.values()) - 1) < 1e-6
        and sum(frequencies.values()) == count
        and set(frequencies) <= set(expected)
    )
    cells, rare = [], [0.0, 0.0]
    for outcome, share in expected.items():
        pair = (frequencies.get(outcome, 0), share * count)
        if pair[1] < 5:
            rare = [rare[0] + pair[0], rare[1] + pair[1]]
        else:
            cells.append(pair)
    cells += [rare] if rare[1] else []
    assert len(cells) > 3
    distance = sum((seen - hoped) ** 2 / hoped for seen, hoped in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(distance / 2, dtype=torch.float64)))
