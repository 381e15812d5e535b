"""Counter-based randomness: Philox 4×32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every random decision of a run (data order, packing, masks, draws of objectives) is a pure function of a key, the run's
seed and a named stream, and a counter, such as (position, sample id, visit). So the same run on another number of
ranks, with another micro-batch, or after a resume decides the same. The functions work alike on numpy int64 arrays
and on torch int64 tensors of any device; all numbers are unsigned 32-bit values held in int64.
"""

import zlib

import numpy as np

from fused_objectives.backend import jit, tl

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def stream_id(name: str) -> int:
    """Return the 32-bit number of a named stream."""
    return zlib.crc32(name.encode())


def philox(seed: int, stream: str, counter_0, counter_1=0, counter_2=0, counter_3=0) -> tuple:
    """Return four arrays of independent uniform 32-bit words, one set for each counter.

    Args:
        seed: the run's seed; its low 32 bits are the first key word.
        stream: what the numbers are for; its hash is the second key word.
        counter_0 .. counter_3: int64 arrays or tensors that broadcast together (``counter_0`` sets the shape), or ints.
    """
    return philox_of_key(seed & _MASK, stream_id(stream), counter_0, counter_1, counter_2, counter_3)


def philox_of_key(key_0, key_1, counter_0, counter_1=0, counter_2=0, counter_3=0) -> tuple:
    """The same under two 32-bit key words, ints or arrays that broadcast to the shape of ``counter_0``.

    The product of two 32-bit words wraps in int64, but its bits are those of the unsigned product, so shifting and
    masking recovers both halves. Where a tensor is new it is changed in place, which saves a third of the time.
    """
    c0, c1, c2, c3 = (counter & _MASK for counter in (counter_0, counter_1, counter_2, counter_3))
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> 32) ^ c1
        c0 ^= key_0
        c0 &= _MASK
        c2 = (product_0 >> 32) ^ c3
        c2 ^= key_1
        c2 &= _MASK
        product_0 &= _MASK
        product_1 &= _MASK
        c1, c3 = product_1, product_0
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK, (key_1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(word):
    """Map 32-bit words to float64 in [0, 1)."""
    if hasattr(word, "double"):  # torch would take float32, which rounds the last words up to 1
        word = word.double()
    return word * 2.0**-32


def below(word, bound: int):
    """Map 32-bit words to integers in [0, bound) by the high half of the product (bias below bound / 2³²)."""
    return (word * bound) >> 32


def scalar_seed(seed: int, stream: str, *counter: int) -> int:
    """Return one 32-bit number for up to four integer counters, to seed a library's own generator with."""
    return int(philox(seed, stream, *counter)[0])


def uniforms(seed: int, stream: str, counter_0: np.ndarray, *counters) -> np.ndarray:
    """Return float64 uniforms in [0, 1), one for each element of ``counter_0``."""
    return uniform(philox(seed, stream, counter_0, *counters)[0])


@jit
def philox_words(seed, stream, position, sample, visit):
    """The same four words within a kernel, as uint32, for the counter (position, sample id, visit).

    Args:
        seed: scalar; its low 32 bits are the first key word.
        stream: scalar, :func:`stream_id` of the stream's name.
        position, sample, visit: integer blocks of one shape; the low 32 bits of position and visit count.
    """
    key = (stream.to(tl.int64) << 32) | (seed.to(tl.int64) & 0xFFFFFFFF)
    wide = sample.to(tl.int64)
    return tl.philox(key, position.to(tl.int32), wide.to(tl.int32), (wide >> 32).to(tl.int32), visit.to(tl.int32))
