"""``medley influence``, and the log that it reads."""

import base64
import json
import re

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.data.store import Store
from pretrain.influence import sample_log
from pretrain.influence.report import influence
from pretrain.influence.sample_log import SampleLog, read_sample_log
from tests.training.runs import metrics, recipe, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(corpus, run, **weigher):
    objectives = {"mlm": {}, "rtd": {}} if weigher.get("score_objective") else {"mlm": {}}
    document = recipe(corpus, run, objectives=objectives, sampler={}, heldout={"rows": 0}, weigher=weigher)
    document["checkpoint"]["interval_steps"] = 1000
    assert train(document)[0] == 0
    return run


def test_the_page_holds_a_picture_and_the_texts_of_the_highest_and_lowest_scores(corpus, tmp_path):
    run = trained(corpus, tmp_path / "run", name="presence", score_objective="each", floor=0.3)
    page, numbers = influence(run)
    text, facts = page.read_text(), json.loads(numbers.read_text())
    pictures = re.findall(r"data:image/png;base64,([^']+)'", text)
    assert len(pictures) == 2 and all(base64.b64decode(each).startswith(b"\x89PNG") for each in pictures)
    assert list(facts["objectives"]) == ["mlm", "rtd"] and facts["weigher"]["name"] == "presence"
    mlm, log = facts["objectives"]["mlm"], [each for each in read_sample_log(run) if each["objective"] == "mlm"]
    assert [each["step"] for each in log] == [1, 2, 3, 4, 5, 6]
    sizes = [each["effective_sample_size"] for each in metrics(run)]
    assert mlm["effective_sample_size"] == pytest.approx({"mean": np.mean(sizes), "least": min(sizes)})
    late, store = {}, Store(corpus / "train")
    for record in log[-2:]:
        late |= {i: s for i, s, n in zip(*(record[k] for k in ("sample_ids", "scores", "targets")), strict=True) if n}
    ordered = sorted(late, key=late.get)
    assert [each["sample"] for each in mlm["samples"]["lowest"]] == ordered[:12]
    assert [each["sample"] for each in mlm["samples"]["highest"]] == ordered[::-1][:12]
    for each in mlm["samples"]["highest"]:
        words = " ".join(f"w{token - 5}" for token in store[each["sample"]][1:-1])
        assert each["text"] == words and words in text and each["length"] == len(store[each["sample"]])
        assert each["score"] == late[each["sample"]]
    assert mlm["score_quantiles"]["0"] <= mlm["score_quantiles"]["0.5"] <= mlm["score_quantiles"]["1"]
    assert mlm["rank_correlation"]["lengths"] > 0


def test_the_page_of_micro_batches_and_of_another_store_has_no_texts(corpus, tmp_path, capsys):
    run = trained(corpus, tmp_path / "run", name="shuffled", granularity="microbatch")
    assert main(["influence", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / name}" for name in ("page.html", "page.json")]
    assert json.loads((tmp_path / "page.json").read_text())["objectives"]["microbatch"]["samples"] == {}

    other = write_corpus(tmp_path / "other", samples=40, seed=2)
    run = trained(other, tmp_path / "second", name="loss")
    other.rename(tmp_path / "gone")
    page, _ = influence(run)
    assert "No texts:" in page.read_text() and "highest scores" in page.read_text()
    write_corpus(other, samples=40, seed=3)
    assert "is not the store that the run was trained on" in influence(run)[0].read_text()


def test_a_run_without_scores_is_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    for folder, message in ((run, "no recorded step weighed its samples"), (tmp_path / "x", "is this a run folder?")):
        assert main(["influence", str(folder)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and message in err


def columns(samples: int) -> dict[str, np.ndarray]:
    return {"sample_ids": np.arange(samples, dtype=np.float64), "scores": np.full(samples, 1 / 3)}


def test_the_log_is_bounded_in_records_and_samples(tmp_path):
    assert SampleLog(tmp_path, steps=5000, interval_steps=2).interval == 5
    log = SampleLog(tmp_path, steps=10, interval_steps=4)
    assert [step for step in range(10) if log.is_due(step)] == [3, 7]
    log.write(3, {}, columns(1000))
    (record,) = read_sample_log(tmp_path)
    assert record["step"] == 4 and len(record["sample_ids"]) == sample_log.MOST_SAMPLES
    assert record["sample_ids"][0] == 0 and record["sample_ids"][-1] == 999 and record["scores"][0] == 0.333333


def test_records_of_steps_that_are_repeated_are_replaced(tmp_path):
    for attempt, steps in enumerate(([1, 3, 5, 7], [5, 7])):
        log = SampleLog(tmp_path, steps=9, interval_steps=2)
        for step in steps:
            log.write(step, {"attempt": attempt}, columns(3))
    assert [(each["step"], each["attempt"]) for each in read_sample_log(tmp_path)] == [(2, 0), (4, 0), (6, 1), (8, 1)]


def test_a_line_cut_short_is_passed_over_and_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    SampleLog(tmp_path, 9, 1).write(0, {}, {"scores": np.array([np.inf, 2.0])})
    with open(tmp_path / sample_log.FILE, "a") as file:
        file.write('{"step": 2, "sco')
    assert read_sample_log(tmp_path) == [{"step": 1, "scores": [None, 2]}] and "broken line" in capsys.readouterr().err
