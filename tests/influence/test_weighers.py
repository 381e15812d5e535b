"""What every weigher promises, and what each is for."""

import json

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.influence import WEIGHERS, Measures, Weigher, build_weigher, parse_weigher
from tests.influence.test_weights import written_out

OBJECTIVES = {"cse": False, "mlm": True, "rtd": True}
KEYS = [
    *({"name": name} for name in WEIGHERS),
    *({"name": name, "normalise": "window", "window": 17} for name in ("presence", "shuffled")),
    {"name": "presence", "switch": "auto"},
    {"name": "presence", "length_normalised": True, "temperature": {"schedule": "linear", "from": 2, "to": -1}},
    {"name": "presence", "granularity": "microbatch", "signal": "split"},
]
every_weigher = pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(map(str, keys.values()))[:40])


def weigher(objectives=OBJECTIVES, mixes=True, steps=40, **keys) -> Weigher:
    return build_weigher(parse_weigher(keys, "r.yaml"), objectives, mixes, seed=3, steps=steps)


def measures(step: int, samples: int = 11) -> Measures:
    """Return what might be measured at a step; every fifth sample has no target."""
    rng = np.random.default_rng(step)
    targets = rng.integers(1, 9, samples) * (np.arange(samples) % 5 > 0)
    return Measures(targets, rng.gamma(4.0, 1.0, samples) * (targets > 0), rng.gamma(0.7, 2.0, samples) * (targets > 0))


def advance(some: Weigher, step: int) -> list:
    """Do a step as the trainer does; return all that it shows."""
    found, shown = measures(step), [some.temperature(step), some.is_uniform(step)]
    if getattr(some, "switch", None) and some.switch.is_due(step):
        some.switch.take(2.0 + step, found.squares)
    weights = some.weights(step, "mlm", found, 11)
    return [*shown, weights.tolist(), some.take(step, "mlm", found, weights) if some.measures != "nothing" else None]


@every_weigher
def test_a_weigher_resumed_at_any_step_goes_on_as_if_it_had_not_stopped(keys):
    straight = weigher(**keys)
    for step in range(60):
        resumed = weigher(**keys)
        resumed.load_state_dict(json.loads(json.dumps(straight.state_dict(), allow_nan=False)))
        assert advance(resumed, step) == advance(straight, step)
        assert resumed.state_dict() == straight.state_dict() and resumed.told(step) == straight.told(step)


@every_weigher
def test_a_state_taken_does_not_change_when_the_weigher_goes_on(keys):
    some = weigher(**keys)
    for step in range(25):
        advance(some, step)
    state = some.state_dict()
    before = json.dumps(state)
    for step in range(25, 40):
        advance(some, step)
    assert json.dumps(state) == before


@every_weigher
def test_weights_are_not_negative_and_samples_without_target_count_one(keys):
    some = weigher(**keys)
    for step in range(30):
        found = measures(step)
        weights = some.weights(step, "mlm", found, 11)
        assert weights.min() >= 0 and np.isfinite(weights).all() and (weights[found.targets == 0] == 1).all()
        if "normalise" not in keys:
            assert weights.sum() == pytest.approx(11)
        if some.measures != "nothing":
            some.take(step, "mlm", found, weights)


@every_weigher
def test_what_has_no_target_or_no_finite_score_does_not_touch_the_others(keys):
    found, some = measures(7), weigher(**keys)
    whole = some.weights(1, "mlm", found, 11)
    kept = found.targets > 0
    part = Measures(found.targets[kept], found.losses[kept], found.squares[kept])
    if keys["name"] != "shuffled":
        assert whole[kept] == pytest.approx(some.weights(1, "mlm", part, 11), rel=1e-12)
    sick = Measures(np.ones(3), np.array([1.0, np.nan, 2.0]), np.array([1.0, np.inf, 2.0]))
    assert some.weights(1, "mlm", sick, 3)[1] == 1 and np.isfinite(some.weights(1, "mlm", sick, 3)).all()


@every_weigher
def test_nobody_to_weigh_is_no_error(keys):
    some = weigher(**keys)
    for targets in (np.zeros(0), np.zeros(3)):
        assert some.weights(0, "mlm", Measures(targets, 0 * targets, 0 * targets), 3).tolist() == [1.0] * len(targets)


