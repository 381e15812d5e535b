import pytest
import torch
from scipy import stats

from fused_objectives.targets import capacity_for, compact

WHICH = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
PLACES = [1, 2, 5, 7, 8]


@pytest.mark.parametrize("capacity", [None, 5, 6, 11])
def test_places_are_those_of_the_targets_in_order_then_padding(capacity):
    targets = compact(WHICH, capacity)
    size = 5 if capacity is None else capacity
    assert targets.places.tolist() == PLACES + [-1] * (size - 5)
    assert targets.count == 5 and targets.overflow == 0
    slots = [PLACES.index(i) if i in PLACES else -1 for i in range(len(WHICH))]
    assert targets.slots.tolist() == slots


@pytest.mark.parametrize("capacity", [0, 1, 4])
def test_targets_beyond_the_capacity_poison_the_loss(capacity):
    targets = compact(WHICH, capacity)
    assert targets.places.tolist() == PLACES[:capacity]
    assert targets.count == 5 and targets.overflow.isnan()
    assert (targets.slots >= 0).sum() == capacity


def test_values_are_taken_at_the_places():
    values = torch.arange(22.0).view(11, 2)
    targets = compact(WHICH, 7)
    assert torch.equal(targets.take(values)[:5], values[WHICH])
    assert targets.take(values[:, 0], padding=-3.0).tolist() == [2, 4, 10, 14, 16, -3, -3]


def test_nothing_has_no_targets():
    for which in (WHICH[:0], torch.zeros(4, dtype=torch.bool)):
        targets = compact(which)
        assert targets.places.shape == (0,) and targets.count == 0 and targets.overflow == 0
        assert targets.slots.tolist() == [-1] * len(which)


@pytest.mark.parametrize(("tokens", "rate"), [(0, 0.15), (1, 0.5), (64, 0.15), (4096, 0.4), (65536, 0.15), (777, 1.0)])
def test_a_capacity_suffices_but_for_one_time_in_10_to_the_12(tokens, rate):
    capacity = capacity_for(tokens, rate)
    assert capacity <= tokens
    assert stats.binom.sf(capacity, tokens, rate) < 1e-12
    assert capacity == tokens or capacity % 128 == 0


@pytest.mark.parametrize("rate", [15, -0.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=f"^rate: {rate} is not within 0 and 1$"):
        capacity_for(100, rate)


def test_a_large_batchs_capacity_is_hardly_more_than_its_expected_targets():
    assert capacity_for(65536, 0.15) / (65536 * 0.15) < 1.1
