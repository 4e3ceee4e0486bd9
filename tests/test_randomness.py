"""Keyed noise: frozen values, independence of keys."""

import numpy as np
import pytest

from megatron.randomness import radical_inverse, stream


def test_a_stream_is_a_function_of_its_key():
    assert np.array_equal(stream(1, "mask", 5).random(4), stream(1, "mask", 5).random(4))
    draws = [
        stream(*key).random()
        for key in [(1, "mask", 5), (2, "mask", 5), (1, "time", 5), (1, "mask", 6), (1, "mask", 5, 1)]
    ]
    assert len(set(draws)) == 5


def test_the_stream_is_frozen():
    """A change here silently changes the noise of every published run."""
    assert np.allclose(stream(1234, "mask", 7).random(3), FROZEN)


def test_radical_inverse():
    assert [radical_inverse(i) for i in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]


def test_too_many_keys():
    with pytest.raises(TypeError):
        stream(1, "mask", 1, 2, 3, 4)


FROZEN = [0.8258238222424918, 0.45031274228287, 0.17261175284105712]
