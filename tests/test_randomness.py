"""Keyed noise: frozen values, independence of keys."""

import numpy as np
import pytest

from megatron.randomness import radical_inverse, stream


def test_a_stream_is_a_function_of_its_key():
    assert np.array_equal(stream(1, "mask", 5).random(4), stream(1, "mask", 5).random(4))
    keys = [(1, "mask", 5), (2, "mask", 5), (1, "time", 5), (1, "mask", 6), (1, "mask", 5, 1)]
    assert len({stream(*key).random() for key in keys}) == 5


def test_the_stream_is_frozen():
    """A change here silently changes the noise of every published run."""
    assert np.allclose(stream(1234, "mask", 7).random(3), FROZEN)


def test_keys_are_words_of_64_bits():
    draws = {stream(1, "mask", key).random() for key in (7, 7 + 2**32, 7 + 2**63, 2**64 - 1)}
    assert len(draws) == 4
    assert stream(1, "mask", np.int64(2**40)).random() == stream(1, "mask", 2**40).random()
    for out_of_range in (-1, 2**64):
        with pytest.raises(OverflowError):
            stream(1, "mask", out_of_range)


def test_streams_of_neighbouring_keys_do_not_overlap():
    """The key is in higher counter words than the draws, so no stream runs into the next one."""
    draws = np.concatenate([stream(1, "mask", key).random(1000) for key in range(20)])
    assert len(np.unique(draws)) == len(draws)
    assert abs(np.corrcoef(draws[:-1000], draws[1000:])[0, 1]) < 0.03


def test_radical_inverse():
    assert [radical_inverse(i) for i in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]
    assert radical_inverse(2**53 - 1) == 1 - 2**-53


def test_too_many_keys():
    with pytest.raises(TypeError):
        stream(1, "mask", 1, 2, 3, 4)


FROZEN = [0.8258238222424918, 0.45031274228287, 0.17261175284105712]
