import math
from dataclasses import replace

import pytest
import torch

from fused_objectives.targets import IGNORED, compact
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import MASK, PAD, VOCABULARY, lay_out, padded, random_samples, tiny_encoder
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import COUNTED, detection_sums, gumbel_draw, labels_of, samples_of, unigram, word


def with_insertions(tokens, sample_id, visit, rate, longest=None) -> tuple[list[int], list[int]]:
    """Insert a token of the corpus before some of all but the first, and cut what is too long."""
    result, labels = [], []
    for position, token in enumerate(tokens):
        if position and word("itd", position, sample_id, visit) < int(rate * 2**32):
            result.append(unigram("itd/unigram", len(result), sample_id, visit))
            labels.append(1)
        result.append(token)
        labels.append(0)
    return result[:longest], labels[:longest]


def expected_of(batch, originals, rate, longest=None):
    identities = zip(originals, batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)
    pairs = [with_insertions(tokens, number, visit, rate, longest) for tokens, number, visit in identities]
    return [tokens for tokens, _ in pairs], [labels for _, labels in pairs]


def short_of_positions(positions: int, rate: float):
    """Return a model whose backbone has few positions."""
    objectives = build_objectives(parse_objectives({"itd": {"rate": rate}}, "test"), COUNTED, seed=1)
    encoder = tiny_encoder("bert", max_length=positions, overrides={"max_position_embeddings": positions})
    return MultiObjectiveModel(encoder, objectives).eval()


def with_generator(**keys) -> MultiObjectiveModel:
    recipe = {"itd": {"source": "generator", **keys}, "rtd": {"generator": {"embeddings": "separate"}}}
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed=1)
    return MultiObjectiveModel(tiny_encoder("bert"), objectives).eval()


@pytest.mark.parametrize("rate", [0.15, 0.7])
def test_tokens_labels_and_losses_are_those_of_a_loop_over_the_samples(rate):
    model = model_with("itd", vocabulary=COUNTED, rate=rate)
    rows = rows_of_samples(9)
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=70)
    view = model.objectives["itd"].corrupt(batch, 0.0)
    samples, labels = expected_of(batch, [sample.tolist() for row in rows for sample in row], rate)
    assert samples_of(view.batch) == samples
    assert labels_of(view.batch, view.labels) == labels
    assert torch.equal(view.tokens, view.batch.tokens)
    assert (view.tokens[~view.batch.real] == PAD).all() and (view.labels[~view.batch.real] == IGNORED).all()
    assert view.tallies == {"itd/positives": sum(map(sum, labels)), "itd/dropped_tokens": 0}
    assert view.tallies["itd/positives"] > 5
    assert view.counts["itd"].tolist() == [len(tokens) for tokens in samples]
    for name in ("sample_ids", "visits", "sample_rows"):
        assert torch.equal(getattr(view.batch, name), getattr(batch, name))
    assert view.batch.units == {}
    sums = model.objectives["itd"].loss(model, view)["itd"].sums
    assert sums.tolist() == pytest.approx(detection_sums(model, "itd_detection", samples, labels), rel=1e-4)


def test_what_is_beyond_the_backbones_positions_is_cut_and_counted():
    model = short_of_positions(24, rate=0.5)
    rows = rows_of_samples(9)
    batch = numbered(rows, ids_of(rows), row_length=70)
    originals = [sample.tolist() for row in rows for sample in row]
    samples, labels = expected_of(batch, originals, 0.5, longest=24)
    whole, _ = expected_of(batch, originals, 0.5)
    view = model.objectives["itd"].corrupt(batch, 0.0)
    assert samples_of(view.batch) == samples
    assert labels_of(view.batch, view.labels) == labels
    assert view.counts["itd"].tolist() == [len(tokens) for tokens in samples]
    assert view.tallies["itd/dropped_tokens"] == sum(map(len, whole)) - sum(map(len, samples)) > 5
    assert view.tallies["itd/positives"] == sum(map(sum, labels))
    sums = model.objectives["itd"].loss(model, view)["itd"].sums
    assert sums.tolist() == pytest.approx(detection_sums(model, "itd_detection", samples, labels), rel=1e-4)


def test_what_does_not_fit_into_the_row_is_counted(monkeypatch):
    objective = model_with("itd", rate=1.0).objectives["itd"]
    batch = padded(random_samples([20, 9]))
    monkeypatch.setattr(type(objective), "row_length", lambda self, length: length)
    view = objective.corrupt(batch, 0.0)
    assert view.batch.lengths.tolist() == [20, 17]
    assert view.tallies["itd/dropped_tokens"] == 39 - 20


