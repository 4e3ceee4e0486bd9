"""Keyed noise: every random number is a pure function of (seed, purpose, key).

No generator is shared, advanced or saved. A stream is a Philox counter (Salmon et al., SC 2011, "Parallel random
numbers: as easy as 1, 2, 3"): its 128-bit key is a hash of seed and purpose, and the key words are the high words of
its counter, so streams of different purposes or keys never overlap.
"""

import hashlib

import numpy as np


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the random generator of one purpose and key.

    `purpose` names the use ("mask", "epoch"); all calls with one purpose must have the same number of key words, since
    a missing word is 0. `key` is at most three integers in [0, 2**64), in training usually the sample index. The same
    arguments give the same random numbers on every rank, for every batch size, worker count and layout.

    Raises: TypeError for more than three key words, OverflowError for one out of range.
    """
    if len(key) > 3:
        raise TypeError(f"a stream has at most three key words, {len(key)} given")
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    counter = np.zeros(4, dtype=np.uint64)  # Philox advances word 0
    counter[1 : 1 + len(key)] = key
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64), counter=counter))


def radical_inverse(index: int) -> float:
    """Return the base-2 radical inverse of `index` < 2**53, in [0, 1): 0, 1/2, 1/4, 3/4, 1/8, ...

    The binary digits of `index` are mirrored at the point, so any consecutive indices are spread evenly over [0, 1)
    (van der Corput, 1935).
    """
    value = 0.0
    scale = 0.5
    while index:
        value += scale * (index & 1)
        index >>= 1
        scale /= 2
    return value