@pytest.mark.parametrize("name", [name for name in WEIGHERS if name != "uniform"])
def test_a_temperature_of_zero_is_uniform(name):
    some = weigher(name=name, temperature=0)
    assert some.is_uniform(0) and some.weights(0, "mlm", measures(0), 11).tolist() == [1.0] * 11


def test_presence_weighs_by_the_norms_in_two_stages():
    some, found = weigher(name="presence", steps=40), measures(3)
    scored = found.targets > 0
    for step, temperature in ((0, 1.0), (3, 1.0), (4, -1.0), (39, -1.0)):
        expected = written_out(found.squares[scored].tolist(), temperature)
        assert some.weights(step, "mlm", found, 11)[scored] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "temperatures"),
    [("linear", {0: 1.0, 10: 0.5, 20: 0.0, 30: -0.5}), ("cosine", {0: 1.0, 10: 0.5**0.5, 20: 0.0, 30: -(0.5**0.5)})],
)
def test_a_continuous_temperature_weighs_with_its_value_at_the_step(schedule, temperatures):
    some, found = (
        weigher(temperature={"schedule": schedule, "from": 1, "to": -1}, name="presence", steps=40),
        measures(3),
    )
    scored = found.targets > 0
    for step, temperature in temperatures.items():
        assert some.told(step)["temperature"] == pytest.approx(temperature, abs=1e-12)
        expected = written_out(found.squares[scored].tolist(), temperature)
        assert some.weights(step, "mlm", found, 11)[scored] == pytest.approx(expected, rel=1e-6)


def test_length_normalised_scores_are_those_of_the_mean_loss():
    found = measures(3)
    some, scored = weigher(name="presence", length_normalised=True), found.targets > 0
    expected = written_out((found.squares / np.maximum(found.targets, 1) ** 2)[scored].tolist(), 1.0)
    assert some.weights(0, "mlm", found, 11)[scored] == pytest.approx(expected, rel=1e-6)


def test_shuffled_hands_out_the_very_weights_of_presence_among_the_samples_with_targets():
    found = measures(5)
    weights, shuffled = (weigher(name=name).weights(6, "mlm", found, 11) for name in ("presence", "shuffled"))
    assert sorted(weights) == sorted(shuffled) and weights.tolist() != shuffled.tolist()
    assert (shuffled[found.targets == 0] == 1).all()


def test_loss_and_linupper_go_by_the_mean_loss():
    found = measures(5)
    scored, losses = found.targets > 0, found.losses[found.targets > 0]
    assert weigher(name="loss").weights(0, "mlm", found, 11)[scored] == pytest.approx(
        written_out(losses, 1.0), rel=1e-6
    )
    h = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    powers = np.exp(np.minimum(h + 1, 1) / 0.4)
    some = weigher(name="linupper", temperature=2.5)
    assert some.weights(0, "mlm", found, 11)[scored] == pytest.approx(len(losses) * powers / powers.sum())
    assert weigher(name="linupper", steps=100).is_uniform(4) and not weigher(name="linupper", steps=100).is_uniform(5)


def test_a_window_holds_the_latest_scores_of_each_objective_and_not_those_of_the_step():
    some = weigher(name="presence", normalise="window", window=12)
    taken = {"mlm": [], "rtd": []}
    for step in range(6):
        for objective in taken:
            found = measures(step + 100 * (objective == "rtd"))
            assert some.windows.get(objective, []) == taken[objective][-12:]
            some.take(step, objective, found, some.weights(step, objective, found, 11))
            taken[objective] += found.squares[found.targets > 0].tolist()
    found = measures(50)
    weights = some.weights(3, "mlm", found, 11)
    part = Measures(found.targets[3:5], found.losses[3:5], found.squares[3:5])
    assert some.weights(3, "mlm", part, 11).tolist() == weights[3:5].tolist()
    window, scored = np.array(taken["mlm"][-12:]), found.targets > 0
    z = [(each - window.mean()) / window.std() for each in (found.squares[scored], window)]
    assert weights[scored] == pytest.approx(np.minimum(np.exp(z[0]) / np.exp(z[1]).mean(), 11), rel=1e-6)


