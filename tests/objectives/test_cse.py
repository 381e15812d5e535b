import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.objectives import REGISTRY
from pretrain.objectives.base import parse_objectives
from tests.builders import VOCABULARY, lay_out, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples

LENGTHS = [[3, 5], [4], [2, 6, 1], [7], [], [3, 3]]


def objective_of(**keys):
    return REGISTRY["cse"](parse_objectives({"cse": keys}, "test")["cse"], VOCABULARY, 1)


def with_states(states: torch.Tensor) -> SimpleNamespace:
    """Return what looks like a model whose last hidden states are given: first views' rows, then second views'."""

    class Given:
        causal_only, attention = False, "blocks"

        def __call__(self, tokens, layout):
            assert tokens.shape == states.shape[:2] and layout.batch.tokens.shape == tokens.shape
            return states

    return SimpleNamespace(encoder=Given(), heads={"embedding": nn.Identity()})


def a_batch(first_row: int = 0, ids: list[int] | None = None) -> Batch:
    return lay_out([random_samples(row) for row in LENGTHS], row_length=11, first_row=first_row, ids=ids)


def simcse(batch: Batch, states: torch.Tensor, temperature: float, group_rows: int, pooling: str) -> list[float]:
    """SimCSE's equation 4 in plain Python: cross entropy of one's own second view among the group's second views."""
    views = []
    for half in states.split(len(batch.tokens)):
        embeddings = []
        for sample in range(len(batch.sample_ids)):
            tokens = half[batch.segment_ids == sample].double()
            vector = (tokens[0] if pooling == "first" else tokens.mean(0)).tolist()
            length = math.sqrt(sum(x * x for x in vector))
            embeddings.append([x / length for x in vector])
        views.append(embeddings)
    losses = []
    for i, first in enumerate(views[0]):
        scores = {}
        for j, second in enumerate(views[1]):
            together = batch.sample_rows[i] // group_rows == batch.sample_rows[j] // group_rows
            if i == j or (together and batch.sample_ids[i] != batch.sample_ids[j]):
                scores[j] = math.exp(sum(a * b for a, b in zip(first, second, strict=True)) / temperature)
        losses.append(-math.log(scores[i] / sum(scores.values())) if len(scores) > 1 else 0.0)
    return losses


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize(("group_rows", "temperature"), [(1, 0.05), (2, 0.1), (3, 1.0), (6, 0.05)])
@pytest.mark.parametrize("ids", [None, [4, 1, 2, 2, 4, 0, 5, 6, 5]], ids=["distinct", "seen twice"])
def test_losses_equal_simcse_by_a_loop_over_given_states(pooling, group_rows, temperature, ids):
    batch = a_batch(ids=ids)
    states = torch.randn(12, 11, 8, generator=torch.Generator().manual_seed(2))
    objective = objective_of(pooling=pooling, group_rows=group_rows, temperature=temperature)
    losses = objective.loss(with_states(states), objective.corrupt(batch, 0.0))["cse"].sums
    expected = simcse(batch, states, temperature, group_rows, pooling)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_sample_alone_in_its_group_is_no_target():
    objective = objective_of(group_rows=1)
    view = objective.corrupt(a_batch(), 0.0)
    assert view.counts["cse"].tolist() == [1, 1, 0, 1, 1, 1, 0, 1, 1]
    twice = objective_of(group_rows=6).corrupt(a_batch(ids=[3] * 9), 0.0)
    assert twice.counts["cse"].tolist() == [0] * 9


def test_groups_are_rows_of_the_global_batch_wherever_the_micro_batch_begins():
    objective = objective_of(group_rows=2)
    together = objective.corrupt(a_batch(first_row=4), 0.0).candidates
    assert torch.equal(together, objective.corrupt(a_batch(), 0.0).candidates)
    shifted = objective.corrupt(a_batch(first_row=5), 0.0).candidates
    assert not torch.equal(together, shifted)


def test_two_views_differ_by_dropout_alone():
    model = model_with("cse", group_rows=2)
    rows = rows_of_samples(4)
    view = model.objectives["cse"].corrupt(numbered(rows, ids_of(rows)), 0.0)
    embeddings = []
    model.heads["embedding"].register_forward_hook(lambda module, inputs, output: embeddings.append(output.detach()))
    samples = len(view.batch.sample_ids)
    for training in (False, True):
        model.train(training)
        model.objectives["cse"].loss(model, view)
        first, second = embeddings[-1].split(samples)
        assert torch.allclose(first, second, atol=1e-6) != training


@pytest.mark.parametrize(
    ("family", "dropout", "keys", "message"),
    [
        ("bert", 0.0, {}, r"^objectives\.cse: the backbone has no dropout.*model\.dropout"),
        ("gpt2", 0.1, {}, r"^objectives\.cse\.pooling: .*use 'mean'"),
        ("bert", 0.1, {"temperature": 0}, r"^test: objectives\.cse\.temperature: .*greater than 0"),
        ("bert", 0.1, {"group_rows": 0}, r"^test: objectives\.cse\.group_rows: .*greater than or equal to 1"),
        ("bert", 0.1, {"pooling": "men"}, r"^test: objectives\.cse\.pooling: .*did you mean 'mean'\?"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(family, dropout, keys, message):
    with pytest.raises(UserError, match=message):
        model_with("cse", family, dropout=dropout, **keys)


def test_a_decoder_pools_the_mean():
    model = model_with("cse", "gpt2", pooling="mean", group_rows=2)
    rows = rows_of_samples(4)
    view = model.objectives["cse"].corrupt(numbered(rows, ids_of(rows)), 0.0)
    assert model.objectives["cse"].loss(model, view)["cse"].sums.isfinite().all()


def test_a_micro_batch_must_hold_whole_groups():
    assert objective_of(group_rows=5).rows_together == 5


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_head_reads_a_samples_first_state_or_the_mean_of_its_states(pooling):
    batch = a_batch()
    states = torch.randn(12, 11, 8, generator=torch.Generator().manual_seed(2))
    seen = []
    model = with_states(states)
    model.heads["embedding"] = lambda pooled: seen.append(pooled) or pooled
    objective = objective_of(pooling=pooling)
    objective.loss(model, objective.corrupt(batch, 0.0))
    tokens = [half[batch.segment_ids == sample] for half in states.split(6) for sample in range(9)]
    expected = torch.stack([states[0] if pooling == "first" else states.mean(0) for states in tokens])
    assert torch.allclose(seen[0], expected, atol=1e-6)
