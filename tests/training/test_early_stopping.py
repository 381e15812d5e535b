"""Early stopping on the end task's dev split: what ends a run, what is kept, and that scoring leaves no trace."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import UserError
from pretrain.evaluation.metrics import Scores
from pretrain.export import export, resolve_checkpoint
from pretrain.recipe import StoppingConfig
from pretrain.training import early_stopping
from pretrain.training.beats import PATIENCE, Progress
from pretrain.training.early_stopping import EarlyStopping
from tests.objectives.builders import write_task
from tests.training.runs import metrics, recipe, states, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "letters", dev=21)


def document(corpus, run, task, **changes) -> dict:
    objectives = {"mlm": {}, "end_task": {"task": str(task)}}
    changes = {"objectives": objectives, "sampler": {}, "checkpoint__keep": 1, **changes}
    return recipe(corpus, run, **changes)


def scored(monkeypatch, *scores: float) -> None:
    """Have dev score so, one scoring after another."""
    left = list(scores)
    monkeypatch.setattr(early_stopping, "task_scores", lambda *_: Scores({"accuracy": left.pop(0), "macro_f1": 0.0}))


def checkpoints(run) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("*-0*"))


def best(run) -> str:
    return (run / "checkpoints" / "best").read_text().strip()


def _train(document, ds) -> tuple[int, list[dict]]:
    """Train; return the exit code and the scores as this rank took them up, of which rank 1 misreads its own."""
    score, misread, taken = early_stopping.EarlyStopping.score, early_stopping.task_scores, []

    def task_scores(*args):
        values = misread(*args).values
        return Scores({name: value - (os.environ.get("RANK") == "1") for name, value in values.items()})

    def noted(early, step):
        taken.append(score(early, step))
        return taken[-1]

    early_stopping.EarlyStopping.score, early_stopping.task_scores = noted, task_scores
    try:
        return train(document, ds=ds)[0], taken
    finally:
        early_stopping.EarlyStopping.score, early_stopping.task_scores = score, misread


@pytest.mark.parametrize("ds", ["zero0.json", "zero3.json"])
def test_scoring_leaves_no_trace_and_all_ranks_go_by_the_first_ones(corpus, task, tmp_path, ranks, ds):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    steps = {"training__steps": 3, "checkpoint__interval_steps": 3, "heldout__rows": 0}
    stopping = {"stopping__interval_steps": 2, "stopping__patience": 3}
    assert ranks(_train, document(corpus, plain, task, **steps), ds) == [(0, []), (0, [])]
    (code, scores), (other_code, others) = ranks(_train, document(corpus, watched, task, **steps, **stopping), ds)
    assert (code, other_code) == (0, 0) and scores == others
    last = "checkpoints/step-00000003"
    assert states(watched / last) == states(plain / last)
    assert [record.get("dev") for record in metrics(watched)] == [None, *scores]
    assert [record.get("dev") for record in metrics(plain)] == [None] * 3
    state = json.loads((watched / last / "trainer.json").read_text())["stopping"]
    assert state["best"] == max(each["accuracy"] for each in scores) >= 0


def test_a_run_ends_when_dev_rises_no_more_and_keeps_the_weights_of_the_best_step(corpus, task, tmp_path, monkeypatch):
    scored(monkeypatch, 0.2, 0.5, 0.5, 0.4)
    run, stopping = tmp_path / "run", {"stopping__interval_steps": 1, "stopping__patience": 2}
    code, out, err = train(document(corpus, run, task, training__steps=9, **stopping))
    assert (code, err) == (0, "")
    assert "stopped early after step 4: accuracy on dev has been no better than 0.5000, that of step 2" in out
    records = metrics(run)
    assert [record["dev"]["accuracy"] for record in records] == [0.2, 0.5, 0.5, 0.4]
    assert "heldout" in records[-1]
    assert checkpoints(run) == ["step-00000002", "step-00000004"] and best(run) == "step-00000002"
    shorter = train(document(corpus, tmp_path / "shorter", task, training__steps=9))
    assert shorter[0] == 0  # the schedule is over training.steps, stopped early or not
    assert [r["lr"] for r in records] == [r["lr"] for r in metrics(tmp_path / "shorter")[:4]]

    code, out, err = train(document(corpus, run, task, training__steps=9, **stopping))
    assert (code, err) == (0, "") and "nothing to do: stopped early after step 4" in out
    assert len(metrics(run)) == 4 and checkpoints(run) == ["step-00000002", "step-00000004"]

    assert resolve_checkpoint(run, best=True).name == "step-00000002"
    folder = export(run, tmp_path / "export", "sequence-classification", best=True)
    assert "| steps | 2 |" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="no run with a best checkpoint"):
        export(tmp_path / "shorter", tmp_path / "other", best=True)


def test_the_watch_has_patience_while_dev_is_scored(monkeypatch):
    progress, found = Progress(), []
    for _ in range(9):
        progress.begin_step()
        progress.end_step()

    def task_scores(*_) -> Scores:
        found.append(progress.patience_seconds(8.0))
        return Scores({"accuracy": 0.5})

    monkeypatch.setattr(early_stopping, "task_scores", task_scores)
    objective = SimpleNamespace(task=SimpleNamespace(regression=False))
    recipe = SimpleNamespace(stopping=StoppingConfig(interval_steps=1), training=SimpleNamespace(steps=9))
    parts = SimpleNamespace(recipe=recipe, model=SimpleNamespace(objectives={"end_task": objective}))
    engine = SimpleNamespace(progress=progress, module=None, rank=0, all_reduce=torch.tensor)
    EarlyStopping(parts, engine).score(9)
    assert found == [PATIENCE * 8.0]
    progress.begin_step()
    assert progress.patience_seconds(8.0) == 8.0


def test_a_resumed_run_counts_on_and_stops_at_the_same_step(corpus, task, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"training__steps": 9, "checkpoint__interval_steps": 1, "checkpoint__keep": 9}
    changes |= {"stopping__interval_steps": 1, "stopping__patience": 3}
    scores = [0.2, 0.5, 0.1, 0.6, 0.3, 0.3, 0.3]
    scored(monkeypatch, *scores)
    assert train(document(corpus, whole, task, **changes))[0] == 0
    shutil.copytree(whole, run)
    for step in (4, 5, 6, 7):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    scored(monkeypatch, *scores[3:])
    assert train(document(corpus, run, task, **changes))[0] == 0
    assert best(run) == best(whole) == "step-00000004"
    for name in ("step-00000004", "step-00000007"):
        assert states(run / "checkpoints" / name) == states(whole / "checkpoints" / name)
        resumed, once = (json.loads((r / "checkpoints" / name / "trainer.json").read_text()) for r in (run, whole))
        assert resumed == once


def test_going_back_before_the_best_step_forgets_it(corpus, task, tmp_path, monkeypatch):
    run, changes = tmp_path / "run", {"checkpoint__interval_steps": 1, "checkpoint__keep": 9}
    changes |= {"stopping__interval_steps": 1, "training__steps": 3}
    scored(monkeypatch, 0.3, 0.2, 0.5)
    assert train(document(corpus, run, task, **changes))[0] == 0 and best(run) == "step-00000003"
    changes["training__steps"] = 2  # nothing is left to be trained, or saved
    code, *_ = train(document(corpus, run, task, **changes), "--resume", str(run / "checkpoints" / "step-00000002"))
    assert code == 0 and best(run) == "step-00000001"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"objectives": {"mlm": {}}}, "stopping.interval_steps: early stopping goes by the dev split of 'end_task'"),
        ({"stopping__metric": "acuracy"}, "stopping.metric: unknown metric 'acuracy'; did you mean 'accuracy'?"),
        ({"stopping__patience": 0}, "stopping.patience: "),
    ],
)
def test_a_recipe_that_cannot_stop_early_is_refused_before_the_run_begins(corpus, task, tmp_path, keys, reason):
    code, _, err = train(document(corpus, tmp_path / "run", task, **{"stopping__interval_steps": 1, **keys}))
    assert code == 2 and len(err.splitlines()) == 1
    assert f".rank0.yaml: {reason}" in err
    assert not (tmp_path / "run").exists()
