"""Keyed noise: every random number is a pure function of (seed, purpose, key).

No generator is ever shared, advanced or saved. A stream is a Philox counter (Salmon et al., SC 2011,
"Parallel random numbers: as easy as 1, 2, 3") whose 128-bit key comes from the seed and the purpose and
whose high counter words hold the key, so two purposes or two keys never overlap.
"""

import hashlib

import numpy as np


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the generator of one named draw.

    `purpose` names what is drawn ("mask", "epoch") and always comes with the same number of key words, since a
    missing word is 0; `key` is at most three integers in [0, 2**64), in training the run position of a sample.
    The same arguments give the same numbers in every process, for every batch size, worker count and layout.
    """
    if len(key) > 3:
        raise TypeError(f"a stream has at most three key words, {len(key)} given")
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    counter = np.zeros(4, dtype=np.uint64)  # word 0 counts the draws of this stream
    counter[1 : 1 + len(key)] = key
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64), counter=counter))


def radical_inverse(index: int) -> float:
    """Return `index` < 2**53 written in binary and mirrored at the point, in [0, 1): 0, 1/2, 1/4, 3/4, 1/8, ...

    Any run of consecutive indices is spread evenly over [0, 1) (van der Corput, 1935).
    """
    value, scale = 0.0, 0.5
    while index:
        value += scale * (index & 1)
        index >>= 1
        scale /= 2
    return value
