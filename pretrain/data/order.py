"""Which sample comes when: a keyed permutation of each epoch, computed for any position in constant time and memory."""

import math

import numpy as np

from fused_objectives.philox import below, philox

_ROUNDS = 8


def shuffled(positions: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample ids and visits at some positions of the endless stream of epochs.

    Args:
        positions: ``[n]`` int64, counted from the start of the run; epoch ``e`` covers ``[e·size, (e+1)·size)``.
        size: number of samples in the store.
        seed: the run's seed.

    Returns:
        sample ids ``[n]`` int64, a permutation of ``0..size-1`` within each epoch, and visits ``[n]`` int64, the epoch.

    The permutation is a generalised Feistel network (Black and Rogaway, CT-RSA 2002, "Ciphers with arbitrary finite
    domains") with Philox as its round function: an id is a place in a table of about √size rows and columns, and
    its row and column are rotated in turn. The table has less than √size places too many; what falls on those is
    sent through again (cycle walking), which leaves a bijection.
    """
    positions = np.asarray(positions, np.int64)
    visits, places = positions // size, positions % size
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    ids, outside = places.copy(), np.ones(len(places), bool)
    while outside.any():
        row, column, visit = ids[outside] // columns, ids[outside] % columns, visits[outside]
        for round_ in range(0, _ROUNDS, 2):
            row = (row + below(philox(seed, "order", column, visit, round_)[0], rows)) % rows
            column = (column + below(philox(seed, "order", row, visit, round_ + 1)[0], columns)) % columns
        ids[outside] = row * columns + column
        outside[outside] = ids[outside] >= size
    return ids, visits
