import numpy as np
import pytest

from tests.sampling.driver import NAMES, losses, sampler


def test_loss_proportional_counts_who_was_not_trained_yet_as_the_largest_loss():
    some = sampler("loss_proportional")
    assert some.probabilities(0) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    some.observe(0, {"mlm": 1.0}, {"mlm": 1.0})
    some.observe(1, {"rtd": 1.0}, {"rtd": 3.0})
    assert some.probabilities(2) == pytest.approx({"mlm": 1 / 7, "rtd": 3 / 7, "end_task": 3 / 7})


def test_loss_proportional_averages_an_objectives_losses_over_the_steps_that_train_it():
    some = sampler("loss_proportional", decay=0.75)
    for step, loss in enumerate((4.0, 8.0, 0.0)):
        some.observe(step, {"mlm": 1.0}, {"mlm": loss})
    assert some.averages == pytest.approx({"mlm": ((4 * 0.75 + 8 * 0.25) * 0.75)})


def test_loss_proportional_is_uniform_while_no_loss_is_positive():
    some = sampler("loss_proportional")
    some.observe(0, dict.fromkeys(NAMES, 1 / 3), {"mlm": -2.0, "rtd": 0.0, "end_task": -1.0})
    assert some.probabilities(1) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    some.observe(1, {"rtd": 1.0}, {"rtd": 100.0})
    assert some.probabilities(2) == pytest.approx({"mlm": 0, "rtd": 1, "end_task": 0})


@pytest.mark.parametrize("mode", ["draw", "mix"])
def test_odm_is_exp3_as_written_in_the_paper(mode):
    some, rewards, count = sampler("odm", mode=mode, decay=0.8), np.zeros(3), 3

    def exploration(step: int) -> float:
        return min(1 / count, np.sqrt(np.log(count) / (count * step)))

    for step in range(1, 80):
        now, before = exploration(step), exploration(max(step - 1, 1))
        weights = np.exp(before * rewards)
        expected = (1 - count * now) * weights / weights.sum() + now
        assert list(some.probabilities(step - 1).values()) == pytest.approx(expected)
        plan = some.plan(step - 1)
        seen = losses(step, plan)
        for name, loss in seen.items():
            number = NAMES.index(name)
            chance = expected[number] if mode == "draw" else 1.0
            rewards[number] = 0.8 * rewards[number] + 0.2 * loss / chance
        some.observe(step - 1, plan, seen)


def test_odm_turns_to_the_objective_with_the_larger_loss():
    some = sampler("odm")
    for step in range(400):
        plan = some.plan(step)
        some.observe(step, plan, {name: 9.0 if name == "rtd" else 0.5 for name in plan})
    assert max(some.probabilities(400), key=some.probabilities(400).get) == "rtd"
