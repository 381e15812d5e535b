"""Runs whose sampler measures the model between steps."""

import shutil

import pytest

from tests.training.runs import metrics, recipe, states, train, write_corpus

LAST = "checkpoints/step-00000006"
MEASURING = {
    "fresh losses": {"name": "mometas", "reward": "paper", "interval_steps": 2, "learning_rate": 1e-12, "entropy": 0.0},
    "gradients": {"name": "mometas", "credit": "gradients", "interval_steps": 2, "learning_rate": 1e-12},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _train(document, ds):
    return train(document, ds=ds)


@pytest.mark.parametrize("ds", ["zero2-bf16.json", "zero3.json"])
def test_measurements_leave_no_trace_in_training(corpus, tmp_path, ranks, ds):
    samplers = {"none": {"name": "uniform"}, **MEASURING}
    for name, sampler in samplers.items():
        document = recipe(corpus, tmp_path / name, sampler=sampler, heldout={"rows": 0})
        document["objectives"] = {"mlm": {}, "cse": {"group_rows": 2}}
        assert [outcome[0] for outcome in ranks(_train, document, ds)] == [0, 0]
    for name in MEASURING:
        assert states(tmp_path / name / LAST) == states(tmp_path / "none" / LAST)
        told = [record["step"] for record in metrics(tmp_path / name) if record["sampler"]]
        assert told == [1, 3, 5]  # before steps 0, 2 and 4


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "mometas", "interval_steps": 6, "learning_rate": 5.0},
        {"name": "mometas", "reward": "paper", "interval_steps": 2, "learning_rate": 50.0},
        {"name": "pike", "interval_steps": 2},
    ],
    ids=["bursts", "paper", "pike"],
)
def test_a_resumed_run_measures_and_learns_as_if_it_had_not_stopped(corpus, tmp_path, sampler):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    document = recipe(corpus, whole, objectives={"mlm": {}, "rtd": {}}, sampler=sampler, heldout={"rows": 0})
    assert train(document)[0] == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / LAST)
    assert train(document | {"run": str(resumed)})[0] == 0
    assert states(resumed / LAST) == states(whole / LAST)
    for first, second in zip(metrics(whole), metrics(resumed), strict=True):
        assert all(first[key] == second[key] for key in ("plan", "probabilities", "sampler", "losses"))
    assert any(record["sampler"] for record in metrics(whole)[3:])


@pytest.mark.parametrize(
    ("heldout", "objectives", "told"),
    [
        (0, {"mlm": {}, "rtd": {}}, "sampler.name: 'mometas' measures held-out losses"),
        (2, {"mlm": {"masking": {"rate": 1e-9}}, "rtd": {}}, "objectives.mlm: no probe for 'mometas'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, heldout, objectives, told):
    corpus = write_corpus(tmp_path / "corpus", heldout=heldout)
    code, _, err = train(recipe(corpus, tmp_path / "run", objectives=objectives, sampler={"name": "mometas"}))
    assert code == 2 and len(err.splitlines()) == 1 and told in err
