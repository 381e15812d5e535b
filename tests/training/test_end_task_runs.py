"""Whole runs with an end task beside masked language modelling, on one and two ranks."""

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pretrain.errors import UserError
from pretrain.evaluation.end_task import task_scores
from pretrain.export import export, load_model
from pretrain.recipe import load_recipe
from pretrain.training.build import build
from pretrain.training.heldout import HeldoutProbe
from tests.objectives.builders import write_task
from tests.training.runs import metrics, recipe, states, train, write_corpus

LAST = "checkpoints/step-00000006"
STAGES = ("zero0.json", "zero1.json", "zero2.json", "zero3.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "letters", dev=21)


def tartan(corpus, run, task, **changes) -> dict:
    objectives = {"mlm": {}, "end_task": {"task": str(task)}}
    return recipe(corpus, run, **{"objectives": objectives, "sampler": {}, "heldout__rows": 24, **changes})


def _train(document, ds):
    return train(document, ds=ds)


def _train_and_score(document, ds):
    """Train, with the scores on dev taken beside the held-out losses; return them too."""
    plain, scores = HeldoutProbe.losses, []

    def losses(probe):
        before = plain(probe)
        scores.append(task_scores(probe.engine.module, probe.model.objectives["end_task"]).values)
        assert plain(probe) == before
        return before

    HeldoutProbe.losses = losses
    try:
        return train(document, ds=ds)[0], scores
    finally:
        HeldoutProbe.losses = plain


@pytest.mark.parametrize("ds", STAGES)
def test_a_resumed_run_is_bit_identical_and_the_scores_taken_in_it_are_its_checkpoints(
    corpus, task, tmp_path, ranks, ds
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert [outcome[0] for outcome in ranks(_train, tartan(corpus, whole, task), ds)] == [0, 0]
    assert [outcome[0] for outcome in ranks(_train, tartan(corpus, resumed, task), ds)] == [0, 0]
    shutil.rmtree(resumed / LAST)
    (code, scores), (_, others) = ranks(_train_and_score, tartan(corpus, resumed, task), ds)
    assert code == 0 and scores == others and len(scores) == 1
    assert states(resumed / LAST) == states(whole / LAST)
    for first, second in zip(metrics(whole), metrics(resumed), strict=True):
        assert (first["losses"], first["grad_norm"]) == (second["losses"], second["grad_norm"])
        assert first["targets"]["end_task"] == 8
    loaded = load_recipe(resumed / LAST / "config.yaml")
    parts = build(loaded, dtype=torch.float32)
    model = load_model(resumed / LAST, loaded, parts.vocabulary)
    assert task_scores(model, parts.model.objectives["end_task"]).values == pytest.approx(scores[0])


def test_ranks_and_micro_batches_do_not_change_what_is_trained(corpus, task, tmp_path, ranks):
    changes = {"model__dropout": 0.0, "objectives__end_task": {"task": str(task), "dropout": 0.0, "samples_per_row": 2}}
    one = tartan(corpus, tmp_path / "one", task, training__micro_batch_rows=8, **changes)
    two = tartan(corpus, tmp_path / "two", task, training__micro_batch_rows=2, **changes)
    assert train(one)[0] == 0 and [outcome[0] for outcome in ranks(train, two)] == [0, 0]
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert alone["targets"] == together["targets"] and alone["targets"]["end_task"] == 16
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    held = [metrics(tmp_path / name)[-1]["heldout"]["end_task"] for name in ("one", "two")]
    assert held[1] == pytest.approx(held[0], rel=1e-4)


def test_the_task_is_learnt_and_exported_without_its_files(corpus, task, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(task, moved)
    document = tartan(corpus, tmp_path / "run", moved, training__steps=80, log__interval_steps=80)
    document["objectives"]["end_task"]["max_length"] = 12
    document["training"]["batch_rows"] = 16
    code, out, err = train(document)
    assert (code, err) == (0, "")
    assert "note: end_task: train: " in out and "samples were cut" in out
    records = metrics(tmp_path / "run")
    late = sum(record["losses"]["end_task"] for record in records[-10:]) / 10
    assert late < 0.6 < records[0]["losses"]["end_task"]
    shutil.rmtree(moved)
    masked = export(tmp_path / "run", tmp_path / "masked")
    assert (masked / "config.json").is_file()
    out = export(tmp_path / "run", tmp_path / "classifier", "sequence-classification")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(classifier.config.id2label.values()) == ["a", "b", "c"]


def test_a_run_is_not_resumed_on_other_labels(corpus, task, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(task, changed)
    document = tartan(corpus, tmp_path / "run", changed)
    assert train(document)[0] == 0
    shutil.rmtree(tmp_path / "run" / LAST)
    lines = (changed / "train.jsonl").read_text().splitlines()
    (changed / "train.jsonl").write_text("\n".join(lines[1:]))
    code, _, err = train(document)
    assert code == 2 and len(err.splitlines()) == 1
    assert "objectives.end_task: other data than the checkpoint's" in err and "rank0.yaml" in err


def test_only_a_run_on_the_first_token_is_exported_as_a_classifier(corpus, task, tmp_path):
    document = tartan(corpus, tmp_path / "run", task, training__steps=1)
    document["objectives"]["end_task"]["pooling"] = "mean"
    assert train(document)[0] == 0
    with pytest.raises(UserError, match="needs 'end_task' on the first token"):
        export(tmp_path / "run", tmp_path / "out", "sequence-classification")


def test_a_mistake_in_the_task_is_refused_before_the_run_begins(corpus, task, tmp_path):
    for keys, word in (
        ({}, "objectives.end_task.task: is required"),
        ({"task": str(tmp_path / "nowhere")}, "objectives.end_task.task"),
        ({"task": str(task), "label_field": "gold"}, "no field 'gold'"),
    ):
        code, _, err = train(tartan(corpus, tmp_path / "run", task, objectives__end_task=keys))
        assert code == 2 and len(err.splitlines()) == 1
        assert ".rank0.yaml: objectives.end_task" in err and word in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_the_labelled_samples_along(corpus, task, tmp_path):
    code, out, err = train(tartan(corpus, tmp_path / "run", task), "--dry-run")
    assert (code, err) == (0, "") and "head/end_task" in out
