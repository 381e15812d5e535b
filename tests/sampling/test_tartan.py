"""The weights of TARTAN against what the paper's code and plain differences give."""

import json

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.sampling import Measured, Wish, build_sampler, parse_sampler

NAMES = ["mlm", "task_mlm", "end_task"]


def sampler(objectives=tuple(NAMES), **keys):
    return build_sampler(parse_sampler(keys, "r.yaml"), list(objectives), seed=3, steps=100)


def measured(direction: np.ndarray, gradients: np.ndarray) -> Measured:
    return Measured(
        products=dict(zip(NAMES, (gradients @ direction).tolist(), strict=True)),
        squares=dict(zip(NAMES, (gradients**2).sum(1).tolist(), strict=True)),
        direction_square=float(direction @ direction),
    )


def test_mt_tartan_trains_all_objectives_alike_in_every_step():
    some = sampler(name="mt_tartan")
    assert all(some.plan(step) == pytest.approx(dict.fromkeys(NAMES, 1 / 3)) for step in (0, 1, 99))
    assert some.wish(0) is None


def test_cosines_go_straight_on_to_the_logits():
    rng = np.random.default_rng(0)
    some, logits = sampler(name="meta_tartan", learning_rate=0.5), np.zeros(3)
    for step in range(3):
        direction, gradients = rng.normal(size=7), rng.normal(size=(3, 7))
        told = some.learn(step, measured(direction, gradients))
        cosines = gradients @ direction / np.linalg.norm(gradients, axis=1) / np.linalg.norm(direction)
        assert list(told["alignments"].values()) == pytest.approx(cosines.tolist())
        logits += 0.5 * cosines
        expected = np.exp(logits) / np.exp(logits).sum()
        assert list(some.plan(step + 1).values()) == pytest.approx(expected.tolist())


def test_the_exact_gradient_is_that_of_the_dev_loss_after_a_step_by_the_logits():
    rng, length = np.random.default_rng(1), 1e-3
    matrix, target = rng.normal(size=(5, 7)), rng.normal(size=5)
    theta, gradients = rng.normal(size=7), rng.normal(size=(3, 7))

    def dev_loss(logits: np.ndarray) -> float:
        weights = np.exp(logits) / np.exp(logits).sum()
        moved = theta - length * weights @ gradients
        return float(((matrix @ moved - target) ** 2).sum())

    some = sampler(name="meta_tartan", meta_gradient="exact", learning_rate=1.0)
    start = np.array([0.3, -0.2, 0.5])
    some.logits = start.copy()
    some.learn(0, measured(2 * matrix.T @ (matrix @ theta - target), gradients))
    for index in range(3):
        ahead, behind = (dev_loss(start + sign * 1e-3 * np.eye(3)[index]) for sign in (1, -1))
        assert length * (some.logits - start)[index] == pytest.approx(-(ahead - behind) / 2e-3, rel=2e-2)


def test_comparisons_come_at_intervals_and_weights_are_taken_up_again():
    some = sampler(name="meta_tartan", interval_steps=10)
    assert [step for step in range(31) if some.wish(step) is Wish.STEP] == [0, 10, 20, 30]
    rng = np.random.default_rng(2)
    some.learn(0, measured(rng.normal(size=7), rng.normal(size=(3, 7))))
    again = sampler(name="meta_tartan", interval_steps=10)
    again.load_state_dict(json.loads(json.dumps(some.state_dict())))
    assert again.plan(1) == some.plan(1) != sampler(name="meta_tartan").plan(1)


def test_a_measurement_that_is_not_finite_is_counted_and_changes_nothing():
    some = sampler(name="meta_tartan")
    before = some.plan(0)
    told = some.learn(0, measured(np.full(7, np.nan), np.ones((3, 7))))
    assert told == {"ignored": {"measurements": 1.0}} and some.plan(1) == before


def test_gradients_of_zero_give_no_direction():
    some = sampler(name="meta_tartan")
    some.learn(0, measured(np.zeros(7), np.ones((3, 7))))
    some.learn(1, measured(np.ones(7), np.zeros((3, 7))))
    assert some.plan(2) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))


@pytest.mark.parametrize("name", ["mt_tartan", "meta_tartan"])
def test_without_the_end_task_or_drawn_one_at_a_time_it_is_refused(name):
    with pytest.raises(UserError, match=rf"^sampler\.name: '{name}' needs the objective 'end_task'"):
        sampler(["mlm", "cse"], name=name)
    with pytest.raises(UserError, match=rf"^sampler\.mode: '{name}' can only 'mix'"):
        sampler(name=name, mode="draw")
