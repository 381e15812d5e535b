"""Whole runs with all courses."""

import math

import pytest

from tests.training.runs import metrics, recipe, train, write_corpus

SHARES = {"correction": 1, "rtd": 1, "std": 1, "itd": 1}
COURSES = {
    "correction": {},
    "rtd": {"generator": {"embeddings": "disentangled"}},
    "std": {"generator_weight": 1, "discriminator_weight": 50},
    "itd": {"source": "generator", "discriminator_weight": 50},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def document(corpus, run, **changes) -> dict:
    changes = {"training__steps": 4, "checkpoint__interval_steps": 4, "model__dropout": 0.0, **changes}
    return recipe(corpus, run, objectives=COURSES, **{"sampler": {}, **changes})


def test_all_courses_train_the_same_on_two_ranks_at_another_stage_and_in_other_micro_batches(corpus, tmp_path, ranks):
    steps = {"training__steps": 2, "checkpoint__interval_steps": 2}
    assert train(document(corpus, tmp_path / "one", training__micro_batch_rows=8, **steps), ds="zero0.json")[0] == 0
    two = document(corpus, tmp_path / "two", training__micro_batch_rows=4, **steps)
    outcomes = ranks(_train, two, "zero3.json")
    assert [outcome[0] for outcome in outcomes] == [0, 0], outcomes
    sizes = {"true_positives", "false_negatives", "false_positives", "positives"}
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert alone["targets"] == together["targets"]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for record in (alone, together):
            assert record["passes"] == {"backbone": 4.0, "generator": 4.0}
            assert {f"correction/{name}" for name in sizes} <= set(record["tallies"])
            assert {name.split("/")[0] for name in record["fractions"]} == set(COURSES)
            assert all(0 < fraction < 0.3 for name, fraction in record["fractions"].items() if name != "itd/positives")


@pytest.mark.parametrize(
    ("sampler", "passes"),
    [
        ({"name": "round_robin"}, [(2, 2), (1, 1), (1, 1), (1, 1)]),  # played again for the correction
        ({"name": "annealed", "from": SHARES, "to": SHARES | {"correction": 5}, "mode": "mix"}, [(4, 4)] * 4),
        ({"name": "odm"}, None),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_sampler_weighs_courses_as_it_does_any_objectives(corpus, tmp_path, sampler, passes):
    code, _, error = train(document(corpus, tmp_path / "run", sampler=sampler))
    assert (code, error) == (0, "")
    records = metrics(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) for record in records)
    if passes:
        assert [(record["passes"]["backbone"], record["passes"]["generator"]) for record in records] == passes


def _train(document: dict, ds: str):
    return train(document, ds=ds)
