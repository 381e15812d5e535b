"""META-TARTAN's step: the same training as a plain step, and alignments that plain torch finds too."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_objectives.philox import scalar_seed
from pretrain.data.order import shuffled
from pretrain.objectives.end_task import TaskHead
from pretrain.recipe import recipe_from
from pretrain.training.build import build
from tests.objectives.builders import write_task
from tests.training.runs import metrics, recipe, states, train, write_corpus

STAGES = ("zero0.json", "zero3.json")
LAST = "checkpoints/step-00000006"
HEAD, DEV = 5, 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "letters", dev=21)


def tartan(corpus, run, task, **sampler) -> dict:
    sampler = {"name": "meta_tartan", "dev_samples": DEV, "head_samples": HEAD, **sampler}
    if sampler["name"] == "mt_tartan":
        sampler = {"name": "mt_tartan"}
    objectives = {"mlm": {}, "rtd": {}, "end_task": {"task": str(task), "dropout": 0.0}}
    return recipe(corpus, run, objectives=objectives, sampler=sampler, model__dropout=0.0)


def _train(document, ds):
    return train(document, ds=ds)


@pytest.mark.parametrize("ds", STAGES)
def test_with_weights_that_stay_a_run_is_that_of_mt_tartan(corpus, task, tmp_path, ranks, ds):
    meta, mt = tmp_path / "meta", tmp_path / "mt"
    for document in (tartan(corpus, meta, task, learning_rate=1e-12), tartan(corpus, mt, task, name="mt_tartan")):
        assert [outcome[0] for outcome in ranks(_train, document, ds)] == [0, 0]
    for one, other in zip(metrics(meta), metrics(mt), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def plain_alignments(document: dict) -> dict[str, float]:
    """Return the cosines of the first step, by autograd on one process over the whole batch."""
    parts = build(recipe_from(document, "r.yaml"), dtype=torch.float32)
    model, seed = parts.model.double(), document["seed"]
    task, weights = model.objectives["end_task"], list(model.encoder.parameters())
    order = torch.from_numpy(
        shuffled(np.arange(HEAD + DEV), len(task.splits["dev"]), scalar_seed(seed, "dev samples", 0))[0]
    )

    def features(indices):
        drawn, labels = task.lay_out("dev", indices)
        return task.features(model.encoder, drawn), labels

    inputs, labels = features(order[:HEAD])
    inputs = inputs.detach()
    torch.manual_seed(scalar_seed(seed, "dev head", 0))
    head = TaskHead(inputs.shape[1], 3, 0.0).double()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    losses = []
    while len(losses) < 10:
        losses.append(F.cross_entropy(head(inputs), labels))
        if len(losses) > 1 and abs(losses[-1] - losses[-2]) < 1e-3:
            break
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    inputs, labels = features(order[HEAD:])
    direction = torch.autograd.grad(
        F.cross_entropy(head(inputs), labels), weights, materialize_grads=True, allow_unused=True
    )

    cosines = {}
    for name, objective in model.objectives.items():
        losses = {}
        counts = dict.fromkeys(objective.terms, 0)
        for batch in parts.loader(rank=0, world_size=1).next().micro_batches:
            view = objective.corrupt(batch, 0.0)
            found = objective.loss(model, view)
            for term in objective.terms:
                losses[term] = losses.get(term, 0) + found[term].total
                counts[term] += int(view.counts[term].sum())
        mean = sum(weight * losses[term] / counts[term] for term, weight in objective.terms.items())
        own = torch.autograd.grad(mean, weights, materialize_grads=True, allow_unused=True)
        flat, other = (torch.cat([each.flatten() for each in gradient]) for gradient in (own, direction))
        cosines[name] = float(F.cosine_similarity(flat, other, 0))
    return cosines


@pytest.mark.parametrize("ds", ["zero1.json", "zero2.json"])
def test_alignments_are_those_of_plain_autograd_over_the_global_batch(corpus, task, tmp_path, ranks, ds):
    document = tartan(corpus, tmp_path / "run", task)
    assert [outcome[0] for outcome in ranks(_train, document, ds)] == [0, 0]
    first = metrics(tmp_path / "run")[0]["sampler"]["alignments"]
    assert first == pytest.approx(plain_alignments(document), abs=1e-4)
    shares = [record["plan"] for record in metrics(tmp_path / "run")]
    expected = torch.tensor(list(first.values())).mul(0.01).softmax(0).tolist()
    assert list(shares[0].values()) == pytest.approx([1 / 3] * 3) and list(shares[1].values()) == pytest.approx(
        expected
    )


def test_a_resumed_run_is_bit_identical(corpus, task, tmp_path, ranks):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run in (whole, resumed, resumed):
        document = tartan(corpus, run, task, interval_steps=2, meta_gradient="exact")
        assert [outcome[0] for outcome in ranks(_train, document, "zero2.json")] == [0, 0]
        if run is resumed:
            first, finished = metrics(resumed), states(resumed / LAST)
            shutil.rmtree(resumed / LAST)
    assert finished == states(whole / LAST)
    for one, other in zip(metrics(whole), first, strict=True):
        assert (one["losses"], one["sampler"], one["plan"]) == (other["losses"], other["sampler"], other["plan"])


def test_a_dev_split_too_small_is_one_line(corpus, task, tmp_path):
    code, _, err = train(tartan(corpus, tmp_path / "run", task, dev_samples=17))
    assert code == 2 and len(err.splitlines()) == 1
    assert "sampler.dev_samples: 17" in err and "21 samples of the dev split" in err