@pytest.mark.parametrize(("length", "rate"), [(512, 0.15), (70, 0.15), (0, 0.15), (33, 1.0)])
def test_a_row_has_room_for_eight_standard_deviations_of_insertions(length, rate):
    capacity = model_with("itd", rate=rate).objectives["itd"].row_length(length)
    needed = length * (1 + rate) + 8 * math.sqrt(length * rate * (1 - rate))
    assert capacity % 8 == 0 and needed <= capacity < needed + 8


def test_rows_keep_their_length_over_the_run_while_the_rate_changes():
    objective = model_with("itd", rate={"schedule": "linear", "from": 0.5, "to": 0.1}).objectives["itd"]
    batch = padded(random_samples([60] * 10))
    views = [objective.corrupt(batch, progress) for progress in (0.0, 1.0)]
    assert views[0].tokens.shape == views[1].tokens.shape
    assert objective.row_length(60) == model_with("itd", rate=0.5).objectives["itd"].row_length(60)
    assert views[0].tallies["itd/positives"] > 3 * views[1].tallies["itd/positives"] > 0


@torch.no_grad()
def test_a_generator_fills_the_inserted_mask_tokens_and_leaves_the_rest():
    model = with_generator(rate=0.4)
    rows = rows_of_samples(6)
    batch = numbered(rows, ids_of(rows), row_length=70)
    view = model.objectives["itd"].corrupt(batch, 0.0)
    edited = view.batch
    inserted = view.labels == 1
    assert inserted.sum() > 15 and torch.equal(view.tokens == MASK, inserted)
    read = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    sums = model.objectives["itd"].loss(model, view)["itd"].sums
    expected = view.tokens.clone()
    everywhere = compact(torch.ones(view.tokens.numel(), dtype=torch.bool))
    logits = model.heads["generator"](view.tokens, Layout(edited), everywhere).view(*view.tokens.shape, -1)
    for row, column in inserted.nonzero().tolist():
        sample = int(edited.segment_ids[row, column])
        identity = int(edited.sample_ids[sample]), int(edited.visits[sample])
        position = int(edited.position_ids[row, column])
        expected[row, column] = gumbel_draw("itd/sample", logits[row, column], position, *identity)
    assert torch.equal(read[-1], expected)
    samples = samples_of(replace(edited, tokens=expected))
    labels = labels_of(edited, view.labels)
    assert sums.tolist() == pytest.approx(detection_sums(model, "itd_detection", samples, labels), rel=1e-4)


def test_a_borrowed_generator_is_not_trained():
    model = with_generator()
    assert list(model.heads) == ["itd_detection", "detection", "generator"]
    assert model.trained_by(["itd"]) == {"backbone", "head/itd_detection"}
    rows, kept = rows_of_samples(6), []
    model.heads["generator"].register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
    view = model.objectives["itd"].corrupt(numbered(rows, ids_of(rows)), 0.0)
    model({"itd": view}, {"itd": 1.0})[0].backward()
    assert kept == [False]  # activations that no backward pass needs
    assert all(parameter.grad is None for parameter in model.heads["generator"].parameters())
    assert all(parameter.grad is not None for parameter in model.heads["itd_detection"].parameters())


def test_rows_without_samples_have_loss_zero_with_a_generator_too():
    model = with_generator()
    view = model.objectives["itd"].corrupt(lay_out([[], []], row_length=9), 0.0)
    assert model({"itd": view}, {"itd": 1.0})[0].item() == 0.0


@pytest.mark.parametrize("others", [{}, {"rtd": {"source": "unigram"}}], ids=["alone", "with unigram"])
def test_a_generator_that_nobody_trains_is_refused(others):
    recipe = parse_objectives({"itd": {"source": "generator"}, **others}, "test")
    with pytest.raises(UserError, match=r"^objectives\.itd\.source: no objective of the recipe trains a generator"):
        MultiObjectiveModel(tiny_encoder("bert"), build_objectives(recipe, VOCABULARY, seed=1))


def test_a_tokenizer_without_a_mask_token_serves_the_corpus_own_tokens_only():
    without = replace(VOCABULARY, mask_id=None)
    model_with("itd", vocabulary=without)
    with pytest.raises(UserError, match=r"^objectives\.itd\.source: .* no mask token"):
        model_with("itd", vocabulary=without, source="generator")
