import itertools
from collections import Counter

import pytest
from scipy import stats

from pretrain.errors import UserError
from pretrain.sampling import Sampler, build_sampler, parse_sampler

NAMES = ["mlm", "rtd", "cse"]
RULES = ["fixed", "proportional", "uniform", "round_robin"]


def sampler(name: str, shares: dict | None = None, objectives=tuple(NAMES), seed: int = 3) -> Sampler:
    keys = {"name": name} | ({"shares": shares} if shares else {})
    return build_sampler(parse_sampler(keys, "r.yaml"), list(objectives), seed, steps=1000)


def test_fixed_trains_all_objectives_every_step_with_shares_that_sum_to_one():
    fixed = sampler("fixed", {"mlm": 2.0, "rtd": 1.0, "cse": 1.0})
    for step in (0, 1, 999):
        assert fixed.plan(step) == fixed.probabilities(step) == {"mlm": 0.5, "rtd": 0.25, "cse": 0.25}


def test_without_shares_all_objectives_share_alike():
    for name in RULES:
        assert sampler(name).probabilities(0) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))


@pytest.mark.parametrize("name", ["fixed", "proportional"])
def test_an_objective_with_share_zero_is_never_trained(name):
    some = sampler(name, {"mlm": 1.0, "rtd": 0.0, "cse": 3.0})
    assert {objective for step in range(200) for objective in some.plan(step)} == {"mlm", "cse"}


@pytest.mark.parametrize(
    ("name", "shares", "expected"),
    [("uniform", None, [1 / 3] * 3), ("proportional", {"mlm": 5, "rtd": 3, "cse": 2}, [0.5, 0.3, 0.2])],
)
def test_draws_have_the_right_frequencies_and_one_objective_a_step(name, shares, expected):
    drawn = sampler(name, shares)
    counts = Counter()
    for step in range(9001):
        ((objective, share),) = drawn.plan(step).items()
        assert share == 1.0
        counts[objective] += 1
    observed = [counts[objective] for objective in NAMES]
    assert stats.chisquare(observed, [9001 * p for p in expected]).pvalue > 1e-4


def test_draws_are_independent_from_step_to_step():
    drawn = sampler("uniform")
    sequence = [next(iter(drawn.plan(step))) for step in range(6000)]
    pairs = Counter(itertools.pairwise(sequence))
    assert stats.chi2_contingency([[pairs[a, b] for b in NAMES] for a in NAMES]).pvalue > 1e-4


def test_draws_are_a_function_of_seed_and_step_in_whatever_order_they_are_asked_for():
    one, other = sampler("uniform"), sampler("uniform")
    forwards = [one.plan(step) for step in range(300)]
    assert [other.plan(step) for step in reversed(range(300))] == forwards[::-1]
    assert [sampler("uniform", seed=4).plan(step) for step in range(300)] != forwards


def test_round_robin_goes_through_the_objectives_in_the_recipes_order():
    turns = sampler("round_robin", objectives=["rtd", "cse", "mlm"])
    assert [next(iter(turns.plan(step))) for step in range(7)] == ["rtd", "cse", "mlm", "rtd", "cse", "mlm", "rtd"]
    assert all(list(turns.plan(step).values()) == [1.0] for step in range(7))


@pytest.mark.parametrize("name", RULES)
def test_one_objective_is_trained_alone_in_every_step(name):
    alone = sampler(name, objectives=["clm"])
    assert all(alone.plan(step) == {"clm": 1.0} for step in range(5))


@pytest.mark.parametrize("name", RULES)
def test_only_fixed_mixes_and_every_state_is_taken_up_again(name):
    some = sampler(name)
    assert some.mixes == (len(some.plan(0)) > 1) == (name == "fixed")
    again = sampler(name)
    again.load_state_dict(some.state_dict())
    assert [again.plan(step) for step in range(20)] == [some.plan(step) for step in range(20)]