def test_auto_switches_once_when_noise_outgrows_signal():
    some, squares = weigher(name="presence", switch="auto", steps=1000), np.full(8, 1.0)
    temperatures = []
    for step in range(400):
        if some.switch.is_due(step):
            signal = 0.9 if step < 100 else 0.05  # noise over signal: 0.014, then 2.4
            some.switch.take(8 + 8 * 7 * signal, squares)
        temperatures.append(some.temperature(step))
    (switched,) = [step for step in range(1, 400) if temperatures[step] != temperatures[step - 1]]
    assert switched > 100 and set(temperatures) == {1.0, -1.0} and not some.switch.is_due(10)


def test_auto_is_not_moved_by_one_measurement_nor_by_numbers_that_are_not_finite():
    switch = weigher(name="presence", switch="auto").switch
    switch.take(1.0, np.full(8, 1.0))
    switch.take(np.nan, np.ones(8))
    switch.take(9.0, np.ones(1))
    assert not switch.thrown and switch.measurements == 1 and switch.ratio is None
    assert json.dumps(switch.state_dict(), allow_nan=False)


def test_a_small_effective_sample_size_is_told_the_first_the_tenth_and_the_hundredth_time():
    some, found = weigher(name="presence", floor=0.5), measures(1)
    warnings = [some.take(step, "mlm", found, np.array([11.0] + [0.0] * 10)) for step in range(120)]
    assert [step for step, warning in enumerate(warnings) if warning] == [0, 9, 99]
    assert "step 1:" in warnings[0] and "0.091 of the samples, 0.409 below weigher.floor" in warnings[0]
    assert some.take(120, "mlm", found, np.ones(11)) is None


@pytest.mark.parametrize(
    ("objectives", "mixes", "asked", "scorers"),
    [
        (["cse", "mlm", "rtd"], True, None, ["mlm"]),
        (["cse", "rtd", "clm"], True, None, ["rtd"]),
        (["cse", "mlm", "rtd"], False, None, ["mlm", "rtd"]),
        (["cse", "mlm", "rtd"], True, "each", ["mlm", "rtd"]),
        (["cse", "mlm", "rtd"], False, "rtd", ["rtd"]),
    ],
)
def test_the_scoring_objective_is_the_one_that_is_asked_for_or_fits(objectives, mixes, asked, scorers):
    able = {name: name != "cse" for name in objectives}
    some = weigher(able, mixes, name="presence", **({"score_objective": asked} if asked else {}))
    assert some.scorers(objectives) == scorers and some.scorers(["cse"]) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "presense"}, "r.yaml: weigher.name: unknown weigher 'presense'; did you mean 'presence'?"),
        ({"name": "presence", "temprature": 1}, "r.yaml: weigher.temprature: unknown key; did you mean 'temperature'?"),
        ({"name": "uniform", "temperature": 1}, "weigher.temperature: unknown key"),
        ({"name": "presence", "granularity": "microbatch", "score": "sketch"}, "'score' goes with granularity sample"),
        ({"name": "presence", "signal": "split"}, "'signal: split' goes with granularity microbatch"),
        ({"name": "presence", "sketch_size": 8}, "'sketch_size' goes with score sketch"),
        ({"name": "shuffled", "window": 8}, "'window' goes with normalise window"),
        ({"name": "presence", "switch": "auto", "temperature": 1}, "'switch: auto' needs a temperature that ends"),
        ({"name": "presence", "score_objective": "mlmm"}, "unknown objective 'mlmm'; did you mean 'mlm'?"),
        (
            {"name": "loss", "score_objective": "cse"},
            "samples of 'cse' have no gradients of their own; name one of mlm, rtd",
        ),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_key(keys, message):
    with pytest.raises(UserError) as error:
        weigher(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_of_objectives_that_couple_samples_cannot_be_weighed():
    with pytest.raises(UserError, match=r"samples of cse have no gradients .* set weigher.name to uniform"):
        weigher({"cse": False}, name="presence")
