"""What every sampler promises."""

import json
import math
from dataclasses import replace

import pytest

from pretrain.errors import UserError
from pretrain.sampling import SAMPLERS, Sampler, Wish, mometas
from tests.sampling.driver import NAMES, advance, losses, measured, sampler

REQUIRED = {
    "annealed": {"to": {"mlm": 1, "rtd": 0, "end_task": 3}},
    "alternating": {"phases": [{"shares": {"mlm": 1}, "steps": 7}, {"shares": {"rtd": 1, "end_task": 2}, "steps": 5}]},
}
SHORT = {"mometas": 30, "random_reward": 30, "aioli": 50, "pike": 20}
"""Sampler → steps between its updates, so that few steps show many."""
VARIANTS = [
    *({"name": name} for name in SAMPLERS),
    *(
        {"name": name, "mode": "mix"}
        for name in ("uniform", "loss_proportional", "odm", "aioli", "mometas", "annealed")
    ),
    *({"name": name, "mode": "draw"} for name in ("fixed", "pike")),
    *({"name": name, "reward": "paper"} for name in ("mometas", "random_reward")),
    *({"name": name, "credit": "gradients"} for name in ("mometas", "random_reward")),
]
every_variant = pytest.mark.parametrize("keys", VARIANTS, ids=lambda keys: "-".join(keys.values()))


@pytest.fixture(autouse=True)
def believing(monkeypatch):
    """Let samplers that doubt their credits believe all of them, so that they learn something here."""
    monkeypatch.setattr(mometas, "DOUBT", -3.0)


def build(keys: dict, **more) -> Sampler:
    short = {"interval_steps": SHORT[keys["name"]]} if keys["name"] in SHORT else {}
    return sampler(**REQUIRED.get(keys["name"], {}) | short | keys, **more)


@every_variant
def test_a_sampler_resumed_at_any_step_goes_on_as_if_it_had_not_stopped(keys):
    straight = build(keys)
    for step in range(250):
        resumed = build(keys)
        resumed.load_state_dict(json.loads(json.dumps(straight.state_dict(), allow_nan=False)))
        assert advance(resumed, step) == advance(straight, step)
        assert resumed.state_dict() == straight.state_dict()


@every_variant
def test_a_state_taken_does_not_change_when_the_sampler_goes_on(keys):
    some = build(keys)
    for step in range(55):
        advance(some, step)
    state = some.state_dict()
    before = json.dumps(state)
    for step in range(55, 130):
        advance(some, step)
    assert json.dumps(state) == before


@every_variant
def test_probabilities_and_shares_sum_to_one_and_a_draw_is_one_objective(keys):
    some = build(keys)
    for step in range(120):
        shown = advance(some, step)
        assert list(shown["probabilities"]) == NAMES
        assert min(shown["probabilities"].values()) >= 0
        assert math.isclose(sum(shown["probabilities"].values()), 1, rel_tol=1e-12)
        assert set(shown["plan"]) <= set(NAMES) and min(shown["plan"].values()) > 0
        assert math.isclose(sum(shown["plan"].values()), 1, rel_tol=1e-12)
        assert some.mixes or len(shown["plan"]) == 1


@every_variant
def test_a_sampler_goes_by_the_name_that_the_recipe_calls_it(keys):
    assert build(keys).name == keys["name"]


@every_variant
def test_planning_and_wishing_change_nothing(keys):
    asked, silent = build(keys), build(keys)
    for step in range(70):
        for other in (step + 31, step, 0):
            asked.wish(other), asked.plan(other), asked.probabilities(other)
        assert advance(asked, step) == advance(silent, step)


@every_variant
def test_only_who_says_so_wishes_for_something_and_what_it_learns_can_be_logged(keys):
    some = build(keys)
    wishes = set()
    for step in range(110):
        shown = advance(some, step)
        wishes.add(shown["wish"])
        assert bool(shown["lesson"]) == bool(shown["wish"])
        json.dumps(shown["lesson"], allow_nan=False)
        for numbers in shown["lesson"].values():
            assert all(isinstance(each, float) for each in numbers.values())
    assert some.probes == bool(wishes - {None, Wish.STEP})


