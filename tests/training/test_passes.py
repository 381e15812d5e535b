"""The metrics tell how often a step ran backbone and generator."""

import pytest

from tests.training.runs import metrics, recipe, train, write_corpus


@pytest.mark.parametrize("stage", [2, 3])
def test_each_pass_of_backbone_and_generator_is_counted_a_micro_step(tmp_path, stage):
    store = write_corpus(tmp_path / "store")
    objectives = {"mlm": {}, "rtd": {}, "itd": {"source": "generator"}, "std": {}}
    phases = [{"shares": {name: 1.0}, "steps": 1} for name in objectives] + [
        {"shares": dict.fromkeys(objectives, 1.0), "steps": 1}
    ]
    sampler = {"name": "alternating", "mode": "mix", "phases": phases}
    changes = {
        "objectives": objectives,
        "sampler": sampler,
        "training__steps": 5,
        "heldout": {"rows": 2, "interval_steps": 1},
    }
    run = tmp_path / "run"
    code, _, err = train(recipe(store, run, **changes), ds=f"zero{stage}.json")
    assert (code, err) == (0, "")
    expected = [(1, 0), (1, 1), (1, 1), (1, 0), (4, 2)]
    assert [tuple(each["passes"].values()) for each in metrics(run)] == expected
    assert list(metrics(run)[0]["passes"]) == ["backbone", "generator"]


def test_the_second_pass_of_a_weigher_counts(tmp_path):
    store = write_corpus(tmp_path / "store")
    changes = {"objectives": {"mlm": {}}, "sampler": {}, "training__steps": 2}
    passes = {}
    for gradient in ("two_pass", "deferred"):
        weigher = {"name": "presence", "gradient": gradient, "normalise": "window"}
        assert train(recipe(store, tmp_path / gradient, weigher=weigher, **changes))[0] == 0
        passes[gradient] = [each["passes"] for each in metrics(tmp_path / gradient)]
    assert passes["two_pass"][-1] == {"backbone": 2} and passes["deferred"][-1] == {"backbone": 1}
