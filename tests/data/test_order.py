import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from pretrain.data.order import shuffled

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 257, 1023, 1024, 1025, 4095, 4096, 4097, 10_007]


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_is_a_permutation(size):
    ids, visits = shuffled(np.arange(3 * size), size, seed=5)
    assert visits.tolist() == [0] * size + [1] * size + [2] * size
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_epochs_and_seeds_differ():
    orders = [shuffled(np.arange(e * 1023, (e + 1) * 1023), 1023, seed)[0] for seed in (0, 1) for e in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 12  # about one place in common is chance


def test_any_positions_computed_alone_are_the_same():
    size = 1237
    whole, visits = shuffled(np.arange(4 * size), size, seed=9)
    for some in (slice(0, 1), slice(size - 3, size + 5), slice(2 * size, 2 * size), slice(1, 4 * size, 517)):
        positions = np.arange(4 * size)[some]
        ids, epochs = shuffled(positions, size, seed=9)
        assert np.array_equal(ids, whole[some]) and np.array_equal(epochs, visits[some])
    backwards, _ = shuffled(np.arange(4 * size)[::-1], size, seed=9)
    assert np.array_equal(backwards[::-1], whole)


@pytest.mark.parametrize("size", [10**9, 10**9 + 7, 2**40 + 1])
def test_a_huge_store_costs_only_the_positions_asked_for(size):
    positions = np.concatenate([np.arange(50), np.arange(50) + size - 25, np.arange(3) + 7 * size])
    ids, visits = shuffled(positions, size, seed=1)
    assert ids.min() >= 0 and ids.max() < size
    assert np.array_equal(visits, positions // size)
    assert len(set(zip(ids.tolist(), visits.tolist(), strict=True))) == len(positions)


@pytest.mark.parametrize("size", [4097, 65_536])
def test_position_and_id_are_uncorrelated(size):
    ids, _ = shuffled(np.arange(size), size, seed=2)
    limit = 5 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), ids)[0, 1]) < limit
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < limit
    assert abs(np.corrcoef(ids, shuffled(np.arange(size, 2 * size), size, seed=2)[0])[0, 1]) < limit
    cells = np.zeros((16, 16))
    np.add.at(cells, (np.arange(size) * 16 // size, ids * 16 // size), 1)
    assert stats.chi2_contingency(cells).pvalue > 1e-4
    assert abs((np.diff(ids) % size == 1).sum()) < 10


def test_every_order_of_three_samples_is_equally_likely():
    orders = Counter(tuple(shuffled(np.arange(3), 3, seed)[0].tolist()) for seed in range(600))
    assert len(orders) == 6
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4
