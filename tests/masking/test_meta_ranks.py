"""A meta run on several ranks, stopped, resumed, and through steps that are not finite."""

import os
import shutil
import signal

import pytest
import torch

from pretrain.masking.learning.extractor import WEIGHTS
from pretrain.masking.learning.meta_trainer import MetaTrainer
from tests.masking import meta_runs
from tests.training.runs import metrics, states

LAST = "checkpoints/step-00000006"
STAGES = ("zero0.json", "zero1.json", "zero2.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return meta_runs.write_signal_corpus(folder / "corpus"), meta_runs.write_signal_task(folder / "task")


def learn(document, ds="zero2.json"):
    return meta_runs.learn(document, ds=ds)


def learn_and_keep_the_policy(document, ds):
    """Learn; return the exit code and the policy as this rank has it after every step."""
    plain, kept = MetaTrainer.train_step, []

    def train_step(trainer):
        record = plain(trainer)
        kept.append({name: each.detach().clone() for name, each in trainer.model.heads["policy"].named_parameters()})
        return record

    MetaTrainer.train_step = train_step
    try:
        return meta_runs.learn(document, ds=ds)[0], kept
    finally:
        MetaTrainer.train_step = plain


def learn_with_broken_steps(document):
    """Learn with a task gradient that is NaN in steps 2 and 4."""
    plain = MetaTrainer.task_gradient

    def task_gradient(trainer, views, targets):
        found = plain(trainer, views, targets)
        return [each * float("nan") for each in found] if trainer.step in (1, 3) else found

    MetaTrainer.task_gradient = task_gradient
    try:
        return meta_runs.learn(document)
    finally:
        MetaTrainer.task_gradient = plain


def learn_and_stop_rank_one(document):
    """Learn; rank 1 is asked to stop in its second step."""
    plain = MetaTrainer.train_step

    def train_step(trainer):
        if trainer.step == 1 and trainer.engine.rank == trainer.engine.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(trainer)

    MetaTrainer.train_step = train_step
    try:
        return meta_runs.learn(document)
    finally:
        MetaTrainer.train_step = plain


@pytest.mark.parametrize("ds", STAGES)
def test_all_ranks_have_one_policy_and_it_is_that_of_one_rank_alone(data, tmp_path, ranks, ds):
    together = meta_runs.recipe(*data, tmp_path / "together")
    alone = meta_runs.recipe(*data, tmp_path / "alone")
    (code, first), (other_code, second) = ranks(learn_and_keep_the_policy, together, ds)
    assert (code, other_code) == (0, 0) and len(first) == 6
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert meta_runs.learn(alone, ds=ds)[0] == 0
    for one, two in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        assert one["targets"] == two["targets"]
        for name in ("mlm", "end_task"):
            assert two["losses"][name] == pytest.approx(one["losses"][name], rel=1e-4)
        assert two["meta"]["task_gradient_norm"] == pytest.approx(one["meta"]["task_gradient_norm"], rel=1e-3)
    start, end = first[0], first[-1]
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("ds", STAGES)
def test_a_resumed_run_is_bit_identical(data, tmp_path, ranks, ds):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run in (whole, resumed):
        assert [outcome[0] for outcome in ranks(learn, meta_runs.recipe(*data, run), ds)] == [0, 0]
    shutil.rmtree(resumed / LAST)
    shutil.rmtree(resumed / "policy")
    assert [outcome[0] for outcome in ranks(learn, meta_runs.recipe(*data, resumed), ds)] == [0, 0]
    assert states(resumed / LAST) == states(whole / LAST)
    assert (resumed / "policy" / WEIGHTS).read_bytes() == (whole / "policy" / WEIGHTS).read_bytes()
    for one, two in zip(metrics(whole), metrics(resumed), strict=True):
        assert (one["losses"], one["meta"]) == (two["losses"], two["meta"])


def test_a_signal_to_one_rank_saves_and_stops_all_and_the_same_command_goes_on(data, tmp_path, ranks):
    document, whole = meta_runs.recipe(*data, tmp_path / "run"), meta_runs.recipe(*data, tmp_path / "whole")
    outcomes = ranks(learn_and_stop_rank_one, document)
    assert [outcome[0] for outcome in outcomes] == [0, 0]
    assert "stopped on request after step 2" in outcomes[0][1]
    assert not (tmp_path / "run" / "policy").exists()
    for each in (document, whole):
        assert [outcome[0] for outcome in ranks(learn, each)] == [0, 0]
    assert states(tmp_path / "run" / LAST) == states(tmp_path / "whole" / LAST)


def test_a_step_that_is_not_finite_is_skipped_counted_and_leaves_the_weights_alone(data, tmp_path, ranks):
    outcomes = ranks(learn_with_broken_steps, meta_runs.recipe(*data, tmp_path / "run"))
    assert [outcome[0] for outcome in outcomes] == [0, 0]
    assert "2 steps were skipped" in outcomes[0][1]
    records = metrics(tmp_path / "run")
    assert [record["skipped"] for record in records] == [0, 1, 1, 2, 2, 2]
    assert records[1]["grad_norm"] is None and records[-1]["grad_norm"] is not None


def test_another_policy_is_not_resumed(data, tmp_path):
    document = meta_runs.recipe(*data, tmp_path / "run", training__steps=3)
    assert meta_runs.learn(document)[0] == 0
    document["policy"]["temperature"] = 0.5
    document["training"]["steps"] = 6
    code, _, err = meta_runs.learn(document)
    assert code == 2 and "policy: differs" in err
