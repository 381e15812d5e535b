"""The testbed is what it says it is, and mometas does on it what it is meant to do; all samplers are compared on it by
``python -m benchmarks.samplers``."""

import numpy as np
import pytest

from benchmarks.testbed import ALIKE, MIXED, OWN, TRUNK, Testbed, run
from pretrain.sampling import Wish, build_sampler, parse_sampler

SEEDS, STEPS = range(20, 23), 3000


def trained(objectives, steps=STEPS, **keys):
    config = parse_sampler(keys, "test")
    return run(lambda names, seed, total: build_sampler(config, names, seed, total), objectives, SEEDS, steps)


def test_gradients_are_those_of_the_losses():
    bed = Testbed(MIXED, [3], 50)
    bed.theta = np.random.default_rng(0).standard_normal(bed.theta.shape)
    slopes, before = bed.gradients()[0], bed.theta.copy()
    for place in (0, TRUNK - 1, TRUNK, TRUNK + 3 * OWN):
        bed.theta = before.copy()
        bed.theta[0, place] += 1e-6
        above = bed.losses()[0]
        bed.theta[0, place] -= 2e-6
        assert (above - bed.losses()[0]) / 2e-6 == pytest.approx(slopes[:, place], abs=1e-6)


def test_a_step_moves_the_trunk_and_the_own_part_of_what_it_trains():
    bed = Testbed(MIXED, [3, 4], 50)
    shares = np.zeros((2, 5))
    shares[0, 1] = shares[1, 2] = 1
    bed.train(shares)
    moved = (bed.theta != 0).reshape(2, -1, OWN).any(-1)
    assert moved[0].tolist() == [True] * 5 + [False, True, False, False, False]
    assert moved[1].tolist() == [True] * 5 + [False, False, True, False, False]


@pytest.mark.parametrize("wish", [Wish.LOSSES, Wish.FRESH_LOSSES, Wish.CREDITS, Wish.NOISE])
@pytest.mark.parametrize("new_rows", [False, True])
def test_measuring_changes_no_weight_and_gives_the_same_twice_only_on_the_same_rows(wish, new_rows):
    bed = Testbed(MIXED, [3], 50, new_rows)
    first = bed.measure(0, wish)
    bed.step += 1
    again = bed.measure(0, wish)
    assert not bed.theta.any()
    anew = wish is Wish.FRESH_LOSSES or (new_rows and wish is not Wish.LOSSES)
    assert (first.losses == again.losses) == (not anew)


def test_one_seed_is_one_training_whoever_trains_beside_it():
    alone, beside = Testbed(MIXED, [7], 20), Testbed(MIXED, [6, 7], 20)
    for step in range(20):
        plan = np.eye(5)[[step % 5]]
        assert (alone.train(plan)[0] == beside.train(np.repeat(plan, 2, 0))[1]).all()


def test_mometas_turns_to_the_useful_objective_and_ends_better_than_uniform():
    uniform, learnt = trained(MIXED, name="uniform"), trained(MIXED, name="mometas", interval_steps=50)
    at_a_third = learnt.probabilities[len(learnt.probabilities) // 3, :, 0]
    assert at_a_third.mean() > 0.35
    assert (learnt.totals < uniform.totals).all()


@pytest.mark.parametrize("keys", [{"name": "mometas"}, {"name": "random_reward"}], ids=lambda keys: keys["name"])
def test_where_there_is_nothing_to_learn_probabilities_stay_near_uniform(keys):
    learnt = trained(ALIKE, steps=2000, interval_steps=50, **keys)
    assert np.abs(learnt.probabilities - 0.2).max() < 0.05
