import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from pretrain.sampling import Measured, Wish
from pretrain.sampling.advantage import Advantage
from pretrain.sampling.mometas import noise_like, paper_drop, paper_gradient
from tests.sampling.driver import NAMES, advance, measured, number, sampler


def objective_of_the_paper(logits: torch.Tensor, actions: list[int], reward: float, entropy: float) -> torch.Tensor:
    """Return J = Σ −R log p_a − γ H(p) over the actions of a window."""
    logs = torch.log_softmax(logits, 0)
    return sum(-reward * logs[action] for action in actions) + entropy * (logs.exp() * logs).sum()


@pytest.mark.parametrize("reward", [-1.7, 0.0, 0.03])
def test_the_papers_gradient_is_that_of_its_objective(reward):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(3, (17,), generator=generator).tolist()
    objective_of_the_paper(logits, actions, reward, 2.0).backward()
    probabilities = dict(zip(NAMES, torch.softmax(logits, 0).tolist(), strict=True))
    trained = {name: actions.count(number) for number, name in enumerate(NAMES)}
    ours = paper_gradient(probabilities, trained, reward, 2.0)
    assert list(ours.values()) == pytest.approx(logits.grad.tolist(), abs=1e-12)


def test_the_papers_reward_leaves_out_small_moves_and_ends_at_minus_one():
    assert paper_drop(2.0, 1.5) == 0.25
    assert paper_drop(2.0, 1.998) == pytest.approx(0.001)
    assert paper_drop(2.0, 1.9995) == paper_drop(2.0, 2.0005) == 0
    assert paper_drop(2.0, 2.5) == -0.25
    assert paper_drop(2.0, 7.0) == -1


def test_the_papers_rule_is_followed_from_window_to_window():
    some = sampler("mometas", reward="paper", interval_steps=20)
    logits, old, actions = torch.ones(3, dtype=torch.float64), None, []
    for step in range(81):
        shown = advance(some, step)
        if step % 20 == 0:
            assert shown["wish"] is Wish.FRESH_LOSSES
            new = measured(step).losses
            if old:
                reward = sum(max((old[o] - new[o]) / old[o] * (abs(old[o] - new[o]) > 1e-3), -1.0) for o in NAMES)
                logits.requires_grad_()
                (slope,) = torch.autograd.grad(objective_of_the_paper(logits, actions, reward, 2.0), logits)
                logits = (logits - 0.1 * slope).detach()
            old, actions = new, []
        assert list(shown["probabilities"].values()) == pytest.approx(torch.softmax(logits, 0).tolist(), abs=1e-12)
        actions.append(NAMES.index(next(iter(shown["plan"]))))


def gradients_that_favour(best: str, size: float = 1.0, scale: float = 1.0):
    """Return measurements of gradients of which ``best``'s agrees most; sizes of gradients and losses do not matter."""

    def measure(step, objectives):
        norms = {
            name: size * (1 if name == best else 9) * (1 + number("norm", step, index))
            for index, name in enumerate(objectives)
        }
        cosines = {
            name: (0.5 if name == best else 0.2) + 0.1 * number("cosine", step, index)
            for index, name in enumerate(objectives)
        }
        return Measured(
            losses=dict.fromkeys(objectives, 2.0),
            products={name: scale * cosines[name] * norms[name] for name in objectives},
            squares={name: norms[name] ** 2 for name in objectives},
            direction_square=scale * scale,
        )

    return measure


@pytest.mark.parametrize("mode", ["draw", "mix"])
def test_the_objective_whose_gradient_agrees_most_gets_the_largest_share_whatever_the_sizes(mode):
    learnt = []
    for size, scale in ((1.0, 1.0), (1e4, 1.0), (1.0, 1e-6)):
        some = sampler("mometas", credit="gradients", mode=mode, interval_steps=5)
        for step in range(150):
            shown = advance(some, step, measure=gradients_that_favour("rtd", size, scale))
        learnt.append(list(shown["probabilities"].values()))
    assert learnt[0][1] > 0.8
    assert learnt[1] == pytest.approx(learnt[0]) and learnt[2] == pytest.approx(learnt[0])


def test_logits_go_to_the_advantages_over_the_weight_of_the_entropy_and_back_to_zero_when_there_are_none():
    some = sampler("mometas", entropy=0.4)
    credits = {"mlm": 1.0, "rtd": 2.0, "end_task": 6.0}
    for window in range(400):
        lesson = some.climb(window, credits)
    assert some.logits == pytest.approx({name: each / 0.4 for name, each in lesson["advantages"].items()})
    for window in range(400):
        some.climb(window, {name: number("nothing", window, index) for index, name in enumerate(NAMES)})
    assert some.logits == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-6)


def test_credits_come_from_gradients_when_all_objectives_are_in_every_step_and_from_bursts_otherwise():
    assert sampler("mometas", mode="mix").wish(0) is Wish.CREDITS
    assert sampler("mometas").wish(0) is Wish.LOSSES


def test_no_probability_falls_below_the_floor():
    some = sampler("mometas", credit="gradients", interval_steps=3, floor=0.15, entropy=0.0)
    for step in range(150):
        probabilities = advance(some, step, measure=gradients_that_favour("rtd"))["probabilities"]
        assert min(probabilities.values()) >= 0.15
    assert probabilities["rtd"] == pytest.approx(0.7, abs=0.01)


