import math
from collections import Counter

import pytest

from pretrain.sampling import Measured, Wish
from tests.sampling.driver import NAMES, advance, sampler

COUNTS = {"mlm": 0.01, "rtd": 0.05, "end_task": -0.02}
"""Objective → how much a step on it lowers each loss, relatively."""


def falling(some):
    """Return measurements of a run in which a step lowers each loss by the same factor, whatever was before."""

    def measure(step, objectives):
        (height,) = {*some.losses.values()} or {7.0}
        burst = next((each for each in some.bursts(step // 40) if each.end == step % 40), None)
        drop = COUNTS[burst.objective] * (burst.end - burst.begin) if burst else 0.0
        return Measured(losses=dict.fromkeys(objectives, height * (1 - drop)))

    return measure


@pytest.mark.parametrize("mode", ["draw", "mix"])
def test_aioli_multiplies_each_probability_by_what_its_burst_did(mode):
    some = sampler("aioli", interval_steps=40, explore=0.3, learning_rate=0.7, mode=mode)
    plans, wishes = [], []
    for step in range(81):
        shown = advance(some, step, measure=falling(some))
        plans.append(shown["plan"])
        wishes.append(shown["wish"])
    columns = {name: each - min(COUNTS.values()) for name, each in COUNTS.items()}
    powers = {name: math.exp(2 * 0.7 * each / sum(columns.values())) for name, each in columns.items()}
    expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    assert some.probabilities(80) == pytest.approx(expected)

    assert [step for step, wish in enumerate(wishes) if wish] == [0, 4, 8, 12, 40, 44, 48, 52, 80]
    assert Counter(next(iter(plan)) for plan in plans[:12]) == dict.fromkeys(NAMES, 4)
    if mode == "mix":
        assert plans[60] == pytest.approx(expected) and all(len(plan) == 3 for plan in plans[12:40])


@pytest.mark.parametrize("unit", [1.0, 1e-7])
def test_pike_multiplies_by_gradients_and_divides_by_noise_whatever_their_unit(unit):
    some = sampler("pike", interval_steps=10, gradient_rate=0.3, noise_rate=0.8)
    squares, noise = {"mlm": 2.0, "rtd": -0.5, "end_task": 0.0}, {"mlm": 1.0, "rtd": 0.0, "end_task": 4.0}

    def measure(step, objectives):
        scaled = [{name: unit * each for name, each in one.items()} for one in (squares, noise)]
        return Measured(losses=dict.fromkeys(objectives, 1.0), squares=scaled[0], noise=scaled[1])

    for step in range(21):
        shown = advance(some, step, measure=measure)
        assert shown["wish"] is (Wish.NOISE if step % 10 == 0 else None)
    mean = (2.0 + 0.5 + 0.5 + 0.0 + 2.0) / 3
    powers = {name: math.exp(3 * (0.3 * squares[name] - 0.8 * noise[name] / 2) / mean) for name in NAMES}
    expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    assert shown["plan"] == pytest.approx(expected)


def test_pike_stays_where_it_is_if_there_are_no_gradients():
    some = sampler("pike", interval_steps=3)
    nothing = dict.fromkeys(NAMES, 0.0)
    for step in range(10):
        shown = advance(some, step, measure=lambda step, names: Measured(nothing, squares=nothing, noise=nothing))
    assert shown["plan"] == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
