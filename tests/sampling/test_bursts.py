import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pretrain.sampling import Measured
from pretrain.sampling.bursts import apportion
from tests.sampling.driver import NAMES, advance, measured, sampler


@pytest.mark.parametrize("steps", [7, 13, 100, 101])
def test_apportioned_steps_are_at_least_one_each_add_up_and_follow_the_shares(steps):
    for shares in [*np.random.default_rng(5).dirichlet([0.3] * 3, size=50).tolist(), [1.0, 0.0, 0.0]]:
        whole = apportion(dict(zip(NAMES, shares, strict=True)), steps)
        assert list(whole) == NAMES and sum(whole.values()) == steps and min(whole.values()) >= 1
        for name, share in zip(NAMES, shares, strict=True):
            assert abs(whole[name] - max(share * steps, 1)) <= len(NAMES)
    assert apportion({"mlm": 0.5, "rtd": 0.3, "cse": 0.2}, 100) == {"mlm": 50, "rtd": 30, "cse": 20}


def test_a_window_is_one_contiguous_burst_an_objective():
    some = sampler("mometas", interval_steps=20)
    for window in range(5):
        trained = [next(iter(some.plan(step))) for step in range(window * 20, window * 20 + 20)]
        runs = [name for name, _ in itertools.groupby(trained)]
        assert sorted(runs) == sorted(NAMES)
        assert sorted(Counter(trained).values()) == [6, 7, 7]


def test_the_order_of_bursts_is_random_from_window_to_window():
    some = sampler("mometas", interval_steps=6)
    orders = Counter(tuple(burst.objective for burst in some.bursts(window)) for window in range(3000))
    assert len(orders) == 6
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4


@pytest.mark.parametrize("keys", [{"name": "mometas"}, {"name": "aioli"}], ids=lambda keys: keys["name"])
def test_credit_is_the_relative_drop_of_all_losses_a_step_of_the_burst(keys):
    """A step on objective j lowers loss i by effects[i][j]: what the credits must be is known."""
    some = sampler(**keys, interval_steps=40)
    effects, heights = np.random.default_rng(2).uniform(0.01, 0.03, (3, 3)), np.array([5.0, 7.0, 20.0])
    losses, planned, credits = [heights], [], {}

    def measure(step, objectives):
        return Measured(losses=dict(zip(objectives, losses[step].tolist(), strict=True)))

    for step in range(41):
        shown = advance(some, step, measure=measure)
        credits = shown["lesson"].get("credits", credits)
        planned.append(NAMES.index(next(iter(shown["plan"]))))
        losses.append(losses[step] - effects[:, planned[step]])

    expected, step = {}, 0
    for objective, burst in itertools.groupby(planned[: some.burst_steps()]):
        end = step + len(list(burst))
        expected[NAMES[objective]] = ((losses[step] - losses[end]) / losses[step]).sum() / (end - step)
        step = end
    assert credits == pytest.approx(expected) and len(credits) == 3


@pytest.mark.parametrize("border", [0, 1, 2])
def test_a_border_that_is_not_finite_costs_the_credits_of_the_bursts_beside_it_and_the_windows_lesson(border):
    some = sampler("mometas", interval_steps=30)
    bad = some.bursts(0)[border].begin

    def measure(step, objectives):
        good = measured(step, objectives)
        return replace(good, losses=good.losses | {"rtd": math.nan}) if step == bad else good

    credits = {}
    for step in range(61):
        lesson = advance(some, step, measure=measure)["lesson"]
        credits |= {step: lesson["credits"]} if "credits" in lesson else {}
    unhurt = [burst.objective for burst in some.bursts(0) if bad not in (burst.begin, burst.end)]
    assert sorted(credits[30]) == sorted(unhurt) and len(unhurt) == (2 if border == 0 else 1)
    assert sorted(credits[60]) == sorted(NAMES)
    assert some.advantage.windows == 1