def test_the_objective_whose_bursts_lower_the_losses_most_gets_the_longest_bursts():
    some, heights = sampler("mometas", interval_steps=12), [5.0]
    for step in range(400):
        shown = advance(some, step, measure=lambda step, names: Measured(losses=dict.fromkeys(names, heights[step])))
        useful = "rtd" in shown["plan"]
        heights.append(heights[step] * (1 - (0.003 if useful else 0.001) * number("progress", step, 0)))
    assert shown["probabilities"]["rtd"] > 0.7
    (burst,) = (each for each in some.bursts(33) if each.objective == "rtd")
    assert burst.end - burst.begin >= 8


@pytest.mark.parametrize("credit", ["bursts", "gradients"])
def test_useless_signals_leave_the_probabilities_near_uniform(credit):
    """Losses are noise about 2, gradients noise about the same agreement."""

    def noise(step, objectives):
        heights = {name: 2 + number("useless", step, index) / 100 for index, name in enumerate(objectives)}
        return replace(measured(step, objectives), losses=heights)

    some = sampler("mometas", credit=credit, interval_steps=12)
    for step in range(2400):
        probabilities = advance(some, step, measure=noise)["probabilities"]
        assert max(abs(each - 1 / 3) for each in probabilities.values()) < 0.05


@pytest.mark.parametrize("keys", [{"reward": "paper"}, {"credit": "bursts"}, {"credit": "gradients"}], ids=str)
def test_the_control_measures_as_often_as_mometas_does_and_the_same(keys):
    wishes = []
    for name in ("mometas", "random_reward"):
        some = sampler(name, interval_steps=20, **keys)
        wishes.append([wish for step in range(400) if (wish := advance(some, step)["wish"])])
    assert wishes[0] == wishes[1]


def test_the_control_of_the_papers_rule_learns_the_same_when_what_helped_harms():
    def measure(sign):
        def one(step, objectives):
            losses = {name: 1e6 - sign * loss for name, loss in measured(step, objectives).losses.items()}
            return replace(measured(step, objectives), losses=losses)

        return one

    for name in ("random_reward", "mometas"):
        learnt = []
        for sign in (1, -1):
            some = sampler(name, reward="paper", interval_steps=20, learning_rate=1e3, entropy=0.0)
            for step in range(401):
                advance(some, step, measure=measure(sign))
            learnt.append(list(some.logits.values()))
        assert (learnt[0] == pytest.approx(learnt[1], rel=1e-3)) == (name == "random_reward")


def test_the_control_does_not_turn_to_what_mometas_turns_to():
    some = sampler("random_reward", credit="gradients", interval_steps=5)
    for step in range(150):
        probabilities = advance(some, step, measure=gradients_that_favour("rtd"))["probabilities"]
        assert max(abs(each - 1 / 3) for each in probabilities.values()) < 0.05


def test_the_controls_noise_has_the_variance_of_the_credits():
    credits = {"mlm": 1.0, "rtd": -3.0, "end_task": 5.0}
    drawn = [noise_like(credits, 7, window) for window in range(2000)]
    assert drawn == [noise_like({name: -each for name, each in credits.items()}, 7, window) for window in range(2000)]
    values = np.array([list(each.values()) for each in drawn])
    assert values.std(0) == pytest.approx(np.std(list(credits.values())), rel=0.06)
    assert stats.kstest(values.ravel() / np.std(list(credits.values())), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(values.T)[np.triu_indices(3, 1)]).max() < 0.1


def test_an_advantage_is_the_mean_of_standardised_credits_shrunk_by_how_little_windows_agree():
    credits = np.random.default_rng(3).normal([0.0, 1.0, 5.0], 1.0, (11, 3))
    some = Advantage(decay=0.9, doubt=2.0)
    for window in credits:
        some.take(dict(zip(NAMES, window.tolist(), strict=True)))
    standardised = (credits - credits.mean(1, keepdims=True)) / credits.std(1, keepdims=True)
    weights = 0.9 ** np.arange(11)[::-1]
    means = weights @ standardised / (weights.sum() + 1)
    agreement, windows = (means**2).mean(), weights.sum() ** 2 / (weights**2).sum()
    bound = stats.chi2.isf(stats.norm.sf(2.0), df=2) / 2  # which is approximated
    expected = means * (1 - bound * (1 - agreement) / ((windows - 1) * agreement))
    assert list(some.advantages().values()) == pytest.approx(expected.tolist(), rel=1e-2)
    assert 0 < expected[2] < means[2]


def test_credits_that_are_all_the_same_or_noise_are_no_advantage():
    same, noise = Advantage(0.95, 2.6), Advantage(0.95, 2.6)
    assert same.advantages() == {}
    for window in range(30):
        same.take(dict.fromkeys(NAMES, 0.1))
        noise.take({name: number("noise", window, index) for index, name in enumerate(NAMES)})
    assert same.advantages() == {}
    assert max(map(abs, noise.advantages().values())) == 0


def test_one_window_alone_is_not_believed():
    some = Advantage(0.95, 2.6)
    some.take({"mlm": 1.0, "rtd": 2.0, "end_task": -math.pi})
    assert set(some.advantages().values()) == {0.0}
