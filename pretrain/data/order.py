"""Which sample comes when: a keyed permutation of each epoch, computed for any position in constant time and memory."""

import numpy as np

from pretrain.philox import philox

_ROUNDS = 8


def shuffled(positions: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample ids and visits at some positions of the endless stream of epochs.

    Args:
        positions: ``[n]`` int64, counted from the start of the run; epoch ``e`` covers ``[e·size, (e+1)·size)``.
        size: number of samples in the store.
        seed: the run's seed.

    Returns:
        sample ids ``[n]`` int64, a permutation of ``0..size-1`` within each epoch, and visits ``[n]`` int64, the epoch.

    The permutation is a balanced Feistel network with Philox as its round function; values outside the range are sent
    through again until they fall inside it (cycle walking), which leaves a bijection.
    """
    positions = np.asarray(positions, np.int64)
    visits, places = positions // size, positions % size
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    ids, outside = places.copy(), np.ones(len(places), bool)
    while outside.any():
        left, right, visit = ids[outside] >> half_bits, ids[outside] & mask, visits[outside]
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (philox(seed, "order", right, visit, round_)[0] & mask)
        ids[outside] = (left << half_bits) | right
        outside[outside] = ids[outside] >= size
    return ids, visits
