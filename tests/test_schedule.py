"""The learning rate over the run."""

import itertools

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from pretrain.schedule import ScheduleConfig

STEPS = 101


def factors(**keys) -> list[float]:
    return [ScheduleConfig(**keys).factor(step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "trapezoid"])
def test_the_rate_rises_to_its_peak_over_the_warm_up_and_never_is_zero(shape):
    values = factors(shape=shape, warmup=0.1)
    assert values[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert max(values) == 1.0 and min(values) > 0


@pytest.mark.parametrize("shape", ["linear", "cosine", "trapezoid"])
def test_after_the_warm_up_the_rate_never_rises_and_nears_its_floor(shape):
    values = factors(shape=shape, warmup=0.1, floor=0.2)[11:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[0] == 1.0 and 0.2 <= values[-1] < 0.25


def test_linear_equals_transformers_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 10, STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [ScheduleConfig(shape="linear", warmup=10 / STEPS).factor(step, STEPS) for step in range(STEPS)]
    assert ours[10:] == pytest.approx(expected[10:])  # theirs spends the first step of the warm-up at rate 0


def test_the_trapezoid_stays_at_the_peak_until_the_cooldown():
    values = factors(shape="trapezoid", warmup=0.0, cooldown=0.2)
    assert values[:80] == [1.0] * 80 and values[81] < 1.0


def test_a_run_of_one_step_trains():
    assert ScheduleConfig().factor(0, 1) == 1.0