@pytest.mark.parametrize(
    ("name", "shares", "message"),
    [
        ("fixed", {"mlm": 1, "rdt": 1, "cse": 1}, r"^sampler\.shares: .*'rdt'; did you mean 'rtd'\?$"),
        ("fixed", {"mlm": 1, "rtd": 1}, r"^sampler\.shares: no share for 'cse'"),
        ("fixed", {"mlm": -1, "rtd": 1, "cse": 1}, r"^r\.yaml: sampler\.shares: shares must not be negative"),
        ("proportional", {"mlm": 0, "rtd": 0, "cse": 0}, r"^r\.yaml: sampler\.shares: .*one must be positive"),
        ("fixed", {"mlm": float("nan"), "rtd": 1, "cse": 1}, r"^r\.yaml: sampler\.shares\.mlm: .*finite"),
        ("uniform", {"mlm": 1, "rtd": 1, "cse": 1}, r"^r\.yaml: sampler\.shares: unknown key"),
        ("round_robin", {"mlm": 1, "rtd": 1, "cse": 1}, r"^r\.yaml: sampler\.shares: unknown key"),
        ("fixd", None, r"^r\.yaml: sampler\.name: .*did you mean 'fixed'\?$"),
        ("fixed", {"mlm": "much"}, r"^r\.yaml: sampler\.shares\.mlm: .*number.*'much'"),
    ],
)
def test_wrong_shares_are_refused_in_one_line_that_names_the_key(name, shares, message):
    with pytest.raises(UserError, match=message) as caught:
        sampler(name, shares)
    assert "\n" not in str(caught.value)


def annealed(**keys) -> Sampler:
    return build_sampler(parse_sampler({"name": "annealed", **keys}, "r.yaml"), NAMES, 3, steps=101)


def test_annealed_goes_from_one_mixture_to_the_other_over_the_run():
    some = annealed(**{"from": {"mlm": 1, "rtd": 1, "cse": 0}, "to": {"mlm": 0, "rtd": 1, "cse": 3}})
    assert some.probabilities(0) == {"mlm": 0.5, "rtd": 0.5, "cse": 0.0}
    assert some.probabilities(50) == pytest.approx({"mlm": 0.25, "rtd": 0.375, "cse": 0.375})
    assert some.probabilities(100) == some.probabilities(200) == {"mlm": 0.0, "rtd": 0.25, "cse": 0.75}


def test_annealed_by_cosine_starts_and_ends_slowly():
    linear, cosine = (annealed(to={"mlm": 0, "rtd": 0, "cse": 1}, schedule=shape) for shape in ("linear", "cosine"))
    assert cosine.probabilities(0) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    assert cosine.probabilities(50) == pytest.approx(linear.probabilities(50))
    assert cosine.probabilities(10)["cse"] < linear.probabilities(10)["cse"]
    assert cosine.probabilities(90)["cse"] > linear.probabilities(90)["cse"]


def test_alternating_repeats_its_phases_and_leaves_out_whom_a_phase_does_not_name():
    phases = [{"shares": {"mlm": 1}, "steps": 3}, {"shares": {"rtd": 1, "cse": 3}, "steps": 2}]
    some = build_sampler(
        parse_sampler({"name": "alternating", "phases": phases, "mode": "mix"}, "r.yaml"), NAMES, 3, 50
    )
    first, second = {"mlm": 1.0}, {"rtd": 0.25, "cse": 0.75}
    assert [some.plan(step) for step in range(13)] == [*[first] * 3, *[second] * 2] * 2 + [first] * 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "annealed"}, r"^r\.yaml: sampler\.to: is required$"),
        ({"name": "annealed", "to": {"mlm": 1}}, r"^sampler\.to: no share for 'rtd'"),
        ({"name": "annealed", "from": {"mml": 1}, "to": {}}, r"^sampler\.from: .*'mml'; did you mean 'mlm'\?$"),
        ({"name": "alternating", "phases": []}, r"^r\.yaml: sampler\.phases: "),
        (
            {"name": "alternating", "phases": [{"shares": {"mlm": 1}, "steps": 0}]},
            r"^r\.yaml: sampler\.phases\.0\.steps: ",
        ),
        (
            {"name": "alternating", "phases": [{"shares": {"mlm": 1}, "steps": 1}, {"shares": {"cs": 1}, "steps": 1}]},
            r"^sampler\.phases\.1\.shares: .*'cs'; did you mean 'cse'\?$",
        ),
    ],
    ids=str,
)
def test_wrong_mixtures_over_time_are_refused_in_one_line_that_names_the_key(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        build_sampler(parse_sampler(keys, "r.yaml"), NAMES, 3, 50)
    assert "\n" not in str(caught.value)