@every_variant
def test_numbers_that_are_not_finite_are_ignored_and_counted(keys):
    """Every fifth number measured, and every seventh training loss, is not finite."""

    def sick(numbers: dict[str, float], step: int) -> dict[str, float]:
        return {name: [math.nan, math.inf][step % 2] if name == "rtd" else each for name, each in numbers.items()}

    def sometimes_sick(step, objectives):
        good = measured(step, objectives)
        fields = {field: sick(getattr(good, field), step) for field in ("losses", "products", "squares", "noise")}
        return replace(good, **fields) if step % 50 == 0 else good

    def sick_losses(step, plan):
        return sick(losses(step, plan), step) if step % 7 == 0 else losses(step, plan)

    some = build(keys)
    for step in range(401):
        shown = advance(some, step, measure=sometimes_sick, train=sick_losses)
        assert all(math.isfinite(each) for each in shown["probabilities"].values())
        json.dumps([shown["lesson"], some.state_dict()], allow_nan=False)
    if learns := some.state_dict():
        counts = learns["ignored"]
        assert counts["rtd"] > 0 == counts["mlm"] if isinstance(counts, dict) else counts > 0
        assert not shown["wish"] or max(shown["lesson"]["ignored"].values()) > 0


@every_variant
def test_an_objective_alone_is_trained_in_every_step(keys):
    if keys["name"] in REQUIRED:
        keys = keys | {"to": {"end_task": 1}} if keys["name"] == "annealed" else keys
        keys = keys | {"phases": [{"shares": {"end_task": 1}, "steps": 3}]} if keys["name"] == "alternating" else keys
    alone = build(keys, objectives=["end_task"])
    for step in range(120):
        assert advance(alone, step)["plan"] == pytest.approx({"end_task": 1.0}, abs=1e-12)


@every_variant
def test_decisions_are_a_function_of_the_seed(keys):
    one, same, other = build(keys), build(keys), build(keys, seed=4)
    plans = [[advance(some, step)["plan"] for step in range(130)] for some in (one, same, other)]
    assert plans[0] == plans[1]
    assert keys["name"] == "round_robin" or one.mixes or plans[0] != plans[2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": "paper", "mode": "mix"}, r"^sampler\.mode: 'mometas' can only 'draw' here"),
        ({"reward": "paper", "credit": "bursts"}, r"^sampler\.credit: means nothing with 'reward: paper'"),
        ({"reward": "paper", "floor": 0.1}, r"^sampler\.floor: means nothing with 'reward: paper'"),
        ({"credit": "bursts", "mode": "mix"}, r"^sampler\.mode: 'mometas' can only 'draw' here"),
        ({"interval_steps": 5}, r"^sampler\.interval_steps: 5 leaves 5 steps for bursts of 3 objectives; 6 are"),
        ({"floor": 0.4}, r"^sampler\.floor: 0\.4 times 3 objectives leaves nothing to learn"),
        ({"reward": "papre"}, r"^r\.yaml: sampler\.reward: .*did you mean 'paper'\?$"),
        ({"intervall_steps": 5}, r"^r\.yaml: sampler\.intervall_steps: .*did you mean 'interval_steps'\?$"),
        ({"name": "aioli", "explore": 0.02}, r"^sampler\.interval_steps: 200 leaves 4 steps for bursts"),
        ({"name": "random_reward", "reward": "paper", "mode": "mix"}, r"^sampler\.mode: 'random_reward' can only"),
        ({"name": "round_robin", "mode": "mix"}, r"^sampler\.mode: 'round_robin' can only 'draw'"),
    ],
    ids=str,
)
def test_keys_that_cannot_work_are_refused_in_one_line_that_names_the_key(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        sampler(**{"name": "mometas"} | keys)
    assert "\n" not in str(caught.value)


def test_two_steps_an_objective_are_enough_for_bursts():
    some = sampler("mometas", interval_steps=6)
    assert [advance(some, step)["wish"] for step in range(6)] == [Wish.LOSSES, None] * 3
