"""Runs that go on on other ranks, at other ZeRO stages, in other micro-batches."""

import shutil

import pytest

from pretrain.training import states
from pretrain.training.start import RESTART
from tests.training.runs import metrics, recipe, train, write_corpus

MUON = {"name": "muon", "learning_rate": 0.003}
COURSES = {"mlm": {}, "rtd": {}, "itd": {"source": "generator"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def document(corpus, run, **changes) -> dict:
    base = {"model__dropout": 0.0, "checkpoint__interval_steps": 2, "checkpoint__keep": 3, "objectives": COURSES}
    return recipe(corpus, run, **{**base, "sampler": {"name": "proportional"}, **changes})


def go_back_to(run, step: int) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("optimizer", [{"learning_rate": 0.003}, MUON], ids=["adamw", "muon"])
def test_a_run_goes_on_at_any_stage_world_size_and_micro_batch(corpus, tmp_path, ranks, optimizer):
    """ZeRO 1 on one rank, 3 on two, 2 on one, against a run that was never interrupted."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {"training__optimizer": optimizer}
    assert train(document(corpus, whole, **options), ds="zero2.json")[0] == 0
    assert train(document(corpus, run, **options), ds="zero1.json")[0] == 0
    go_back_to(run, 2)
    elsewhere = document(corpus, run, training__micro_batch_rows=4, **options)
    outcomes = ranks(_train, elsewhere, "zero3.json")
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "was saved on 1 ranks at ZeRO 1, and is taken over by 2 at 3" in outcomes[0][1]
    assert "training.micro_batch_rows is 4 (was 2)" in outcomes[0][1] and "warning" not in outcomes[0][1]
    go_back_to(run, 4)
    code, out, _ = train(document(corpus, run, training__micro_batch_rows=8, **options), ds="zero2.json")
    assert code == 0 and "was saved on 2 ranks at ZeRO 3, and is taken over by 1 at 2" in out
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record, expected in zip(records, metrics(whole), strict=True):
        for exact in ("sample_ids_sha256", "tokens_seen", "plan", "targets", "lr"):
            assert record[exact] == expected[exact], exact
        assert record["losses"] == pytest.approx(expected["losses"], rel=2e-4)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)


def test_another_global_batch_is_allowed_and_said(corpus, tmp_path):
    run = tmp_path / "run"
    assert train(document(corpus, run))[0] == 0
    go_back_to(run, 4)
    code, out, _ = train(document(corpus, run, training__batch_rows=4))
    assert code == 0
    assert "training.batch_rows is 4 (was 8)" in out and "warning: another global batch" in out
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


def _train(document: dict, ds: str):
    return train(document, ds=ds)


def test_a_run_that_is_started_anew_goes_on_from_its_newest_checkpoint_whatever_it_began_with(
    corpus, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    assert train(document(corpus, run))[0] == 0
    monkeypatch.setenv(RESTART, "1")
    for resume in ("never", str(run / "checkpoints" / "step-00000002")):
        code, out, _ = train(document(corpus, run), "--resume", resume)
        assert code == 0 and "step-00000006" in out


def test_reading_a_checkpoint_that_takes_long_shows_how_far_it_is(corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert train(document(corpus, run))[0] == 0
    assert "resuming" not in train(document(corpus, run), ds="zero1.json")[2]
    monkeypatch.setattr(states, "_QUIET_SECONDS", 0.0)
    assert "resuming:" in train(document(corpus, run), ds="zero1.json")[2]
